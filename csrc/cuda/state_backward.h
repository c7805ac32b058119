// The gradient of a state from all edges that leave it: their first convolutions, pools and identities.
#pragma once
#include "cuda/conv_backward.h"
#include "cuda/pool.h"

namespace rfdarts::cuda {

template <class T>
struct StateBackward : ConvBackward<T> {
  ImageView<T> x, outer;  // outer: gradient from outside the cell, or null
  T* grad_x;              // [images][h][w][channels]
  int channels;           // of the state; those beyond c are bypass_backward_kernel's
  const Acc<T>*op_weights, *edge_weights;
  const Acc<T>* coefficients;  // [norms][4][c] for NormBackward
  bool pools;
  int leaving;
  struct Leaving {
    ImageView<T> g;
    int edge, max_norm, avg_norm;
    int identity_op, average_op;  // places in op_weights; average: a pool without BatchNorm; all: -1: none
  } edge[kMaxIncoming];
  int branches;
  BackwardBranch<T> branch[kMaxBranches];
};

// The pools' part for one tile. Their input's statistics are shared, so the gradients of all edges add up before the
// pool's backward. Shared memory: xs, the input with two pixels around; grads [outputs][2] of the maxima and averages
// whose windows reach the tile; where, the maxima's places, 255 beyond the output.
template <class T, int S>
struct PoolsBackward {
  using A = Acc<T>;
  const StateBackward<T>& a;
  Corner corner;
  int d0, count;
  A *xs, *grads;
  uint8_t* where;
  // the first of these outputs, and how many they are
  __device__ int oy() const { return S == 1 ? corner.y - 1 : corner.y / 2; }
  __device__ int ox() const { return S == 1 ? corner.x - 1 : corner.x / 2; }
  __device__ int high() const { return S == 1 ? a.tiling.th + 2 : a.tiling.th / 2 + 1; }
  __device__ int wide() const { return S == 1 ? a.tiling.tw + 2 : a.tiling.tw / 2 + 1; }

