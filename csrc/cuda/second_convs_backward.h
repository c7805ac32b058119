// Backward of the second halves of separable convolutions, up to the output of the BatchNorm between the halves.
#pragma once
#include "cuda/conv_backward.h"

namespace rfdarts::cuda {

template <class T>
struct SecondConvsBackward : ConvBackward<T> {
  double* partial;  // [branches][2][tiles][c]: sum grad_z, sum grad_z (y - mean)
  int branches;
  struct Branch : BackwardBranch<T> {
    const T* inner_y;  // what the inner BatchNorm reads
    T* grad_z;         // the gradient at its output, which the ReLU has let through
    int inner_norm;
  } branch[kMaxBranches / 2];
};

// grad_z where z > 0, for a strip that begins at (y, x), and its sums for the inner BatchNorm
template <class T>
__device__ void store_masked(const SecondConvsBackward<T>& a, const typename SecondConvsBackward<T>::Branch& branch,
                             const Strip<Acc<T>>& strip, int n, int y, int x, int ch, Acc<T>& sum, Acc<T>& dot) {
  using A = Acc<T>;
  A scale = a.norms.scale(branch.inner_norm, ch), mean = a.norms.mean(branch.inner_norm, ch);
  A shift = a.norms.beta[branch.inner_norm * a.c + ch] - mean * scale;
#pragma unroll
  for (int o = 0; o < kStrip; o++) {
    if (x + o >= a.ow) break;
    int64_t i = n * a.image + (int64_t(y) * a.ow + x + o) * a.c + ch;
    A inner = widen(branch.inner_y[i]);
    T grad_z = narrow<T>(scale * inner + shift <= A(0) ? A(0) : strip.acc[o]);
    branch.grad_z[i] = grad_z;
    sum += widen(grad_z);
    dot += widen(grad_z) * (inner - mean);
  }
}

// One block per tile and branch.
template <class T>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    second_convs_backward_kernel(const __grid_constant__ SecondConvsBackward<T> a) {
  RFDARTS_SHARED(shared);
  using A = Acc<T>;
  const Tiling& t = a.tiling;
  BackwardTile<T> tile(t, a.region, false);
  A *grad_ys = reinterpret_cast<A*>(shared), *grad_ds = reinterpret_cast<A*>(shared + tile.grad_ds),
    *sums = reinterpret_cast<A*>(shared + tile.sums);
  Corner corner = t.corner(blockIdx.x);
  const auto& branch = a.branch[blockIdx.y];
  double* out = a.partial + int64_t(blockIdx.y) * 2 * t.count * a.c;
  for (int d0 = 0; d0 < a.c; d0 += t.ck) {
    int count = min(t.ck, a.c - d0);
    Strip<A> strip(t, count);
    BranchBackward<T, 1>{a, branch, tile, corner, d0, count, grad_ys, grad_ds}.add_to(strip);
    A sum = 0, dot = 0;
    int ch = d0 + strip.channel, y = corner.y + strip.y;
    if (strip.valid && y < a.oh) store_masked(a, branch, strip, corner.n, y, corner.x + strip.x, ch, sum, dot);
    sums[2 * threadIdx.x] = sum;
    sums[2 * threadIdx.x + 1] = dot;
    // all sums are there; nobody overwrites them before the next channels' first barrier
    __syncthreads();
    if (int(threadIdx.x) < count) {
      A total[2] = {};
      int strips = t.th * (t.tw / kStrip);
      for (int i = 0; i < strips; i++) {
        total[0] += sums[2 * (i * count + threadIdx.x)];
        total[1] += sums[2 * (i * count + threadIdx.x) + 1];
      }
      out[int64_t(blockIdx.x) * a.c + ch] = double(total[0]);
      out[(int64_t(t.count) + blockIdx.x) * a.c + ch] = double(total[1]);
    }
  }
}

}  // namespace rfdarts::cuda
