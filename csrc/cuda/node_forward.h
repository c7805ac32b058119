// A node: the sum of its incoming edges.
#pragma once
#include "cuda/node.h"

namespace rfdarts::cuda {

template <class T>
struct NodeForward {
  Node<T> node;
  ImageView<T> out;
};

// A term is weight z = scale (y - mean) + weight beta: scales and means [rows][cm], and the sum of the constants [cm].
// What is centred before it is summed cancels least.
template <class T>
__device__ void prepare_terms(const Node<T>& node, Acc<T>* scales, Acc<T>* constants, Acc<T>* means) {
  using A = Acc<T>;
  int cm = node.cm, rows = node.rows();
  for (int i = threadIdx.x; i < rows * cm; i += kThreads) {
    const auto& term = node.term[i / cm];
    A weight = term.op < 0 ? A(0) : node.term_weight(term);
    scales[i] = term.norm < 0 ? weight : weight * node.norms.scale(term.norm, i % cm);
    means[i] = term.norm < 0 ? A(0) : node.norms.mean(term.norm, i % cm);
  }
  for (int ch = threadIdx.x; ch < cm; ch += kThreads) {
    A sum = 0;
    for (int row = 0; row < rows; row++) {
      const auto& term = node.term[row];
      if (term.op >= 0 && term.norm >= 0) sum += node.term_weight(term) * node.norms.beta[term.norm * cm + ch];
    }
    constants[ch] = sum;
  }
}

// out channel c K + g: g = 0 the mixed op's channel c, g >= 1 the bypass's channel g C/K + c.
template <class T, int K, int V>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    node_forward_kernel(const __grid_constant__ NodeForward<T> a) {
  RFDARTS_SHARED(shared);
  using A = Acc<T>;
  const Node<T>& node = a.node;
  int cm = node.cm, rows = node.rows();
  A *scales = reinterpret_cast<A*>(shared), *constants = scales + rows * cm, *means = constants + cm;
  prepare_terms(node, scales, constants, means);
  __syncthreads();

  int vectors = cm / V;
  int64_t pixels = int64_t(node.oh) * node.ow, items = node.images * pixels * vectors;
  int64_t first = int64_t(blockIdx.x) * kThreads + threadIdx.x, apart = int64_t(gridDim.x) * kThreads;
  for (int64_t item = first; item < items; item += apart) {
    int ch = int(item % vectors) * V;
    int64_t pixel = item / vectors;
    int n = int(pixel / pixels), y = int(pixel % pixels) / node.ow, x = int(pixel % pixels) % node.ow;
    A sum[K][V] = {};
    auto add = [&](int row, const A(&value)[V]) {
      A scale[V], mean[V];
      load<V>(scales + row * cm + ch, scale);
      load<V>(means + row * cm + ch, mean);
#pragma unroll
      for (int i = 0; i < V; i++) sum[0][i] += scale[i] * (value[i] - mean[i]);
    };
    load<V>(constants + ch, sum[0]);
    for (int s = 0; s < node.streams; s++) {
      A value[V];
      load<V>(node.stream[s].data + n * node.stream[s].image + (pixel % pixels) * cm + ch, value);
      add(s, value);
    }
    for (int j = 0; j < node.incoming; j++) {
      const auto& in = node.in[j];
      int row = node.streams + 3 * j;
      if (in.max || in.avg) {
        Pooled<T, V> pooled;
        pool_at<T, V>(in, n, y, x, ch, pooled);
        if (in.max) add(row, pooled.max);
        if (in.avg) add(row + 1, pooled.avg);
      }
      if (in.identity) {
        A value[V];
        load<V>(in.x.at(n, y, x) + ch, value);
        add(row + 2, value);
      }
      A weight = node.edge_weight(in.edge);
      const T* from = in.x.at(n, y * in.stride, x * in.stride) + ch;
#pragma unroll
      for (int g = 1; g < K; g++) {
        A value[V];
        bypass_at<T, V>(in.x, in.stride, from + g * cm, value);
#pragma unroll
        for (int i = 0; i < V; i++) sum[g][i] += weight * value[i];
      }
    }
    T* to = const_cast<T*>(a.out.at(n, y, x)) + ch * K;
#pragma unroll
    for (int k = 0; k < K; k++) {
      A shuffled[V];
#pragma unroll
      for (int i = 0; i < V; i++) shuffled[i] = sum[(k * V + i) % K][(k * V + i) / K];
      store<V>(to + k * V, shuffled);
    }
  }
}

}  // namespace rfdarts::cuda
