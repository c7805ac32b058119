// Means and variances of branch outputs: a block's part of them, and their merge.
#pragma once
#include "cuda/batch_norm.h"
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

// A block's outputs in shared memory, ys [pixels][c] of a tile tw wide, and room for their statistics. vh x vw of them
// are valid.
template <class T>
struct OutputTile {
  using A = Acc<T>;
  int c, tw, vh, vw;
  const T* ys;
  A* sums;
  // what each channel's moments are taken about, behind the sums
  A* middles = sums + 2 * (kThreads > c ? kThreads : c);

  // bytes of sums and middles
  __host__ __device__ static int room(int c) {
    return (2 * (kThreads > c ? kThreads : c) + c) * int(sizeof(A));
  }
  // to row y0, column x0 of an image [.][w][c]
  __device__ void store(T* image, int y0, int x0, int w, bool wide) const {
    with_width<T>(wide, [&]<int V>() {
      int row = vw * c / V;
      for (int i = threadIdx.x; i < vh * row; i += kThreads) {
        int r = i / row, at = (i - r * row) * V;
        *reinterpret_cast<Pack<T, V>*>(image + (int64_t(y0 + r) * w + x0) * c + at) =
            *reinterpret_cast<const Pack<T, V>*>(ys + r * tw * c + at);
      }
    });
  }
  // partial [2][tiles][c] = mean and squared deviations of ys. All threads meet once.
  __device__ void moments(double* partial, int tiles) const {
    int groups = max(1, kThreads / c);
    // from a pixel to the one that comes `groups` later, without a division
    int down = groups / vw, across = groups - down * vw, ahead = (down * tw + across) * c;
    for (int i = threadIdx.x; i < groups * c; i += kThreads) {
      int p = i / c, ch = i - p * c, y = p / vw, x = p - y * vw;
      A about = middle(ys + ch, c, tw, vh, vw), sum = 0, square = 0;
      const T* from = ys + (y * tw + x) * c + ch;
      while (y < vh) {
        A off = widen(*from) - about;
        sum += off;
        square += off * off;
        x += across, y += down, from += ahead;
        if (x >= vw) x -= vw, y++, from += (tw - vw) * c;
      }
      if (i < c) middles[ch] = about;
      sums[2 * i] = sum;
      sums[2 * i + 1] = square;
    }
    __syncthreads();
    for (int ch = threadIdx.x; ch < c; ch += kThreads) {
      A sum = 0, square = 0;
      for (int g = 0; g < groups; g++) {
        sum += sums[2 * (g * c + ch)];
        square += sums[2 * (g * c + ch) + 1];
      }
      A mean = sum / A(vh * vw);
      partial[int64_t(blockIdx.x) * c + ch] = double(middles[ch] + mean);
      partial[(int64_t(tiles) + blockIdx.x) * c + ch] = double(square - sum * mean);
    }
  }
};

// Chan's merge of the tiles' moments, in a fixed order, for the BatchNorms that take them.
struct MergeMoments {
  Tiling tiling;
  int images, h, w, count;
  struct Target {
    const double* partial;  // [2][tiles][c] mean and squared deviations
    double* moments;        // of one BatchNorm of [2][norms][c]
    int c, norms;
  } target[2 * kMaxBranches];

  // valid pixels of a tile
  __device__ __forceinline__ int pixels(int tile) const {
    if (h % tiling.th == 0 && w % tiling.tw == 0) return tiling.th * tiling.tw;
    Corner corner = tiling.corner(tile);
    return min(tiling.th, h - corner.y) * min(tiling.tw, w - corner.x);
  }
};

// One block per target and `Channels`. One pass: the tiles' means are taken about the first one's. However far out it
// lies, it is in the variance too, so that squares cancel by no more than the number of tiles: little, in double.
template <int Channels>
__global__ void __launch_bounds__(kThreads) merge_moments_kernel(const __grid_constant__ MergeMoments a) {
  RFDARTS_SHARED(shared);
  int channel = int(blockIdx.y) * Channels + int(threadIdx.x) % Channels, tiles = a.tiling.count;
  auto target = a.target[blockIdx.x];
  int c = target.c;
  const double *mean_of = target.partial + min(channel, c - 1), *deviation_of = mean_of + int64_t(tiles) * c;
  double m = double(a.images) * a.h * a.w, about = *mean_of, sums[3];
  sum_items<3>(tiles, Channels, reinterpret_cast<double*>(shared), sums, [&](int tile, double(&of)[3]) {
    double pixels = a.pixels(tile), mean = mean_of[int64_t(tile) * c], off = pixels * (mean - about);
    of[0] = pixels * mean, of[1] = off;
    of[2] = deviation_of[int64_t(tile) * c] + off * (mean - about);
  });
  if (threadIdx.x >= Channels || channel >= c) return;
  target.moments[channel] = sums[0] / m;
  target.moments[int64_t(target.norms) * c + channel] = (sums[2] - sums[1] * sums[1] / m) / m;
}

}  // namespace rfdarts::cuda
