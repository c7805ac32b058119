// The sums that all gradients of a node follow from.
//
// A block takes a tile: whole rows of one image, or a part of a row, so that its pixels follow one another. g of the
// mixed channels is in shared memory; a warp takes the next task as soon as it is free, and of it 32 lanes x V channels:
// lanes are neighbours in channels first, then in pixels. What a task sums depends on no warp and no other task. It is
// a row of partial [rows][blocks][cm]:
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
constexpr int kBackwardBlocks = sizeof(T) == 8 ? 1 : K > 1 || sizeof(T) == 4 ? 2 : 3;
// pixels whose loads a lane waits for together
constexpr int kAhead = 4;

template <class T>
struct NodeBackward {
  Node<T> node;
  Tiling tiling;
  ImageView<T> g;   // [n][oh][ow][K cm]
  T* mixed_g;       // the mixed op's channels of g, dense [n][oh][ow][cm], where not null
  double* partial;  // [rows + 1 + incoming][blocks][cm]
  int lanes, step;  // of a warp: along the channels, and along the pixels
  int parts;        // of an edge's pools: columns are dealt out to them
  bool bypasses;

  // Shared memory in bytes: sums of the parts [incoming][parts][2][cm], g [pixels][cm], the pools' means
  // [incoming][2][cm], the next task.
  __host__ __device__ int sums_bytes() const { return node.incoming * parts * 2 * node.cm * int(sizeof(double)); }
  __host__ __device__ int g_bytes() const { return tiling.th * tiling.tw * node.cm * int(sizeof(Acc<T>)); }
  __host__ __device__ int means_bytes() const { return node.incoming * 2 * node.cm * int(sizeof(Acc<T>)); }
  int shared_bytes() const { return sums_bytes() + g_bytes() + means_bytes() + int(sizeof(int)); }
};

// sum += value, what rounding loses being kept in `lost`: for long sums whose terms are not centred
template <class A>
__device__ __forceinline__ void add_compensated(A value, A& sum, A& lost) {
  A term = value - lost, next = sum + term;
  lost = next - sum - term;
  sum = next;
}

