// The sums that all gradients of a node follow from.
//
// A block takes a tile: whole rows of one image, or a part of a row, so that its pixels follow one another. g of the
// mixed channels is in shared memory; each warp takes one task at a time, and of it 32 lanes x V channels: lanes are
// neighbours in channels first, then in pixels. What a block sums is a row of partial [rows][blocks][cm]:
//
//     g, shared           task                 sums over the pixels             its rows
//      cm channels
//     +-----------+       part of edge j       g (y - mean) of both pools,      streams + 3 j, + 1
//     | tile      |                              of some columns
//     |    pixels |   x   bypass j, K > 1      g x over the other channels      node.rows() + 1 + j
//     |           |       stream s             g (y - mean)                     s
//     +-----------+       identity j           g x                              streams + 3 j + 2
//                         gradient             g                                node.rows()
#pragma once
#include "cuda/node.h"

namespace rfdarts::cuda {

// blocks of a multiprocessor that must have enough registers: the more, the more loads are under way
template <class T, int K>
constexpr int kBackwardBlocks = kResident<T>;
template <>
constexpr int kBackwardBlocks<__nv_bfloat16, 1> = 3;
// pixels whose loads a lane waits for together
constexpr int kAhead = 4;

template <class T>
struct NodeBackward {
  Node<T> node;
  Tiling tiling;
  ImageView<T> g;   // [n][oh][ow][K cm]
  bool wide;        // vectors of g are aligned; who sums what does not depend on it
  T* mixed_g;       // the mixed op's channels of g, dense [n][oh][ow][cm], where not null
  double* partial;  // [rows + 1 + incoming][blocks][cm]
  int lanes, step;  // of a warp: along the channels, and along the pixels
  int parts;        // of an edge's pools: columns are dealt out to them
  bool bypasses;

  template <int N>
  __device__ __forceinline__ void load_g(const T* from, Acc<T> (&to)[N]) const {
    wide ? load_by<N>(from, to) : load_by<1>(from, to);
  }
  // Tasks, and what each leaves in shared memory, slots of a value for each lane's V channels: one, the parts of an
  // edge's pools two.
  __host__ __device__ int pools() const { return node.incoming * parts; }
  __host__ __device__ int others() const { return node.incoming * (bypasses + 1) + node.streams + 1; }
  __host__ __device__ int slots() const { return 2 * pools() + others(); }
  // Shared memory: sums [slots][groups of channels][32 V], g [pixels][cm], the pools' means [incoming][2][cm].
  int shared_bytes(int v) const {
    int values = slots() * ceil_div(node.cm, 32 * v) * 32 * v + (tiling.th * tiling.tw + 2 * node.incoming) * node.cm;
    return values * int(sizeof(Acc<T>));
  }
};

// sum += value, what rounding loses being kept in `lost`: for long sums whose terms are not centred
template <class A>
__device__ __forceinline__ void add_compensated(A value, A& sum, A& lost) {
  A term = value - lost, next = sum + term;
  lost = next - sum - term;
  sum = next;
}

// What a warp sums: of stream or incoming edge `index`, for row `row`. The longest come first.
enum class Role { Bypass, Stream, Identity, Gradient };
struct Task {
  Role role;
  int index, row;
};
// those that are no pools, in the order of their slots
template <class T>
__device__ Task task_of(const NodeBackward<T>& a, int number) {
  const Node<T>& node = a.node;
  int bypass = number, stream = bypass - (a.bypasses ? node.incoming : 0), edge = stream - node.streams;
  if (stream < 0) return {Role::Bypass, bypass, node.rows() + 1 + bypass};
  if (edge < 0) return {Role::Stream, stream, stream};
  if (edge < node.incoming) return {Role::Identity, edge, node.streams + 3 * edge + 2};
  return {Role::Gradient, 0, node.rows()};
}

// A block's pixels: `count` from (y0, x0) on, in rows of `wide`.
struct NodePixels {
  int n, y0, x0, high, wide, count;
  __device__ NodePixels(const Tiling& t, int oh, int ow) {
    Corner corner = t.corner(blockIdx.x);
    n = corner.n, y0 = corner.y, x0 = corner.x;
    high = min(t.th, oh - y0), wide = min(t.tw, ow - x0), count = high * wide;
  }
};
// Every `step`-th pixel of a block, from `first` on.
struct PixelWalk {
  int p, y, x, step, down, across, wide;
  __device__ PixelWalk(const NodePixels& pixels, int first, int step)
      : p(first), y(first / pixels.wide), x(first % pixels.wide), step(step), down(step / pixels.wide),
        across(step % pixels.wide), wide(pixels.wide) {}
  __device__ __forceinline__ void next() {
    p += step, y += down, x += across;
    if (x >= wide) x -= wide, y++;
  }
};

// A lane's V channels of the block's pixels, from channel `ch` on. Its sums go to sums[slot * apart].
template <class T, int K, int V>
struct LanePixels {
  using A = Acc<T>;
  const NodeBackward<T>& a;
  const NodePixels& pixels;
  const A *gs, *means;
  A* sums;
  int place, ch, apart;

