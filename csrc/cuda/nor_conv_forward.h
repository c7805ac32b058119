// The convolutions of NAS-Bench-201 that leave a state, from one load of its ReLU, and their statistics.
//
//   1 load      xs  relu(x), with its halo; for all branches
//   2 multiply  ys  a branch's outputs
//   3 store     y, and the tile's moments
//
// Barriers: before 2, until xs is complete and nobody stores the branch before; between 2 and 3.
#pragma once
#include "cuda/moments.h"
#include "cuda/nor_conv_product.h"

namespace rfdarts::cuda {

template <class T>
struct NorConvForward {
  Tiling tiling;
  int h, w, c, reach;
  int64_t image;    // of y
  bool wide;        // 16-byte loads and stores are aligned
  double* partial;  // [branches][2][tiles][c] mean and squared deviations, or null
  const Acc<T>* conv_weights;
  const T* factors;  // on tensor cores
  int branches;
  struct Branch {
    T* y;
    int64_t weight;
    int kernel, norm;  // norm: which BatchNorm reads y
  } branch[kMaxBranches];
  // A state and its branches, or one of them: a row of the grid.
  struct State {
    ImageView<T> x;
    int begin, end;
  } state[kMaxBranches];
};

// Offsets in bytes in a block's shared memory; xs comes first.
template <class T, bool TensorCores>
struct NorConvForwardTile : NorConvTile<T, TensorCores> {
  int ys, sums, bytes;

  __host__ __device__ NorConvForwardTile(const Tiling& t, int c, int reach) : NorConvTile<T, TensorCores>(t, c, reach) {
    ys = NorConvTile<T, TensorCores>::bytes();
    sums = round_up(ys + this->pixels * c * int(sizeof(T)), 16);
    bytes = sums + OutputTile<T>::room(c);
  }
};

// xs = relu(x), 0 outside the image
template <int V, class T, bool TensorCores>
__device__ void load_relu(const NorConvForward<T>& a, const NorConvTile<T, TensorCores>& tile, const ImageView<T>& x,
                          const Corner& corner, typename NorConvTile<T, TensorCores>::Factor* xs) {
  Lanes<V> lane(a.c);
  for (int p = lane.pixel; p < tile.rows * tile.columns; p += lane.step) {
    int row = p / tile.columns, y = corner.y - tile.reach + row;
    int column = p - row * tile.columns, x0 = corner.x - tile.reach + column;
    Acc<T> v[V] = {};
    if (unsigned(y) < unsigned(a.h) && unsigned(x0) < unsigned(a.w)) {
      load<V>(x.at(corner.n, y, x0) + lane.channel, v);
#pragma unroll
      for (int i = 0; i < V; i++) v[i] = relu(v[i]);
    }
    store<V>(xs + p * tile.ld + lane.channel, v);
  }
}

// Blocks: tiles x states, or x branches.
template <class T, bool TensorCores>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    nor_conv_forward_kernel(const __grid_constant__ NorConvForward<T> a) {
  RFDARTS_SHARED(shared);
  using A = Acc<T>;
  NorConvForwardTile<T, TensorCores> tile(a.tiling, a.c, a.reach);
  auto* xs = reinterpret_cast<typename NorConvTile<T, TensorCores>::Factor*>(shared);
  T* ys = reinterpret_cast<T*>(shared + tile.ys);
  Corner corner = a.tiling.corner(blockIdx.x);
  OutputTile<T> outputs{a.c, tile.tw, min(tile.th, a.h - corner.y), min(tile.tw, a.w - corner.x), ys,
                        reinterpret_cast<A*>(shared + tile.sums)};
  const auto& state = a.state[blockIdx.y];
  with_width<T>(a.wide, [&]<int V>() { load_relu<V, T, TensorCores>(a, tile, state.x, corner, xs); });
  for (int b = state.begin; b < state.end; b++) {
    const auto& branch = a.branch[b];
    // xs is complete, and nobody reads ys any more
    __syncthreads();
    NorConvProduct<T, TensorCores>{tile}.run(
        xs, matrices_of<T, TensorCores>(a.conv_weights, a.factors, branch.weight, branch.kernel, a.c, false),
        branch.kernel,
        [&](int, int, auto& sums) {
          for (A& sum : sums) sum = 0;
        },
        [&](int p, int o, const auto& sums) {
          if constexpr (TensorCores)
            store<2>(ys + p * a.c + o, sums);
          else
#pragma unroll
            for (int j = 0; j < 4; j++)
              if (o + j < a.c) ys[p * a.c + o + j] = narrow<T>(sums[j]);
        });
    // ys is complete
    __syncthreads();
    outputs.store(branch.y + corner.n * a.image, corner.y, corner.x, a.w, a.wide);
    if (a.partial) outputs.moments(a.partial + int64_t(b) * 2 * a.tiling.count * a.c, a.tiling.count);
  }
}

}  // namespace rfdarts::cuda