// What a warp sums: of stream or incoming edge `index`, into rows from `row` on. The longest come first.
enum class Role { Pools, Bypass, Stream, Identity, Gradient };
struct Task {
  Role role;
  int index, row, part;
};
template <class T>
__device__ Task task_of(const NodeBackward<T>& a, int number) {
  const Node<T>& node = a.node;
  if (number < node.incoming * a.parts) {
    int edge = number / a.parts;
    return {Role::Pools, edge, node.streams + 3 * edge, number % a.parts};
  }
  int bypass = number - node.incoming * a.parts, stream = bypass - (a.bypasses ? node.incoming : 0);
  if (stream < 0) return {Role::Bypass, bypass, node.rows() + 1 + bypass, 0};
  if (stream < node.streams) return {Role::Stream, stream, stream, 0};
  int edge = stream - node.streams;
  if (edge < node.incoming) return {Role::Identity, edge, node.streams + 3 * edge + 2, 0};
  return {Role::Gradient, 0, node.rows(), 0};
}
template <class T>
__device__ int tasks_of(const NodeBackward<T>& a) {
  return a.node.incoming * (a.parts + a.bypasses + 1) + a.node.streams + 1;
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

// N elements, in vectors of V
template <int V, int N, class T>
__device__ __forceinline__ void load_by(const T* from, Acc<T> (&to)[N]) {
#pragma unroll
  for (int i = 0; i < N; i += V) {
    Acc<T> part[V];
    load<V>(from + i, part);
#pragma unroll
    for (int j = 0; j < V; j++) to[i + j] = part[j];
  }
}

// A lane's V channels of the block's pixels.
template <class T, int K, int V>
struct LanePixels {
  using A = Acc<T>;
  const NodeBackward<T>& a;
  const NodePixels& pixels;
  double* sums;
  const A *gs, *means;
  int c0;
  int lane = threadIdx.x % 32, place = lane / a.lanes, ch = c0 + lane % a.lanes * V;

  // lanes that are left over, or beyond the channels, have no pixel
  __device__ bool takes() const { return place < a.step && ch < a.node.cm; }
  __device__ int first() const { return takes() ? place : pixels.count; }
  __device__ void mean(int norm, A (&mean)[V]) const {
#pragma unroll
    for (int i = 0; i < V; i++) mean[i] = norm < 0 || !takes() ? A(0) : a.node.norms.mean(norm, ch + i);
  }
  // to[channel] = the sum over the lanes that share channels, in pairs
  __device__ void add_up(const A (&sum)[V], double* to) const {
    double total[V];
#pragma unroll
    for (int i = 0; i < V; i++) total[i] = double(sum[i]);
    int apart = 1;
    while (apart < a.step) apart *= 2;
    for (apart /= 2; apart; apart /= 2)
#pragma unroll
      for (int i = 0; i < V; i++) {
        double other = __shfl_sync(0xffffffffu, total[i], (lane + apart * a.lanes) & 31);
        if (place + apart < a.step) total[i] += other;
      }
    if (place == 0 && ch < a.node.cm)
#pragma unroll
      for (int i = 0; i < V; i++) to[ch + i] = total[i];
  }
  __device__ double* row(int row) const { return a.partial + (int64_t(row) * gridDim.x + blockIdx.x) * a.node.cm; }

  template <int S>
  __device__ void sum_pools_at(const Task& task) const {
    const auto& in = a.node.in[task.index];
    A sum_max[V] = {}, sum_avg[V] = {};
    const A* mean = means + task.index * 2 * a.node.cm + ch;
    int begin = takes() ? task.part * a.step + place : pixels.wide;
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
    double* to = sums + int64_t(task.index * a.parts + task.part) * 2 * a.node.cm;
    add_up(sum_max, to);
    add_up(sum_avg, to + a.node.cm);
  }
  __device__ void sum_pools(const Task& task) const {
    const auto& in = a.node.in[task.index];
    if (in.max || in.avg) in.stride == 1 ? sum_pools_at<1>(task) : sum_pools_at<2>(task);
  }
  __device__ void sum_bypass(const Task& task) const {
    const auto& in = a.node.in[task.index];
    A sum[V] = {}, lost[V] = {};
    for (PixelWalk at(pixels, first(), a.step); at.p < pixels.count; at.next()) {
      int y = pixels.y0 + at.y, x = pixels.x0 + at.x;
      A g[K * V], value[K][V];
      load_by<V == 1 ? 1 : K * V>(a.g.at(pixels.n, y, x) + ch * K, g);
      const T* from = in.x.at(pixels.n, y * in.stride, x * in.stride) + ch;
#pragma unroll
      for (int k = 1; k < K; k++) bypass_at<T, V>(in.x, in.stride, from + k * a.node.cm, value[k]);
#pragma unroll
      for (int k = 1; k < K; k++)
#pragma unroll
        for (int i = 0; i < V; i++) add_compensated(g[i * K + k] * value[k][i], sum[i], lost[i]);
    }
    add_up(sum, row(task.row));
  }
  __device__ void sum_stream(const Task& task) const {
    const auto& stream = a.node.stream[task.index];
    A sum[V] = {}, mean[V];
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
    add_up(sum, row(task.row));
  }
  __device__ void sum_identity(const Task& task) const {
    const auto& in = a.node.in[task.index];
    if (!in.identity) return;
    A sum[V] = {}, lost[V] = {};
#pragma unroll 4
    for (PixelWalk at(pixels, first(), a.step); at.p < pixels.count; at.next()) {
      A value[V], g[V];
      load<V>(in.x.at(pixels.n, pixels.y0 + at.y, pixels.x0 + at.x) + ch, value);
      load<V>(gs + at.p * a.node.cm + ch, g);
#pragma unroll
      for (int i = 0; i < V; i++) add_compensated(g[i] * value[i], sum[i], lost[i]);
    }
    add_up(sum, row(task.row));
  }
  __device__ void sum_gradient(const Task& task) const {
    A sum[V] = {};
    for (int p = first(); p < pixels.count; p += a.step) {
      A g[V];
      load<V>(gs + p * a.node.cm + ch, g);
#pragma unroll
      for (int i = 0; i < V; i++) sum[i] += g[i];
    }
    add_up(sum, row(task.row));
  }
  __device__ void run(const Task& task) const {
    switch (task.role) {
      case Role::Pools: return sum_pools(task);
      case Role::Bypass:
        if constexpr (K > 1) sum_bypass(task);
        return;
      case Role::Stream: return sum_stream(task);
      case Role::Identity: return sum_identity(task);
      case Role::Gradient: return sum_gradient(task);
    }
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
      load_by<V == 1 ? 1 : K * V>(a.g.at(pixels.n, pixels.y0 + at.y, pixels.x0 + at.x) + c * K, g);
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
  int cm = node.cm, lane = threadIdx.x % 32;
  double* sums = reinterpret_cast<double*>(shared);
  Acc<T>* gs = reinterpret_cast<Acc<T>*>(shared + a.sums_bytes());
  Acc<T>* means = gs + a.tiling.th * a.tiling.tw * cm;
  int* next = reinterpret_cast<int*>(means + node.incoming * 2 * cm);
  NodePixels pixels(a.tiling, node.oh, node.ow);
  if (threadIdx.x == 0) *next = 0;
  for (int i = threadIdx.x; i < node.incoming * 2 * cm; i += kThreads) {
    int row = i / cm, norm = node.term[node.streams + row / 2 * 3 + row % 2].norm;
    means[i] = norm < 0 ? Acc<T>(0) : node.norms.mean(norm, i % cm);
  }
  load_gradient<T, K, V>(a, pixels, gs);
  __syncthreads();
  for (;;) {
    int number = lane == 0 ? atomicAdd(next, 1) : 0;
    number = __shfl_sync(0xffffffffu, number, 0);
    int tasks = tasks_of(a), c0 = number / tasks * 32 * V;
    if (c0 >= cm) break;
    LanePixels<T, K, V>{a, pixels, sums, gs, means, c0}.run(task_of(a, number % tasks));
  }
  __syncthreads();
  for (int i = threadIdx.x; i < node.incoming * 2 * cm; i += kThreads) {
    int edge = i / (2 * cm), at = i % (2 * cm);
    const auto& in = node.in[edge];
    if (!in.max && !in.avg) continue;
    double total = 0;
    for (int part = 0; part < a.parts; part++) total += sums[(edge * a.parts + part) * 2 * cm + at];
    a.partial[(int64_t(node.streams + 3 * edge + at / cm) * gridDim.x + blockIdx.x) * cm + at % cm] = total;
  }
}

}  // namespace rfdarts::cuda
