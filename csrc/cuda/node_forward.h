// A node: the sum of its incoming edges.
#pragma once
#include "cuda/node.h"

namespace rfdarts::cuda {

// rows of outputs of a thread
constexpr int kNodeRows = 2;
// Blocks of a multiprocessor that must have enough registers: the more, the more loads are under way. bfloat16 is
// unpacked in place; all others take more.
template <class T, int K>
constexpr int kForwardBlocks = sizeof(T) == 2 ? (K == 8 ? 2 : 3) : sizeof(T) == 4 && K < 8 ? 2 : 1;
template <int K>
constexpr int kForwardBlocks<__nv_bfloat16, K> = K == 8 ? 2 : 4;
// Enough for any device; as every block prepares the terms, each takes several rounds of a larger node.
constexpr int64_t kMaxNodeBlocks = 2048;

template <class T>
struct NodeForward {
  Node<T> node;
  ImageView<T> out;
};

// A term is weight z = scale (y - mean) + weight beta: scales and means [rows][cm], and the sum of the constants [cm].
// What is centred before it is summed cancels least. All threads meet twice, and must once more.
template <class T>
__device__ void prepare_terms(const Node<T>& node, Acc<T>* scales, Acc<T>* constants, Acc<T>* means) {
  using A = Acc<T>;
  int cm = node.cm, rows = node.rows();
  // loads of all terms wait together; the constants are in the means' place until they are summed up
  for (int i = threadIdx.x; i < rows * cm; i += kThreads) {
    const auto& term = node.term[i / cm];
    bool norm = term.op >= 0 && term.norm >= 0;
    A weight = term.op < 0 ? A(0) : node.term_weight(term);
    scales[i] = norm ? weight * node.norms.scale(term.norm, i % cm) : weight;
    means[i] = norm ? weight * node.norms.beta[term.norm * cm + i % cm] : A(0);
  }
  __syncthreads();
  for (int ch = threadIdx.x; ch < cm; ch += kThreads) {
    A sum = 0;
#pragma unroll 4
    for (int row = 0; row < rows; row++) sum += means[row * cm + ch];
    constants[ch] = sum;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < rows * cm; i += kThreads) {
    int norm = node.term[i / cm].norm;
    means[i] = norm < 0 ? A(0) : node.norms.mean(norm, i % cm);
  }
}

// The sums of one thread: V channels of kNodeRows outputs below each other.
template <class T, int V>
struct NodeStrip {
  using A = Acc<T>;
  const Node<T>& node;
  const A *scales, *means;
  int n, y, x, ch;
  A sum[kNodeRows][V];

  // a row beyond the image is computed as the last one, and not stored
  __device__ int row(int r) const { return min(y + r, node.oh - 1); }
  __device__ __forceinline__ void add(int r, int term, const A (&value)[V]) {
    A scale[V], mean[V];
    load<V>(scales + term * node.cm + ch, scale);
    load<V>(means + term * node.cm + ch, mean);
#pragma unroll
    for (int i = 0; i < V; i++) sum[r][i] += scale[i] * (value[i] - mean[i]);
  }
  __device__ __forceinline__ void add_streams() {
    int at[kNodeRows];
#pragma unroll
    for (int r = 0; r < kNodeRows; r++) at[r] = (row(r) * node.ow + x) * node.cm + ch;
#pragma unroll 2
    for (int s = 0; s < node.streams; s++) {
      A value[kNodeRows][V];
      const T* from = node.stream[s].data + n * node.stream[s].image;
#pragma unroll
      for (int r = 0; r < kNodeRows; r++) load<V>(from + at[r], value[r]);
#pragma unroll
      for (int r = 0; r < kNodeRows; r++) add(r, s, value[r]);
    }
  }
  template <int S>
  __device__ __forceinline__ void add_pools(int j) {
    const auto& in = node.in[j];
    int term = node.streams + 3 * j;
    PoolColumn<T, V, S>(in.x, n, x, ch, in.h, in.w)
        .template walk<kNodeRows>(y, kNodeRows, [&](int r, const A(&max)[V], const A(&avg)[V]) {
          if (in.max) add(r, term, max);
          if (in.avg) add(r, term + 1, avg);
        });
  }
  __device__ __forceinline__ void add_edge(int j) {
    const auto& in = node.in[j];
    if (in.max || in.avg) in.stride == 1 ? add_pools<1>(j) : add_pools<2>(j);
    if (!in.identity) return;
    A value[kNodeRows][V];
#pragma unroll
    for (int r = 0; r < kNodeRows; r++) load<V>(in.x.at(n, row(r), x) + ch, value[r]);
#pragma unroll
    for (int r = 0; r < kNodeRows; r++) add(r, node.streams + 3 * j + 2, value[r]);
  }
};

// out channel c K + g: g = 0 the mixed op's channel c, g >= 1 the bypass's channel g C/K + c.
template <class T, int K, int V>
__global__ void __launch_bounds__(kThreads, kForwardBlocks<T, K>)
    node_forward_kernel(const __grid_constant__ NodeForward<T> a) {
  RFDARTS_SHARED(shared);
  using A = Acc<T>;
  const Node<T>& node = a.node;
  int cm = node.cm, rows = node.rows();
  A *scales = reinterpret_cast<A*>(shared), *constants = scales + rows * cm, *means = constants + cm;
  prepare_terms(node, scales, constants, means);
  __syncthreads();

  unsigned vectors = cm / V, wide = node.ow, strips = ceil_div(node.oh, kNodeRows);
  unsigned items = node.images * strips * wide * vectors;
  for (unsigned item = blockIdx.x * kThreads + threadIdx.x; item < items; item += gridDim.x * kThreads) {
    unsigned pixel = item / vectors, strip = pixel / wide, n = strip / strips;
    NodeStrip<T, V> at{node, scales, means, int(n), int(strip - n * strips) * kNodeRows, int(pixel - strip * wide),
                       int(item - pixel * vectors) * V, {}};
#pragma unroll
    for (int r = 0; r < kNodeRows; r++) load<V>(constants + at.ch, at.sum[r]);
    at.add_streams();
    for (int j = 0; j < node.incoming; j++) at.add_edge(j);
#pragma unroll
    for (int r = 0; r < kNodeRows; r++) {
      int y = at.y + r;
      if (y >= node.oh) break;
      A sum[K][V] = {};
#pragma unroll
      for (int i = 0; i < V; i++) sum[0][i] = at.sum[r][i];
      if constexpr (K > 1)
        for (int j = 0; j < node.incoming; j++) {
          const auto& in = node.in[j];
          A weight = node.edge_weight(in.edge), value[K][V];
          const T* from = in.x.at(at.n, y * in.stride, at.x * in.stride) + at.ch;
#pragma unroll
          for (int g = 1; g < K; g++) bypass_at<T, V>(in.x, in.stride, from + g * cm, value[g]);
#pragma unroll
          for (int g = 1; g < K; g++)
#pragma unroll
            for (int i = 0; i < V; i++) sum[g][i] += weight * value[g][i];
        }
      A shuffled[K * V];
#pragma unroll
      for (int i = 0; i < K * V; i++) shuffled[i] = sum[i % K][i / K];
      T* to = const_cast<T*>(a.out.at(at.n, y, at.x)) + at.ch * K;
      constexpr int width = V == 1 ? 1 : K * V;
#pragma unroll
      for (int i = 0; i < K * V; i += width) {
        A part[width];
#pragma unroll
        for (int k = 0; k < width; k++) part[k] = shuffled[i + k];
        store<width>(to + i, part);
      }
    }
  }
}

}  // namespace rfdarts::cuda