  // loops are left rolled: unrolled ones spill registers
  __device__ void load_input() const {
    int rows = a.tiling.th + 4, columns = a.tiling.tw + 4;
#pragma unroll 1
    for (int i = threadIdx.x; i < rows * columns * count; i += kThreads) {
      int ch = i % count, p = i / count, y = corner.y - 2 + p / columns, x = corner.x - 2 + p % columns;
      bool inside = unsigned(y) < unsigned(a.h) && unsigned(x) < unsigned(a.w);
      xs[i] = inside ? widen(a.x.at(corner.n, y, x)[d0 + ch]) : A(0);
    }
  }
  __device__ A norm_backward(int norm, int ch, A g, A y) const {
    return NormBackward<A, 1>(a.coefficients + int64_t(norm) * 4 * a.c + ch, a.c)(0, g, y);
  }
  __device__ void gradients_of_outputs() const {
    int columns = a.tiling.tw + 4, size = high() * wide() * count;
#pragma unroll 1
    for (int i = threadIdx.x; i < size; i += kThreads) {
      int ch = i % count, p = i / count, y = oy() + p / wide(), x = ox() + p % wide(), c = d0 + ch;
      A grad_max = 0, grad_avg = 0;
      Pooled<T, 1> pooled;
      pooled.where[0] = 255;
      if (unsigned(y) < unsigned(a.oh) && unsigned(x) < unsigned(a.ow)) {
        pooled.compute(y * S, x * S, a.h, a.w, [&](int v, int u, A(&value)[1]) {
          value[0] = xs[((v - corner.y + 2) * columns + u - corner.x + 2) * count + ch];
        });
        for (int e = 0; e < a.leaving; e++) {
          const auto& edge = a.edge[e];
          A g = widen(edge.g.at(corner.n, y, x)[c]);
          if (edge.max_norm >= 0) grad_max += norm_backward(edge.max_norm, c, g, pooled.max[0]);
          if (edge.avg_norm >= 0) grad_avg += norm_backward(edge.avg_norm, c, g, pooled.avg[0]);
        }
        grad_avg /= A(window(y * S, a.h) * window(x * S, a.w));
      }
      grads[2 * i] = grad_max;
      grads[2 * i + 1] = grad_avg;
      where[i] = uint8_t(pooled.where[0]);
    }
  }
  __device__ void spread(Strip<A>& strip) const {
    if (!strip.valid) return;
#pragma unroll
    for (int o = 0; o < kStrip; o++) {
      int y = corner.y + strip.y, x = corner.x + strip.x + o;
#pragma unroll 1
      for (int u = -1; u <= 1; u++)
        for (int v = -1; v <= 1; v++) {
          // the window around (y - u, x - v) holds this pixel in place (u, v)
          if (S == 2 && (((y - u) & 1) || ((x - v) & 1))) continue;
          int q = (y - u) / S - oy(), p = (x - v) / S - ox();
          if (y - u < 0 || x - v < 0 || q >= high() || p >= wide()) continue;
          int i = (q * wide() + p) * count + strip.channel;
          if (where[i] == 255) continue;
          strip.acc[o] += grads[2 * i + 1] + (where[i] == (u + 1) * 3 + v + 1 ? grads[2 * i] : A(0));
        }
    }
  }
  __device__ void add_to(Strip<A>& strip) const {
    // the convolutions' shared memory is used again
    __syncthreads();
    load_input();
    // xs is complete
    __syncthreads();
    gradients_of_outputs();
    // grads and where are complete
    __syncthreads();
    spread(strip);
  }
};

// One block per tile of the state.
template <class T, int S>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    state_backward_kernel(const __grid_constant__ StateBackward<T> a) {
  RFDARTS_SHARED(shared);
  using A = Acc<T>;
  const Tiling& t = a.tiling;
  BackwardTile<T> tile(t, a.region, a.pools);
  A *grad_ys = reinterpret_cast<A*>(shared), *grad_ds = reinterpret_cast<A*>(shared + tile.grad_ds);
  Corner corner = t.corner(blockIdx.x);
  for (int d0 = 0; d0 < a.c; d0 += t.ck) {
    int count = min(t.ck, a.c - d0);
    Strip<A> strip(t, count);
    for (int b = 0; b < a.branches; b++)
      BranchBackward<T, S>{a, a.branch[b], tile, corner, d0, count, grad_ys, grad_ds}.add_to(strip);
    int n = corner.n, ch = d0 + strip.channel, y = corner.y + strip.y, x0 = corner.x + strip.x;
    bool inside = strip.valid && y < a.h;
    // the convolutions' ReLU
    if (inside)
#pragma unroll
      for (int o = 0; o < kStrip; o++)
        if (x0 + o < a.w && widen(a.x.at(n, y, x0 + o)[ch]) <= A(0)) strip.acc[o] = 0;
    if (a.pools) PoolsBackward<T, S>{a, corner, d0, count, grad_ys, grad_ds, shared + tile.where}.add_to(strip);
    if (!inside) continue;
    for (int e = 0; e < a.leaving; e++) {
      const auto& edge = a.edge[e];
      if (edge.identity_op < 0) continue;
      A term_weight = a.op_weights[edge.identity_op];
      if (a.edge_weights) term_weight *= a.edge_weights[edge.edge];
#pragma unroll
      for (int o = 0; o < kStrip; o++)
        if (x0 + o < a.w) strip.acc[o] += term_weight * widen(edge.g.at(n, y, x0 + o)[ch]);
    }
#pragma unroll
    for (int o = 0; o < kStrip; o++) {
      int x = x0 + o;
      if (x >= a.w) break;
      if (a.outer.data) strip.acc[o] += widen(a.outer.at(n, y, x)[ch]);
      a.grad_x[((int64_t(n) * a.h + y) * a.w + x) * a.channels + ch] = narrow<T>(strip.acc[o]);
    }
  }
}

}  // namespace rfdarts::cuda
