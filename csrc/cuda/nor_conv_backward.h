// The gradient of a state of NAS-Bench-201 from all edges that leave it: their convolutions, average pools without
// BatchNorm and identities, and from outside.
//
//   1 load      grads  of a branch, the gradient at the outputs that the tile depends on
//   2 multiply  sums   += grads times the transposed convolution
//   3 average   grads  of all average pools together, divided by the windows' sizes
//   4 write     grad_x from sums, behind the ReLU, and what is linear
//
// Barriers: before 1 and 3, until nobody multiplies the branch before; after them, until grads is complete. A sum is
// always the same thread's, until 4.
#pragma once
#include "cuda/nor_conv_product.h"
#include "cuda/state_backward.h"

namespace rfdarts::cuda {

template <class T>
struct NorConvBackward : StateBackward<T> {
  const T* factors;  // on tensor cores, of the transposed convolutions
  int reach;
  bool averages;
};

// grads, then sums Acc<T> [pixels][ld]; offset in bytes.
template <class T, bool TensorCores>
struct NorConvBackwardTile : NorConvTile<T, TensorCores> {
  int sums, bytes;

  __host__ __device__ NorConvBackwardTile(const Tiling& t, int c, int reach)
      : NorConvTile<T, TensorCores>(t, c, reach) {
    sums = NorConvTile<T, TensorCores>::bytes();
    bytes = sums + this->pixels * this->ld * int(sizeof(Acc<T>));
  }
};

template <class T, bool TensorCores>
struct NorConvBackwardBlock {
  using A = Acc<T>;
  using Tile = NorConvBackwardTile<T, TensorCores>;
  using Factor = typename Tile::Factor;
  const NorConvBackward<T>& a;
  unsigned char* shared;

  Tile tile{a.tiling, a.c, a.reach};
  Factor* grads = reinterpret_cast<Factor*>(shared);
  A* sums = reinterpret_cast<A*>(shared + tile.sums);
  Corner corner = a.tiling.corner(blockIdx.x);

  __device__ A term_weight(int op, int edge) const {
    return a.edge_weights ? a.op_weights[op] * a.edge_weights[edge] : a.op_weights[op];
  }
  // grads = f(y, x, channel, values) for the tile and `reach` pixels around, 0 outside the image
  template <int V, class F>
  __device__ void fill(const Lanes<V>& lane, int reach, F&& f) const {
    int across = tile.tw + 2 * reach;
    for (int p = lane.pixel; p < (tile.th + 2 * reach) * across; p += lane.step) {
      int row = p / across - reach, column = p % across - reach, y = corner.y + row, x = corner.x + column;
      A v[V] = {};
      if (unsigned(y) < unsigned(a.h) && unsigned(x) < unsigned(a.w)) f(y, x, v);
      store<V>(grads + tile.at(row, column) + lane.channel, v);
    }
  }
  template <int V>
  __device__ void load_gradient(const BackwardBranch<T>& branch) const {
    Lanes<V> lane(a.c);
    NormBackward<A, V> backward(branch.coefficients + lane.channel, a.c);
    const T* outputs = branch.y + corner.n * a.image + lane.channel;
    fill<V>(lane, branch.kernel / 2, [&](int y, int x, A(&v)[V]) {
      A output[V];
      load<V>(branch.g.at(corner.n, y, x) + lane.channel, v);
      load<V>(outputs + (int64_t(y) * a.w + x) * a.c, output);
#pragma unroll
      for (int i = 0; i < V; i++) v[i] = backward(i, v[i], output[i]);
    });
  }
  template <int V>
  __device__ void load_averages() const {
    Lanes<V> lane(a.c);
    fill<V>(lane, 1, [&](int y, int x, A(&v)[V]) {
      add_gradients<V>(&StateBackward<T>::Leaving::average_op, y, x, lane.channel, v);
      A size = A(window(y, a.h) * window(x, a.w));
#pragma unroll
      for (int i = 0; i < V; i++) v[i] /= size;
    });
  }
  // sum += the gradients at the edges' nodes, each times the weight of the edge's term `op`
  template <int V>
  __device__ void add_gradients(int StateBackward<T>::Leaving::*op, int y, int x, int channel, A (&sum)[V]) const {
    for (int e = 0; e < a.leaving; e++) {
      const auto& edge = a.edge[e];
      if (edge.*op < 0) continue;
      A weight = term_weight(edge.*op, edge.edge), g[V];
      load<V>(edge.g.at(corner.n, y, x) + channel, g);
#pragma unroll
      for (int i = 0; i < V; i++) sum[i] += weight * g[i];
    }
  }
  __device__ void multiply(const BackwardBranch<T>& branch, bool first) const {
    NorConvProduct<T, TensorCores>{tile}.run(
        grads, matrices_of<T, TensorCores>(a.conv_weights, a.factors, branch.weight, branch.kernel, a.c, true),
        branch.kernel,
        [&]<int N>(int p, int o, A(&v)[N]) {
          if (!first) return load<N>(sums + p * tile.ld + o, v);
#pragma unroll
          for (int i = 0; i < N; i++) v[i] = 0;
        },
        [&]<int N>(int p, int o, const A(&v)[N]) { store<N>(sums + p * tile.ld + o, v); });
  }
  template <int V>
  __device__ void write() const {
    Lanes<V> lane(a.c);
    int ch = lane.channel, n = corner.n;
    for (int p = lane.pixel; p < tile.pixels; p += lane.step) {
      int row = p / tile.tw, column = p % tile.tw, y = corner.y + row, x = corner.x + column;
      if (y >= a.h || x >= a.w) continue;
      A sum[V] = {}, value[V];
      if (a.branches) {
        load<V>(sums + p * tile.ld + ch, sum);
        load<V>(a.x.at(n, y, x) + ch, value);
        // the convolutions' ReLU
#pragma unroll
        for (int i = 0; i < V; i++) sum[i] = value[i] <= A(0) ? A(0) : sum[i];
      }
      if (a.averages)
#pragma unroll 1
        for (int k = 0; k < 9; k++) {
          load<V>(grads + tile.at(row + k / 3 - 1, column + k % 3 - 1) + ch, value);
#pragma unroll
          for (int i = 0; i < V; i++) sum[i] += value[i];
        }
      add_gradients<V>(&StateBackward<T>::Leaving::identity_op, y, x, ch, sum);
      if (a.outer.data) {
        load<V>(a.outer.at(n, y, x) + ch, value);
#pragma unroll
        for (int i = 0; i < V; i++) sum[i] += value[i];
      }
      store<V>(a.grad_x + ((int64_t(n) * a.h + y) * a.w + x) * a.channels + ch, sum);
    }
  }
};

// One block per tile of the state.
template <class T, bool TensorCores>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    nor_conv_backward_kernel(const __grid_constant__ NorConvBackward<T> a) {
  RFDARTS_SHARED(shared);
  NorConvBackwardBlock<T, TensorCores> block{a, shared};
  for (int b = 0; b < a.branches; b++) {
    if (b) __syncthreads();
    with_width<T>(a.wide, [&]<int V>() { block.template load_gradient<V>(a.branch[b]); });
    __syncthreads();
    block.multiply(a.branch[b], b == 0);
  }
  __syncthreads();
  if (a.averages) {
    with_width<T>(a.wide, [&]<int V>() { block.template load_averages<V>(); });
    __syncthreads();
  }
  with_width<T>(a.wide, [&]<int V>() { block.template write<V>(); });
}

}  // namespace rfdarts::cuda
