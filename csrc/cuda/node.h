// A node: the sum of its incoming edges, and the sums that the gradients of everything in it follow from.
#pragma once
#include "cuda/tile.h"

namespace rfdarts::cuda {

template <class T, int V>
__device__ void pool_at(const typename Node<T>::Incoming& in, int n, int y, int x, int ch, Pooled<T, V>& pooled) {
  pooled.compute(y * in.stride, x * in.stride, in.h, in.w,
                 [&](int v, int u, Acc<T>(&value)[V]) { load<V>(in.x.at(n, v, u) + ch, value); });
}

// What bypasses a mixed op: x at its place in the input, or the 2x2 maximum from there on. A NaN wins.
template <class T, int V>
__device__ __forceinline__ void bypass_at(const typename Node<T>::Incoming& in, const T* x, Acc<T> (&value)[V]) {
  load<V>(x, value);
  if (in.stride == 1) return;
#pragma unroll
  for (int k = 1; k < 4; k++) {
    Acc<T> other[V];
    load<V>(x + k / 2 * in.x.row + k % 2 * in.x.pixel, other);
#pragma unroll
    for (int i = 0; i < V; i++)
      if (other[i] > value[i] || other[i] != other[i]) value[i] = other[i];
  }
}

// out channel c K + g: g = 0 the mixed op's channel c, g >= 1 the bypass's channel g C/K + c. Shared memory:
// [rows][cm] coefficients, [cm] a constant, [rows][cm] means: what is centred before it is summed cancels least.
template <class T, int K, int V>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    node_forward_kernel(const __grid_constant__ Node<T> a, Images<T> out) {
  RFDARTS_SHARED(shared);
  using A = Acc<T>;
  int cm = a.cm, rows = a.rows();
  A *coef = reinterpret_cast<A*>(shared), *constant = coef + rows * cm, *centre = constant + cm;
  auto term = [&](int row, int& norm, int& mix, int& edge) {
    if (row < a.streams) {
      norm = a.stream[row].norm, mix = a.stream[row].mix, edge = a.stream[row].edge;
    } else {
      const auto& in = a.in[(row - a.streams) / 3];
      int kind = (row - a.streams) % 3;
      norm = kind == 0 ? in.max_norm : kind == 1 ? in.avg_norm : -1;
      mix = kind == 0 ? in.max_mix : kind == 1 ? in.avg_mix : in.identity_mix;
      edge = in.edge;
    }
  };
  for (int i = threadIdx.x; i < rows * cm; i += kThreads) {
    int norm, mix, edge;
    term(i / cm, norm, mix, edge);
    A strength = mix < 0 ? A(0) : a.strength(mix, edge);
    coef[i] = norm < 0 ? strength : strength * a.norms.scale(norm, i % cm);
    centre[i] = norm < 0 ? A(0) : a.norms.centre(norm, i % cm);
  }
  for (int ch = threadIdx.x; ch < cm; ch += kThreads) {
    A sum = 0;
    for (int row = 0; row < rows; row++) {
      int norm, mix, edge;
      term(row, norm, mix, edge);
      if (mix >= 0 && norm >= 0) sum += a.strength(mix, edge) * a.norms.beta[norm * cm + ch];
    }
    constant[ch] = sum;
  }
  __syncthreads();

  int vectors = cm / V;
  int64_t pixels = int64_t(a.oh) * a.ow, items = a.images * pixels * vectors;
  int64_t first = int64_t(blockIdx.x) * kThreads + threadIdx.x, apart = int64_t(gridDim.x) * kThreads;
  for (int64_t item = first; item < items; item += apart) {
    int ch = int(item % vectors) * V;
    int64_t pixel = item / vectors;
    int n = int(pixel / pixels), y = int(pixel % pixels) / a.ow, x = int(pixel % pixels) % a.ow;
    A sum[K][V] = {};
    auto add = [&](int row, const A(&value)[V]) {
      A k[V], mean[V];
      load<V>(coef + row * cm + ch, k);
      load<V>(centre + row * cm + ch, mean);
#pragma unroll
      for (int i = 0; i < V; i++) sum[0][i] += k[i] * (value[i] - mean[i]);
    };
    load<V>(constant + ch, sum[0]);
    for (int s = 0; s < a.streams; s++) {
      const auto& stream = a.stream[s];
      A value[V];
      load<V>(stream.data + n * stream.image + (pixel % pixels) * cm + ch, value);
      add(s, value);
    }
    for (int j = 0; j < a.incoming; j++) {
      const auto& in = a.in[j];
      int row = a.streams + 3 * j;
      if (in.max_mix >= 0 || in.avg_mix >= 0) {
        Pooled<T, V> pooled;
        pool_at<T, V>(in, n, y, x, ch, pooled);
        if (in.max_mix >= 0) add(row, pooled.max);
        if (in.avg_mix >= 0) add(row + 1, pooled.avg);
      }
      if (in.identity_mix >= 0) {
        A value[V];
        load<V>(in.x.at(n, y, x) + ch, value);
        add(row + 2, value);
      }
      A weight = a.edge_weights ? a.edge_weights[in.edge] : A(1);
      const T* outer = in.x.at(n, y * in.stride, x * in.stride) + ch;
#pragma unroll
      for (int g = 1; g < K; g++) {
        A value[V];
        bypass_at<T, V>(in, outer + g * cm, value);
#pragma unroll
        for (int i = 0; i < V; i++) sum[g][i] += weight * value[i];
      }
    }
    T* to = const_cast<T*>(out.at(n, y, x)) + ch * K;
#pragma unroll
    for (int k = 0; k < K; k++) {
      A shuffled[V];
#pragma unroll
      for (int i = 0; i < V; i++) shuffled[i] = sum[(k * V + i) % K][(k * V + i) / K];
      store<V>(to + k * V, shuffled);
    }
  }
}

// B1: sums of g (value - mean) per row of the node and channel, then sum g and, for K > 1, sum g x of each edge's
// bypass. A block takes `chunk` pixels, a warp one stream or edge of them at a time.
template <class T>
struct NodeSums {
  Node<T> node;
  Images<T> g;       // [n][oh][ow][c]
  T* mixed_g;        // the mixed op's channels of g, dense [n][oh][ow][cm], where not null
  double* partial;   // [rows + 1 + incoming][blocks][cm]
  int K, chunk;
};

// sum += value, what rounding loses being kept in `lost`: for long sums whose terms are not centred
template <class A>
__device__ __forceinline__ void add_compensated(A value, A& sum, A& lost) {
  A term = value - lost, next = sum + term;
  lost = next - sum - term;
  sum = next;
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads, kResident<T>) node_backward_kernel(const __grid_constant__ NodeSums<T> a) {
  RFDARTS_SHARED(shared);
  using A = Acc<T>;
  const Node<T>& node = a.node;
  A* gs = reinterpret_cast<A*>(shared);
  int cm = node.cm, K = a.K, rows = node.rows();
  int64_t pixels = int64_t(node.oh) * node.ow, all = node.images * pixels, begin = int64_t(blockIdx.x) * a.chunk;
  int count = int(all - begin < a.chunk ? all - begin : a.chunk);
  for (int i = threadIdx.x; i < count * cm; i += kThreads) {
    int64_t pixel = begin + i / cm;
    int n = int(pixel / pixels), p = int(pixel % pixels);
    T value = a.g.at(n, p / node.ow, p % node.ow)[i % cm * K];
    gs[i] = widen(value);
    if (a.mixed_g) a.mixed_g[begin * cm + i] = value;
  }
  __syncthreads();

  int lane = threadIdx.x % 32, tasks = node.streams + node.incoming + 1 + (K > 1 ? node.incoming : 0);
  for (int task = threadIdx.x / 32; task < tasks; task += kThreads / 32) {
    int j = task - node.streams, bypass = j - node.incoming - 1;
    bool streams = j < 0, edges = j >= 0 && j < node.incoming;
    int row = streams ? task : edges ? node.streams + 3 * j : rows + 1 + bypass;
    for (int c0 = 0; c0 < cm; c0 += 32 * V) {
      int lanes = min(32, (cm - c0) / V), step = 32 / lanes, ch = c0 + lane % lanes * V;
      A sum[3][V] = {}, centre[2][V] = {}, lost[V] = {};
      int norms[2] = {streams ? node.stream[task].norm : edges ? node.in[j].max_norm : -1,
                      edges ? node.in[j].avg_norm : -1};
#pragma unroll
      for (int k = 0; k < 2; k++)
#pragma unroll
        for (int i = 0; i < V; i++) centre[k][i] = norms[k] < 0 ? A(0) : node.norms.centre(norms[k], ch + i);
      for (int p = lane < step * lanes ? lane / lanes : count; p < count; p += step) {
        int64_t pixel = begin + p;
        int n = int(pixel / pixels), at = int(pixel % pixels), y = at / node.ow, x = at % node.ow;
        A g[V], value[V];
        load<V>(gs + p * cm + ch, g);
        auto add = [&](int k, const A(&v)[V], const A(&mean)[V]) {
#pragma unroll
          for (int i = 0; i < V; i++) sum[k][i] += g[i] * (v[i] - mean[i]);
        };
        if (streams) {
          load<V>(node.stream[task].data + n * node.stream[task].image + int64_t(at) * cm + ch, value);
          add(0, value, centre[0]);
        } else if (edges) {
          const auto& in = node.in[j];
          if (in.max_mix >= 0 || in.avg_mix >= 0) {
            Pooled<T, V> pooled;
            pool_at<T, V>(in, n, y, x, ch, pooled);
            add(0, pooled.max, centre[0]);
            add(1, pooled.avg, centre[1]);
          }
          if (in.identity_mix >= 0) {
            load<V>(in.x.at(n, y, x) + ch, value);
#pragma unroll
            for (int i = 0; i < V; i++) add_compensated(g[i] * value[i], sum[2][i], lost[i]);
          }
        } else if (bypass < 0) {
#pragma unroll
          for (int i = 0; i < V; i++) sum[0][i] += g[i];
        } else {
          const auto& in = node.in[bypass];
          const T *outer = a.g.at(n, y, x) + ch * K, *from = in.x.at(n, y * in.stride, x * in.stride) + ch;
          for (int k = 1; k < K; k++) {
            bypass_at<T, V>(in, from + k * cm, value);
#pragma unroll
            for (int i = 0; i < V; i++)
              add_compensated(widen(outer[i * K + k]) * value[i], sum[0][i], lost[i]);
          }
        }
      }
      int first = bypass == -1 ? rows : row;
#pragma unroll
      for (int k = 0; k < 3; k++) {
        if (k > 0 && !edges) break;
#pragma unroll
        for (int i = 0; i < V; i++) {
          double total = double(sum[k][i]);
          for (int s = 1; s < step; s++)
            total += double(__shfl_sync(0xffffffffu, sum[k][i], (lane % lanes + s * lanes) & 31));
          if (lane < lanes) a.partial[(int64_t(first + k) * gridDim.x + blockIdx.x) * cm + ch + i] = total;
        }
      }
    }
  }
}

// From a node's sums: gradients of gamma, beta, alpha and edge weights, and the coefficients of BackBranch. One
// block per incoming edge. Formulas: BatchNorm's backward, with S0 = sum g and S1 = sum g xhat at its output.
template <class T>
struct NodeFinish {
  Node<T> node;
  const double* partial;
  int blocks, K;
  bool training;
  Acc<T>*grad_gamma, *grad_beta, *coef, *grad_mix, *grad_edge_weights;
};

// S0, S1 (about the mean, not yet divided by sigma) of one channel -> gradients and coefficients;
// returns gamma S1 + beta S0
template <class T>
__device__ double norm_gradient(const Norms<T>& norms, int norm, int ch, double strength, double s0, double dot,
                                double m, bool training, Acc<T>* grad_gamma, Acc<T>* grad_beta, Acc<T>* coef) {
  int at = norm * norms.c + ch;
  double rstd = 1 / sqrt(norms.var[at] + double(norms.eps)), gamma = double(norms.gamma[at]), s1 = dot * rstd;
  double scale = strength * gamma * rstd;
  grad_gamma[at] = Acc<T>(strength * s1);
  grad_beta[at] = Acc<T>(strength * s0);
  Acc<T>* k = coef + int64_t(norm) * 4 * norms.c + ch;
  k[0] = Acc<T>(scale);
  k[norms.c] = training ? Acc<T>(-scale * s1 * rstd / m) : Acc<T>(0);
  k[2 * norms.c] = norms.centre(norm, ch);
  k[3 * norms.c] = training ? Acc<T>(-scale * s0 / m) : Acc<T>(0);
  return gamma * s1 + double(norms.beta[at]) * s0;
}

// Threads are [parts][channels]: the sum over blocks of partial [blocks][c] of channel c0 + id % channels.
__device__ inline double sum_partials(const double* partial, int blocks, int c, int ch, int channels, double* room) {
  int parts = kThreads / channels, part = threadIdx.x / channels;
  double sum = 0;
  if (part < parts)
    for (int b = part; b < blocks; b += parts) sum += partial[int64_t(b) * c + ch];
  __syncthreads();
  room[threadIdx.x] = sum;
  __syncthreads();
  sum = 0;
  for (int p = 0; p < parts; p++) sum += room[p * channels + threadIdx.x % channels];
  return sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads) node_finish_kernel(const __grid_constant__ NodeFinish<T> a) {
  RFDARTS_SHARED(shared);
  double* room = reinterpret_cast<double*>(shared);
  const Node<T>& node = a.node;
  int j = blockIdx.x, edge = node.in[j].edge, c = node.cm, channels = min(c, kThreads), rows = node.rows();
  bool first = int(threadIdx.x) < channels;
  double m = double(node.images) * node.oh * node.ow, edge_gradient = 0;
  double weight = node.edge_weights ? double(node.edge_weights[edge]) : 1.0;
  auto row_at = [&](int row) { return a.partial + int64_t(row) * a.blocks * c; };
  // a row's gradient with respect to its weight, in thread 0
  auto row_gradient = [&](int row, int norm, double strength) {
    double gradient = 0;
    for (int c0 = 0; c0 < c; c0 += channels) {
      int ch = min(c0 + int(threadIdx.x) % channels, c - 1);
      double dot = sum_partials(row_at(row), a.blocks, c, ch, channels, room), value = dot;
      if (norm >= 0) {
        double s0 = sum_partials(row_at(rows), a.blocks, c, ch, channels, room);
        if (first && c0 + int(threadIdx.x) < c)
          value = norm_gradient<T>(node.norms, norm, ch, strength, s0, dot, m, a.training, a.grad_gamma, a.grad_beta,
                                   a.coef);
      }
      __syncthreads();
      room[threadIdx.x] = first && c0 + int(threadIdx.x) < c ? value : 0;
      __syncthreads();
      if (threadIdx.x == 0)
        for (int i = 0; i < channels; i++) gradient += room[i];
    }
    return gradient;
  };
  for (int row = 0; row < rows; row++) {
    int norm = -1, mix = -1;
    if (row < node.streams) {
      if (node.stream[row].edge != edge) continue;
      norm = node.stream[row].norm, mix = node.stream[row].mix;
    } else if ((row - node.streams) / 3 == j) {
      const auto& in = node.in[j];
      int kind = (row - node.streams) % 3;
      norm = kind == 0 ? in.max_norm : kind == 1 ? in.avg_norm : -1;
      mix = kind == 0 ? in.max_mix : kind == 1 ? in.avg_mix : in.identity_mix;
    }
    if (mix < 0) continue;
    double gradient = row_gradient(row, norm, weight * double(node.mix[mix]));
    if (threadIdx.x == 0) a.grad_mix[mix] = Acc<T>(weight * gradient);
    edge_gradient += double(node.mix[mix]) * gradient;
  }
  if (!a.grad_edge_weights) return;
  if (a.K > 1) edge_gradient += row_gradient(rows + 1 + j, -1, 1);
  if (threadIdx.x == 0) a.grad_edge_weights[edge] = Acc<T>(edge_gradient);
}

// BatchNorms of which nothing but the sums is needed, such as the inner ones of separable convolutions, from B2's
// sums. Blocks: branches x groups of `channels`.
template <class T>
struct InnerFinish {
  Norms<T> norms;
  const double* partial;  // [branches][2][blocks][c]
  int blocks, channels;   // channels: at most kThreads
  double m;
  bool training;
  Acc<T>*grad_gamma, *grad_beta, *coef;
  int norm[kMaxBranches / 2];
};

template <class T>
__global__ void __launch_bounds__(kThreads) inner_finish_kernel(const __grid_constant__ InnerFinish<T> a) {
  RFDARTS_SHARED(shared);
  double* room = reinterpret_cast<double*>(shared);
  int c = a.norms.c, c0 = int(blockIdx.y) * a.channels, ch = min(c0 + int(threadIdx.x) % a.channels, c - 1);
  const double* sums = a.partial + int64_t(blockIdx.x) * 2 * a.blocks * c;
  double s0 = sum_partials(sums, a.blocks, c, ch, a.channels, room);
  double dot = sum_partials(sums + int64_t(a.blocks) * c, a.blocks, c, ch, a.channels, room);
  if (int(threadIdx.x) < a.channels && c0 + int(threadIdx.x) < c)
    norm_gradient<T>(a.norms, a.norm[blockIdx.x], ch, 1, s0, dot, a.m, a.training, a.grad_gamma, a.grad_beta, a.coef);
}

// The channels that bypass: dx [h][w][full] from channel c on = sum over leaving edges of weight g, through the 2x2
// maximum where the stride is 2 (its first maximum takes all), + outer.
template <class T>
__global__ void __launch_bounds__(kThreads)
    bypass_backward_kernel(const __grid_constant__ StateBackward<T> a, int images, int stride) {
  using A = Acc<T>;
  int K = a.full / a.c, rest = a.full - a.c;
  int64_t pixels = int64_t(a.h) * a.w, items = images * pixels * rest;
  int64_t first = int64_t(blockIdx.x) * kThreads + threadIdx.x, apart = int64_t(gridDim.x) * kThreads;
  for (int64_t item = first; item < items; item += apart) {
    int ch = a.c + int(item % rest), group = ch / a.c, from = ch % a.c * K + group;
    int64_t pixel = item / rest;
    int n = int(pixel / pixels), y = int(pixel % pixels) / a.w, x = int(pixel % pixels) % a.w;
    bool takes = y / stride < a.oh && x / stride < a.ow;
    if (stride == 2 && takes) {
      int best = 0;
      A top = A(-INFINITY);
      for (int k = 0; k < 4; k++) {
        A value = widen(a.x.at(n, y / 2 * 2 + k / 2, x / 2 * 2 + k % 2)[ch]);
        if (value > top || value != value) top = value, best = k;
      }
      takes = best == y % 2 * 2 + x % 2;
    }
    A sum = a.outer.data ? widen(a.outer.at(n, y, x)[ch]) : A(0);
    if (takes)
      for (int e = 0; e < a.leaving; e++) {
        A weight = a.edge_weights ? a.edge_weights[a.edge[e].edge] : A(1);
        sum += weight * widen(a.edge[e].g.at(n, y / stride, x / stride)[from]);
      }
    a.dx[pixel * a.full + ch] = narrow<T>(sum);
  }
}

}  // namespace rfdarts::cuda