  // lanes that are left over, or beyond the channels, have no pixel
  __device__ bool takes() const { return place < a.step && ch < a.node.cm; }
  __device__ int first() const { return takes() ? place : pixels.count; }
  __device__ void mean(int norm, A (&mean)[V]) const {
#pragma unroll
    for (int i = 0; i < V; i++) mean[i] = norm < 0 || !takes() ? A(0) : a.node.norms.mean(norm, ch + i);
  }

  template <int S>
  __device__ void sum_pools_at(int edge, int part) const {
    const auto& in = a.node.in[edge];
    A sum_max[V] = {}, sum_avg[V] = {};
    const A* mean = means + edge * 2 * a.node.cm + ch;
    int begin = takes() ? part * a.step + place : pixels.wide;
    for (int x = begin; x < pixels.wide; x += a.step * a.parts) {
      PoolColumn<T, V, S> column(in.x, pixels.n, pixels.x0 + x, ch, in.h, in.w);
      const A* from = gs + x * a.node.cm + ch;
      column.template walk<1>(pixels.y0, pixels.high, [&](int, const A(&max)[V], const A(&avg)[V]) {
        // in registers there is no room for them
        A g[V], mean_max[V], mean_avg[V];
        load<V>(from, g);
        load<V>(mean, mean_max);
        load<V>(mean + a.node.cm, mean_avg);
        from += pixels.wide * a.node.cm;
#pragma unroll
        for (int i = 0; i < V; i++) {
          sum_max[i] += g[i] * (max[i] - mean_max[i]);
          sum_avg[i] += g[i] * (avg[i] - mean_avg[i]);
        }
      });
    }
    store<V>(sums + (2 * edge * a.parts + part) * apart, sum_max);
    store<V>(sums + ((2 * edge + 1) * a.parts + part) * apart, sum_avg);
  }
  __device__ void sum_pools(int number) const {
    int edge = number / a.parts, part = number % a.parts;
    const auto& in = a.node.in[edge];
    if (in.max || in.avg) in.stride == 1 ? sum_pools_at<1>(edge, part) : sum_pools_at<2>(edge, part);
  }
  __device__ void sum_bypass(const Task& task, A (&sum)[V]) const {
    const auto& in = a.node.in[task.index];
    A lost[V] = {};
    for (PixelWalk at(pixels, first(), a.step); at.p < pixels.count; at.next()) {
      int y = pixels.y0 + at.y, x = pixels.x0 + at.x;
      A g[K * V], value[K][V];
      a.load_g(a.g.at(pixels.n, y, x) + ch * K, g);
      const T* from = in.x.at(pixels.n, y * in.stride, x * in.stride) + ch;
#pragma unroll
      for (int k = 1; k < K; k++) bypass_at<T, V>(in.x, in.stride, from + k * a.node.cm, value[k]);
#pragma unroll
      for (int k = 1; k < K; k++)
#pragma unroll
        for (int i = 0; i < V; i++) add_compensated(g[i * K + k] * value[k][i], sum[i], lost[i]);
    }
  }
  __device__ void sum_stream(const Task& task, A (&sum)[V]) const {
    const auto& stream = a.node.stream[task.index];
    A mean[V];
    this->mean(a.node.term[task.row].norm, mean);
    auto add = [&](const Pack<T, V>& value, int p) {
      A g[V], y[V];
      load<V>(gs + p * a.node.cm + ch, g);
      unpack(value, y);
#pragma unroll
      for (int i = 0; i < V; i++) sum[i] += g[i] * (y[i] - mean[i]);
    };
    const T* from = stream.data + pixels.n * stream.image + int64_t(pixels.y0 * a.node.ow + pixels.x0) * a.node.cm + ch;
    auto at = [&](int p) { return *reinterpret_cast<const Pack<T, V>*>(from + p * a.node.cm); };
    int p = first();
    for (; p + (kAhead - 1) * a.step < pixels.count; p += kAhead * a.step) {
      Pack<T, V> value[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; j++) value[j] = at(p + j * a.step);
#pragma unroll
      for (int j = 0; j < kAhead; j++) add(value[j], p + j * a.step);
    }
    for (; p < pixels.count; p += a.step) add(at(p), p);
  }
  __device__ void sum_identity(const Task& task, A (&sum)[V]) const {
    const auto& in = a.node.in[task.index];
    if (!in.identity) return;
    A lost[V] = {};
#pragma unroll 4
    for (PixelWalk at(pixels, first(), a.step); at.p < pixels.count; at.next()) {
      A value[V], g[V];
      load<V>(in.x.at(pixels.n, pixels.y0 + at.y, pixels.x0 + at.x) + ch, value);
      load<V>(gs + at.p * a.node.cm + ch, g);
#pragma unroll
      for (int i = 0; i < V; i++) add_compensated(g[i] * value[i], sum[i], lost[i]);
    }
  }
  __device__ void sum_gradient(A (&sum)[V]) const {
    for (int p = first(); p < pixels.count; p += a.step) {
      A g[V];
      load<V>(gs + p * a.node.cm + ch, g);
#pragma unroll
      for (int i = 0; i < V; i++) sum[i] += g[i];
    }
  }
  __device__ void run(int number) const {
    if (number < a.pools()) return sum_pools(number);
    Task task = task_of(a, number - a.pools());
    A sum[V] = {};
    switch (task.role) {
      case Role::Bypass:
        if constexpr (K > 1) sum_bypass(task, sum);
        break;
      case Role::Stream: sum_stream(task, sum); break;
      case Role::Identity: sum_identity(task, sum); break;
      default: sum_gradient(sum);
    }
    store<V>(sums + (a.pools() + number) * apart, sum);
  }
};

// gs [count][cm] = the mixed op's channels of g, and mixed_g
template <class T, int K, int V>
__device__ void load_gradient(const NodeBackward<T>& a, const NodePixels& pixels, Acc<T>* gs) {
  int vectors = a.node.cm / V, first = threadIdx.x / vectors, ch = threadIdx.x % vectors * V;
  // more channels than threads have vectors for: in rounds
  int step = max(1, kThreads / vectors), across = min(vectors, kThreads) * V;
  if (first >= step) return;
  int64_t begin = (int64_t(pixels.n) * a.node.oh + pixels.y0) * a.node.ow + pixels.x0;
#pragma unroll 2
  for (PixelWalk at(pixels, first, step); at.p < pixels.count; at.next())
    for (int c = ch; c < a.node.cm; c += across) {
      Acc<T> g[K * V], mixed[V];
      a.load_g(a.g.at(pixels.n, pixels.y0 + at.y, pixels.x0 + at.x) + c * K, g);
#pragma unroll
      for (int i = 0; i < V; i++) mixed[i] = g[i * K];
      store<V>(gs + at.p * a.node.cm + c, mixed);
      if (K > 1) store<V>(a.mixed_g + (begin + at.p) * a.node.cm + c, mixed);
    }
}

template <class T, int K, int V>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks<T, K>)
    node_backward_kernel(const __grid_constant__ NodeBackward<T> a) {
  RFDARTS_SHARED(shared);
  const Node<T>& node = a.node;
  int cm = node.cm, groups = ceil_div(cm, 32 * V), apart = groups * 32 * V;
  Acc<T>*sums = reinterpret_cast<Acc<T>*>(shared), *gs = sums + a.slots() * apart;
  Acc<T>* means = gs + a.tiling.th * a.tiling.tw * cm;
  NodePixels pixels(a.tiling, node.oh, node.ow);
  for (int i = threadIdx.x; i < node.incoming * 2 * cm; i += kThreads) {
    int row = i / cm, norm = node.term[node.streams + row / 2 * 3 + row % 2].norm;
    means[i] = norm < 0 ? Acc<T>(0) : node.norms.mean(norm, i % cm);
  }
  load_gradient<T, K, V>(a, pixels, gs);
  __syncthreads();
  int lane = threadIdx.x % 32, place = lane / a.lanes, ch = (lane - place * a.lanes) * V;
  int tasks = a.pools() + a.others();
  for (int number = threadIdx.x / 32; number < tasks * groups; number += kThreads / 32) {
    int group = groups == 1 ? 0 : number / tasks, first = group * 32 * V;
    LanePixels<T, K, V>{a, pixels, gs, means, sums + first + lane * V, place, first + ch, apart}.run(number -
                                                                                                 group * tasks);
  }
  // all sums are there
  __syncthreads();
  for (int i = threadIdx.x; i < (2 * node.incoming + a.others()) * cm; i += kThreads) {
    int number = i / cm, channel = i % cm, other = number - 2 * node.incoming, slot = a.parts * number, slots = a.parts;
    int row = node.streams + number / 2 * 3 + number % 2;
    if (other >= 0) slot = 2 * a.pools() + other, slots = 1, row = task_of(a, other).row;
    // a channel's first lane; where lanes go along the pixels too, there is one group
    const Acc<T>* from = sums + slot * apart + channel;
    double total = 0;
    for (int s = 0; s < slots; s++)
#pragma unroll 4
      for (int p = 0; p < a.step; p++) total += double(from[s * apart + p * cm]);
    a.partial[(int64_t(row) * gridDim.x + blockIdx.x) * cm + channel] = total;
  }
}

}  // namespace rfdarts::cuda
