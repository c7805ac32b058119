// The sums that all gradients of a node follow from, and these gradients.
//
// A block takes `chunk` pixels. g of the mixed channels is in shared memory; each warp takes one task at a time, and of
// it 32 lanes x V channels: lanes are neighbours in channels first, then in pixels. What a block sums is a row of
// partial [rows][blocks][cm]:
//
//     g, shared           task              sums over the pixels             its rows
//      cm channels
//     +-----------+       stream s          g (y - mean)                     s
//     | chunk     |   x   edge j            g (y - mean) of both pools,      streams + 3 j, + 1, + 2
//     |    pixels |                         g x of the identity
//     |           |       gradient          g                                node.rows()
//     +-----------+       bypass j, K > 1   g x over the other channels      node.rows() + 1 + j
#pragma once
#include "cuda/node.h"

namespace rfdarts::cuda {

template <class T>
struct NodeBackward {
  Node<T> node;
  ImageView<T> g;   // [n][oh][ow][K cm]
  T* mixed_g;       // the mixed op's channels of g, dense [n][oh][ow][cm], where not null
  double* partial;  // [rows + 1 + incoming][blocks][cm]
  int K, chunk;
};

// sum += value, what rounding loses being kept in `lost`: for long sums whose terms are not centred
template <class A>
__device__ __forceinline__ void add_compensated(A value, A& sum, A& lost) {
  A term = value - lost, next = sum + term;
  lost = next - sum - term;
  sum = next;
}

// What a warp sums: of stream or incoming edge `index`, into rows from `row` on.
enum class Role { Stream, Edge, Gradient, Bypass };
struct Task {
  Role role;
  int index, row;
};
template <class T>
__device__ Task task_of(const Node<T>& node, int number) {
  int edge = number - node.streams, bypass = edge - node.incoming - 1;
  if (edge < 0) return {Role::Stream, number, number};
  if (edge < node.incoming) return {Role::Edge, edge, node.streams + 3 * edge};
  if (bypass < 0) return {Role::Gradient, 0, node.rows()};
  return {Role::Bypass, bypass, node.rows() + 1 + bypass};
}

// A lane's V channels of the block's pixels.
template <class T, int V>
struct LanePixels {
  using A = Acc<T>;
  const NodeBackward<T>& a;
  const A* gs;
  int64_t begin;
  int count, c0;
  int lane = threadIdx.x % 32, lanes = min(32, (a.node.cm - c0) / V), step = 32 / lanes, ch = c0 + lane % lanes * V;

  // f(n, y, x, g) for every pixel of the lane
  template <class F>
  __device__ __forceinline__ void each(F&& f) const {
    int64_t pixels = int64_t(a.node.oh) * a.node.ow;
    // lanes that are left over have no pixel
    for (int p = lane < step * lanes ? lane / lanes : count; p < count; p += step) {
      int64_t pixel = begin + p;
      int at = int(pixel % pixels);
      A g[V];
      load<V>(gs + p * a.node.cm + ch, g);
      f(int(pixel / pixels), at / a.node.ow, at % a.node.ow, g);
    }
  }
  __device__ __forceinline__ void mean(int norm, A (&mean)[V]) const {
#pragma unroll
    for (int i = 0; i < V; i++) mean[i] = norm < 0 ? A(0) : a.node.norms.mean(norm, ch + i);
  }
  // partial[row] = the sum over the lanes that share channels
  __device__ __forceinline__ void store_row(int row, const A (&sum)[V]) const {
#pragma unroll
    for (int i = 0; i < V; i++) {
      double total = double(sum[i]);
      for (int s = 1; s < step; s++)
        total += double(__shfl_sync(0xffffffffu, sum[i], (lane % lanes + s * lanes) & 31));
      if (lane < lanes) a.partial[(int64_t(row) * gridDim.x + blockIdx.x) * a.node.cm + ch + i] = total;
    }
  }

