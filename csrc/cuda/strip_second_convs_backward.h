// second_convs_backward.h on tensor cores: see strip_backward.h.
#pragma once
#include "cuda/second_convs_backward.h"
#include "cuda/strip_backward.h"

namespace rfdarts::cuda {

template <class T>
struct StripSecondConvsBackward : SecondConvsBackward<T> {
  int group, reach;
};

// Behind the tile: scales, shifts and means of the inner BatchNorms [3][channels], and sums [kWarps][2][channels].
template <class T, int H, int W>
int strip_second_convs_bytes(const StripBackwardTile<T, H, W>& tile) {
  return tile.bytes + (3 + 2 * kWarps) * tile.channels * int(sizeof(float));
}

// One block per tile and group of branches.
template <class T, int H, int W>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    strip_second_convs_backward_kernel(const __grid_constant__ StripSecondConvsBackward<T> a) {
  RFDARTS_SHARED(shared);
  StripBackwardTile<T, H, W> tile(a.c, a.group, a.reach);
  StripBackward<T, H, W> block{a, tile, a.group, shared, a.tiling.corner(blockIdx.x)};
  float *coefficients = reinterpret_cast<float*>(shared + tile.bytes), *partial = coefficients + 3 * tile.channels;
  int b0 = int(blockIdx.y) * a.group, count = min(a.group, a.branches - b0), channels = tile.channels;
  for (int j = threadIdx.x; j < count * a.c; j += kThreads) {
    int norm = a.branch[b0 + block.beside.branch(j)].inner_norm, ch = block.beside.channel(j);
    float scale = a.norms.scale(norm, ch), mean = a.norms.mean(norm, ch);
    coefficients[j] = scale;
    coefficients[channels + j] = a.norms.beta[norm * a.c + ch] - mean * scale;
    coefficients[2 * channels + j] = mean;
  }
  block.clear(a.reach);
  block.add(count, [&](int k) -> const BackwardBranch<T>& { return a.branch[b0 + k]; });
  const float* stage = block.stage();
  __syncthreads();

  // grad_z where z > 0, and its sums; a thread has 4 channels
  Corner corner = block.corner;
  int quads = channels / 4, j = threadIdx.x % quads * 4, ch = block.beside.channel(j);
  float sum[4] = {}, dot[4] = {};
  if (j < count * a.c) {
    const auto& branch = a.branch[b0 + block.beside.branch(j)];
    float scale[4], shift[4], mean[4];
    load<4>(coefficients + j, scale), load<4>(coefficients + channels + j, shift);
    load<4>(coefficients + 2 * channels + j, mean);
    for (int p = threadIdx.x / quads; p < H * W; p += kThreads / quads) {
      int strip = p / kStrip, y = corner.y + strip % H;
      int x = corner.x + strip / H * kStrip + p % kStrip;
      if (y >= a.oh || x >= a.ow) continue;
      int64_t place = corner.n * a.image + (int64_t(y) * a.ow + x) * a.c + ch;
      float inner[4];
      load<4>(branch.inner_y + place, inner);
      Pack<uint32_t, 2> pack;
#pragma unroll
      for (int k = 0; k < 4; k += 2) {
        float masked[2];
#pragma unroll
        for (int i = k; i < k + 2; i++)
          masked[i - k] = scale[i] * inner[i] + shift[i] <= 0 ? 0.f : stage[(j + i) * tile.kStage + p];
        uint32_t both = pair<T>(masked[0], masked[1]);
        pack.v[k / 2] = both;
        float rounded[2] = {first_of<T>(both), second_of<T>(both)};
#pragma unroll
        for (int i = k; i < k + 2; i++) sum[i] += rounded[i - k], dot[i] += rounded[i - k] * (inner[i] - mean[i]);
      }
      *reinterpret_cast<Pack<uint32_t, 2>*>(branch.grad_z + place) = pack;
    }
  }
  // lanes of the same channels, then warps
#pragma unroll
  for (int k = 0; k < 4; k++)
    for (int bit = quads; bit < 32; bit *= 2) {
      sum[k] += __shfl_sync(0xffffffffu, sum[k], block.lane ^ bit);
      dot[k] += __shfl_sync(0xffffffffu, dot[k], block.lane ^ bit);
    }
  if (block.lane < quads)
#pragma unroll
    for (int k = 0; k < 4; k++) {
      partial[2 * block.warp * channels + j + k] = sum[k];
      partial[(2 * block.warp + 1) * channels + j + k] = dot[k];
    }
  __syncthreads();
  for (int i = threadIdx.x; i < 2 * count * a.c; i += kThreads) {
    int which = i & 1, channel = i / 2;
    float total = 0;
    for (int w = 0; w < kWarps; w++) total += partial[(2 * w + which) * channels + channel];
    double* out = a.partial + (int64_t(b0 + block.beside.branch(channel)) * 2 + which) * a.tiling.count * a.c;
    out[int64_t(blockIdx.x) * a.c + block.beside.channel(channel)] = double(total);
  }
}

}  // namespace rfdarts::cuda
