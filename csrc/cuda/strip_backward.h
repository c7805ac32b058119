// conv_backward.h for 16-bit storage and stride 1, all products on tensor cores; see strips.h. Channels come in
// sixteens: with fewer, neighbouring branches stand side by side as one with 16, whose 1x1 convolution is
// block-diagonal.
//
//   1 load      grad_ys  [pixel][channel], the gradient at the outputs that the tile depends on
//   2 multiply  planes   grad_ys times the transposed 1x1 convolution
//   3 spread    sums     in registers, += the transposed depthwise convolution of planes, a warp per channel
//
// Barriers: between 1 and 2, until grad_ys is complete and nobody spreads the branches before; between 2 and 3.
#pragma once
#include "cuda/conv_backward.h"
#include "cuda/strips.h"

namespace rfdarts::cuda {

// Most channels of a group; their weights are in registers.
constexpr int kMostStripChannels = 64;

template <class T, int H, int W>
struct StripBackwardTile {
  static constexpr int kStage = H * W + 2;  // elements between channels of the staged sums
  int channels, blocks;  // of a group, and sixteens of them
  int pitch;             // elements between pixels of grad_ys: eight neighbours lie in different banks
  int planes, staged, bytes;  // offsets in bytes; staged: behind the staged sums, which lie over all else

  // reach: the largest of all branches
  __host__ __device__ StripBackwardTile(int c, int group, int reach) {
    Planes<H, W> at(reach);
    channels = c * group, blocks = channels / 16, pitch = channels + 8;
    staged = round_up(channels * kStage * int(sizeof(float)), 16);
    int grad_ys = at.rows * at.kColumns * pitch * int(sizeof(T));
    planes = round_up(grad_ys, 16);
    bytes = planes + channels * at.apart * int(sizeof(T));
    if (staged > bytes) bytes = staged;
  }
  // a warp's sums have so many registers
  bool fits() const {
    bool power = (channels & (channels - 1)) == 0;
    return power && channels <= kMostStripChannels && channels * Planes<H, W>::kSixteens <= 64;
  }
};

template <class T, int H, int W>
struct StripBackward {
  using P = Planes<H, W>;
  static constexpr int M = P::kSixteens, kOwn = 8 / M;  // kOwn: channels of a warp
  const ConvBackward<T>& a;
  const StripBackwardTile<T, H, W>& tile;
  int group;
  unsigned char* shared;
  Corner corner;

  T *grad_ys = reinterpret_cast<T*>(shared), *planes = reinterpret_cast<T*>(shared + tile.planes);
  int c = a.c;
  SideBySide beside{a.c, group};
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  // from the first value on that is not finite: what a smaller kernel does not read may be one
  bool exact = false;
  float sums[kOwn][M][4] = {};

