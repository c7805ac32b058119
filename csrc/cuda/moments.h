// Means and variances of branch outputs: a block's part of them, and their merge.
#pragma once
#include "cuda/tile.h"

namespace rfdarts::cuda {

// Moments are taken about this: a value amidst one channel of the tile's valid part, so that squares do not cancel.
// Of 8 pixels spread over it, the mean of all but the extremes.
template <class T>
__device__ Acc<T> middle(const T* ys, int c, int tw, int vh, int vw) {
  Acc<T> sum = 0, low = 0, high = 0;
#pragma unroll
  for (int j = 0; j < 8; j++) {
    Acc<T> value = widen(ys[((2 * j + 1) * vh / 16 * tw + (6 * j + 1) % 16 * vw / 16) * c]);
    sum += value;
    low = j ? min(low, value) : value;
    high = j ? max(high, value) : value;
  }
  return (sum - low - high) / 6;
}

// Chan's merge of the tiles' moments, in a fixed order, for the BatchNorms that take them.
struct MergeMoments {
  Tiling tiling;
  int images, h, w, c, norms;
  const double* partial;  // [branches][2][tiles][c] mean and squared deviations
  double* moments;        // [2][norms][c]
  int count;
  struct Target {
    int16_t branch, norm;
  } target[2 * kMaxBranches];
};

// One block per target and kMergeChannels.
constexpr int kMergeChannels = 8;
template <int Channels>
__global__ void __launch_bounds__(kThreads) merge_moments_kernel(const __grid_constant__ MergeMoments a) {
  RFDARTS_SHARED(shared);
  double* room = reinterpret_cast<double*>(shared);
  constexpr int lanes = kThreads / Channels;
  int lane = threadIdx.x / Channels, k = threadIdx.x % Channels;
  int ch = min(int(blockIdx.y) * Channels + k, a.c - 1);
  auto target = a.target[blockIdx.x];
  const double* mean_of = a.partial + int64_t(target.branch) * 2 * a.tiling.count * a.c + ch;
  const double* deviation_of = mean_of + int64_t(a.tiling.count) * a.c;
  double m = double(a.images) * a.h * a.w, mean = 0;
  for (int pass = 0; pass < 2; pass++) {
    double sum = 0;
    for (int t = lane; t < a.tiling.count; t += lanes) {
      Corner corner = a.tiling.corner(t);
      double pixels = min(a.tiling.th, a.h - corner.y) * min(a.tiling.tw, a.w - corner.x);
      double tile = mean_of[int64_t(t) * a.c];
      sum += pass == 0 ? pixels * tile : deviation_of[int64_t(t) * a.c] + pixels * (tile - mean) * (tile - mean);
    }
    __syncthreads();
    room[threadIdx.x] = sum;
    __syncthreads();
    sum = 0;
    for (int l = 0; l < lanes; l++) sum += room[l * Channels + k];
    if (pass == 0) mean = sum / m;
    if (lane == 0) a.moments[(int64_t(pass) * a.norms + target.norm) * a.c + ch] = sum / m;
  }
}

}  // namespace rfdarts::cuda