  __device__ void sum_stream(const Task& task) const {
    const auto& stream = a.node.stream[task.index];
    A sum[V] = {}, mean[V];
    this->mean(a.node.term[task.row].norm, mean);
    each([&](int n, int y, int x, const A(&g)[V]) {
      A value[V];
      load<V>(stream.data + n * stream.image + (int64_t(y) * a.node.ow + x) * a.node.cm + ch, value);
#pragma unroll
      for (int i = 0; i < V; i++) sum[i] += g[i] * (value[i] - mean[i]);
    });
    store_row(task.row, sum);
  }
  __device__ void sum_edge(const Task& task) const {
    const auto& in = a.node.in[task.index];
    A sum_max[V] = {}, sum_avg[V] = {}, sum_identity[V] = {}, lost[V] = {}, mean_max[V], mean_avg[V];
    mean(a.node.term[task.row].norm, mean_max);
    mean(a.node.term[task.row + 1].norm, mean_avg);
    each([&](int n, int y, int x, const A(&g)[V]) {
      if (in.max || in.avg) {
        Pooled<T, V> pooled;
        pool_at<T, V>(in, n, y, x, ch, pooled);
#pragma unroll
        for (int i = 0; i < V; i++) sum_max[i] += g[i] * (pooled.max[i] - mean_max[i]);
#pragma unroll
        for (int i = 0; i < V; i++) sum_avg[i] += g[i] * (pooled.avg[i] - mean_avg[i]);
      }
      if (in.identity) {
        A value[V];
        load<V>(in.x.at(n, y, x) + ch, value);
#pragma unroll
        for (int i = 0; i < V; i++) add_compensated(g[i] * value[i], sum_identity[i], lost[i]);
      }
    });
    store_row(task.row, sum_max);
    store_row(task.row + 1, sum_avg);
    store_row(task.row + 2, sum_identity);
  }
  __device__ void sum_gradient(const Task& task) const {
    A sum[V] = {};
    each([&](int, int, int, const A(&g)[V]) {
#pragma unroll
      for (int i = 0; i < V; i++) sum[i] += g[i];
    });
    store_row(task.row, sum);
  }
  __device__ void sum_bypass(const Task& task) const {
    const auto& in = a.node.in[task.index];
    A sum[V] = {}, lost[V] = {};
    each([&](int n, int y, int x, const A(&)[V]) {
      const T *g = a.g.at(n, y, x) + ch * a.K, *from = in.x.at(n, y * in.stride, x * in.stride) + ch;
#pragma unroll 1
      for (int k = 1; k < a.K; k++) {
        A value[V];
        bypass_at<T, V>(in.x, in.stride, from + k * a.node.cm, value);
#pragma unroll
        for (int i = 0; i < V; i++) add_compensated(widen(g[i * a.K + k]) * value[i], sum[i], lost[i]);
      }
    });
    store_row(task.row, sum);
  }
  __device__ void run(const Task& task) const {
    switch (task.role) {
      case Role::Stream: return sum_stream(task);
      case Role::Edge: return sum_edge(task);
      case Role::Gradient: return sum_gradient(task);
      case Role::Bypass: return sum_bypass(task);
    }
  }
};

template <class T, int V>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    node_backward_kernel(const __grid_constant__ NodeBackward<T> a) {
  RFDARTS_SHARED(shared);
  const Node<T>& node = a.node;
  Acc<T>* gs = reinterpret_cast<Acc<T>*>(shared);
  int cm = node.cm;
  int64_t pixels = int64_t(node.oh) * node.ow, begin = int64_t(blockIdx.x) * a.chunk;
  int count = int(min(node.images * pixels - begin, int64_t(a.chunk)));
  for (int i = threadIdx.x; i < count * cm; i += kThreads) {
    int64_t pixel = begin + i / cm;
    int n = int(pixel / pixels), p = int(pixel % pixels);
    T value = a.g.at(n, p / node.ow, p % node.ow)[i % cm * a.K];
    gs[i] = widen(value);
    if (a.mixed_g) a.mixed_g[begin * cm + i] = value;
  }
  __syncthreads();
  int tasks = node.streams + node.incoming + 1 + (a.K > 1 ? node.incoming : 0);
  for (int number = threadIdx.x / 32; number < tasks; number += kThreads / 32)
    for (int c0 = 0; c0 < cm; c0 += 32 * V) LanePixels<T, V>{a, gs, begin, count, c0}.run(task_of(node, number));
}

// From a node's sums: gradients of gamma, beta, op weights and edge weights, and the coefficients of NormBackward.
template <class T>
struct NodeGradients {
  Node<T> node;
  NormOutputs<T> outputs;
  const double* partial;
  int blocks, K;
  Acc<T>*grad_op_weights, *grad_edge_weights;  // grad_edge_weights: or null
};

// The sum of a row over all pixels and channels, in thread 0: of g x, or, where the row has a BatchNorm, of g z.
// `weight` of the edge and the op weight `op` are what z is weighted with.
template <class T>
__device__ __forceinline__ double row_gradient(const NodeGradients<T>& a, int row, int norm, int op, double weight,
                                               double* room) {
  int c = a.node.cm, channels = min(c, kThreads);
  auto owns = [&](int c0) { return int(threadIdx.x) < channels && c0 + int(threadIdx.x) < c; };
  auto sum = [&](int row, int ch) {
    return sum_partials(a.partial + int64_t(row) * a.blocks * c, a.blocks, c, ch, channels, room);
  };
  double gradient = 0;
  for (int c0 = 0; c0 < c; c0 += channels) {
    int ch = min(c0 + int(threadIdx.x) % channels, c - 1);
    double dot = sum(row, ch), value = dot;
    if (norm >= 0) {
      double sum_g = sum(a.node.rows(), ch);
      if (owns(c0)) value = a.outputs.write(norm, ch, weight * double(a.node.op_weights[op]), sum_g, dot);
    }
    __syncthreads();
    room[threadIdx.x] = owns(c0) ? value : 0;
    __syncthreads();
    if (threadIdx.x == 0)
      for (int i = 0; i < channels; i++) gradient += room[i];
  }
  return gradient;
}

// One block per incoming edge.
template <class T>
__global__ void __launch_bounds__(kThreads, 4) node_gradients_kernel(const __grid_constant__ NodeGradients<T> a) {
  RFDARTS_SHARED(shared);
  double* room = reinterpret_cast<double*>(shared);
  const Node<T>& node = a.node;
  int edge = node.in[blockIdx.x].edge;
  double edge_weight = double(node.edge_weight(edge)), edge_gradient = 0;
  for (int row = 0; row < node.rows(); row++) {
    const auto& term = node.term[row];
    if (term.edge != edge || term.op < 0) continue;
    double gradient = row_gradient(a, row, term.norm, term.op, edge_weight, room);
    if (threadIdx.x == 0) a.grad_op_weights[term.op] = Acc<T>(edge_weight * gradient);
    edge_gradient += double(node.op_weights[term.op]) * gradient;
  }
  if (!a.grad_edge_weights) return;
  if (a.K > 1) edge_gradient += row_gradient(a, node.rows() + 1 + int(blockIdx.x), -1, -1, 1, room);
  if (threadIdx.x == 0) a.grad_edge_weights[edge] = Acc<T>(edge_gradient);
}

}  // namespace rfdarts::cuda