  // Before the first load: zeros where no branch may ever load.
  __device__ void clear(int reach) const {
    int size = P(reach).rows * P::kColumns * tile.pitch;
    for (int i = threadIdx.x; i < size / 8; i += kThreads) reinterpret_cast<Pack<uint32_t, 4>*>(grad_ys)[i] = {};
    __syncthreads();
  }
  // channels [first, first + c) of grad_ys, 0 outside the image
  template <int V>
  __device__ void load(const BackwardBranch<T>& branch, int reach, int first, uint32_t& seen) const {
    Share share(c / V, warp);
    int across = W + 2 * reach;
    // exact for what a tile has
    int per_row = reach == 1 ? 65536 / (W + 2) + 1 : reach == 2 ? 65536 / (W + 4) + 1 : 65536 / (W + 8) + 1;
    const T *g_image = branch.g.data + corner.n * branch.g.image, *y_image = branch.y + corner.n * a.image;
    for (int v = share.first; v < c / V; v += share.apart) {
      NormBackward<float, V> norm(branch.coefficients + v * V, c);
      // running statistics have no slope, and then y does not matter, whatever it is
      bool slopes = false;
#pragma unroll
      for (int i = 0; i < V; i++) {
        slopes = slopes || norm.slope[i] != 0;
        // not slope (y - mean): what that would save is far below the rounding of a 16-bit y
        norm.shift[i] -= norm.slope[i] * norm.mean[i];
      }
#pragma unroll 1
      for (int i = share.number * 32 + lane; i < (H + 2 * reach) * across; i += share.of * 32) {
        int row = i * per_row >> 16, column = i - row * across;
        int y = corner.y - reach + row, x = corner.x - reach + column;
        Pack<uint32_t, V / 2> pack = {};
        if (unsigned(y) < unsigned(a.oh) && unsigned(x) < unsigned(a.ow)) {
          float value[V];
          rfdarts::cuda::load<V>(g_image + y * branch.g.row + x * branch.g.pixel + v * V, value);
#pragma unroll
          for (int k = 0; k < V; k++) value[k] = norm.scale[k] * value[k] + norm.shift[k];
          if (slopes) {
            float output[V];
            rfdarts::cuda::load<V>(y_image + (y * a.ow + x) * c + v * V, output);
#pragma unroll
            for (int k = 0; k < V; k++) value[k] += norm.slope[k] * output[k];
          }
#pragma unroll
          for (int k = 0; k < V / 2; k++) {
            pack.v[k] = pair<T>(value[2 * k], value[2 * k + 1]);
            look_at<T>(pack.v[k], seen);
          }
        }
        int pixel = row * P::kColumns + kMargin - reach + column;
        *reinterpret_cast<Pack<uint32_t, V / 2>*>(grad_ys + pixel * tile.pitch + first + v * V) = pack;
      }
    }
  }
  // planes = weights of channels c0 .. c0 + 15 times grad_ys; weights(i, o): from channel i to channels o, o + 1
  template <class Weights>
  __device__ void multiply(const P& at, Weights&& weights) const {
    constexpr int most = kMostStripChannels / 16;
    Share share(tile.blocks, warp);
    int c0 = share.first * 16;
    uint32_t w[most][4];
#pragma unroll
    for (int k = 0; k < most; k++)
      if (k < tile.blocks)
#pragma unroll
        for (int r = 0; r < 4; r++) w[k][r] = weights(c0 + g + r % 2 * 8, 16 * k + 2 * t + r / 2 * 8);
    int units = at.rows * P::kColumns / 16;
#pragma unroll 1
    for (int u = share.number; u < units; u += share.of) {
      float acc[2][4] = {};
      const T* from = grad_ys + (16 * u + lane % 8 + lane / 16 * 8) * tile.pitch + lane / 8 % 2 * 8;
#pragma unroll
      for (int k = 0; k < most; k++)
        if (k < tile.blocks) {
          uint32_t both[4];
          load_matrices<false>(both, from + 16 * k);
          uint32_t b[2][2] = {{both[0], both[1]}, {both[2], both[3]}};
          multiply_tile<T>(acc[0], w[k], b[0]);
          multiply_tile<T>(acc[1], w[k], b[1]);
        }
#pragma unroll
      for (int n = 0; n < 2; n++) {
        int pixel = 16 * u + 8 * n + 2 * t;
        int place = P::kColumns == kPlaneRow ? pixel : pixel / 16 * kPlaneRow + pixel % 16;
        T* to = planes + (c0 + g) * at.apart + place;
        *reinterpret_cast<uint32_t*>(to) = pair<T>(acc[n][0], acc[n][1]);
        *reinterpret_cast<uint32_t*>(to + 8 * at.apart) = pair<T>(acc[n][2], acc[n][3]);
      }
    }
  }
  // Phase 3 tap by tap.
  template <class Branch>
  __device__ void spread_exactly(const P& at, int count, Branch&& branch) {
    constexpr int of_strips = M * 4;
#pragma unroll 1
    for (int k = 0; k < kOwn * of_strips; k++) {
      int j = warp + k / of_strips * kWarps, m = k / 4 % M, r = k % 4, strip = 16 * m + g + r / 2 * 8;
      float value = 0;
      if (j < count * c && strip < P::kStrips) {
        const BackwardBranch<T>& from = branch(beside.branch(j));
        int ch = beside.channel(j);
        value = depthwise_exact<T, true>(at, planes + j * at.apart, a.conv_weights + from.weight + ch, c, from.kernel,
                                         from.dilation, strip, 2 * t + r % 2);
      }
      // registers have no index
#pragma unroll
      for (int i = 0; i < kOwn * of_strips; i++) sums[i / of_strips][i / 4 % M][i % 4] += i == k ? value : 0.f;
    }
  }
  // sums += what `count` branches, side by side, send back; branch(k): the k-th
  template <class Branch>
  __device__ void add(int count, Branch&& branch) {
    int reach = 0;
    for (int k = 0; k < count; k++) reach = max(reach, (branch(k).kernel - 1) * branch(k).dilation / 2);
    P at(reach);
    uint32_t seen = 0;
    for (int k = 0; k < count; k++)
      a.wide ? load<8>(branch(k), reach, k * c, seen) : load<4>(branch(k), reach, k * c, seen);
    exact = __syncthreads_or((seen & 0x7fff7fff) != 0) || exact;
    multiply(at, [&](int i, int o) {
      int number = beside.branch(i);
      // 2 and more neighbouring channels are one branch's
      if (number != beside.branch(o) || number >= count) return 0u;
      const BackwardBranch<T>& from = branch(number);
      float two[2];
      rfdarts::cuda::load<2>(a.conv_weights + from.weight +
                                 (from.kernel * from.kernel + beside.channel(i)) * c + beside.channel(o), two);
      return pair<T>(two[0], two[1]);
    });
    __syncthreads();
    if (exact) [[unlikely]] return spread_exactly(at, count, branch);
#pragma unroll
    for (int i = 0; i < kOwn; i++) {
      int j = warp + i * kWarps, ch = beside.channel(j);
      if (j >= count * c) continue;
      const BackwardBranch<T>& from = branch(beside.branch(j));
      depthwise_warp<T, true>(at, planes + j * at.apart, a.conv_weights + from.weight + ch, c, from.kernel,
                              from.dilation, sums[i]);
    }
  }
  // The sums in shared memory, float [channels][kStage], for whoever reads them after a barrier.
  __device__ const float* stage() const {
    float* to = reinterpret_cast<float*>(shared);
    // nobody spreads any more
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kOwn; i++) {
      int j = warp + i * kWarps;
      if (j >= tile.channels) break;
#pragma unroll
      for (int m = 0; m < M; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
          int strip = 16 * m + 8 * r + g;
          float two[2] = {sums[i][m][2 * r], sums[i][m][2 * r + 1]};
          if (strip < P::kStrips)
            rfdarts::cuda::store<2>(to + j * tile.kStage + strip * kStrip + 2 * t, two);
        }
    }
    return to;
  }
};

}  // namespace rfdarts::cuda
