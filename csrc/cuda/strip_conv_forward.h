// conv_forward.h for 16-bit storage and stride 1, all products on tensor cores. Channels come in sixteens: with fewer,
// neighbouring branches stand side by side as one with 16, whose 1x1 convolution is block-diagonal.
//
//   1 load       planes  the input, its ReLU; one load serves all branches of a state
//   2 depthwise  ds      [channel][strip][8], a warp per channel
//   3 multiply   y       from registers; a warp has 16 outputs and up to kPixelTiles x 16 pixels, and their moments
//
// Barriers: after 1; between 2 and 3; after 3, until ds may be overwritten and all warps' moments are there.
#pragma once
#include "cuda/conv_forward.h"
#include "cuda/strips.h"

namespace rfdarts::cuda {

constexpr int kPixelTiles = 4;

template <class T>
struct StripConvForward : ConvForward<T> {
  int group;        // branches side by side
  bool one_source;  // the branches of a state read it itself
};

template <class T, int H, int W>
struct StripForwardTile {
  int channels, blocks;    // of a group, rounded up to 16, and sixteens of them
  int ds, moments, bytes;  // offsets in bytes

  __host__ __device__ StripForwardTile(int reach, int c, int group, bool one_source) {
    Planes<H, W> at(reach);
    channels = round_up(c * group, 16), blocks = channels / 16;
    ds = (one_source ? c : channels) * at.apart * int(sizeof(T));
    moments = ds + channels * at.kChannel * int(sizeof(T));
    // of each warp its Samples, and how many pixels they are of
    bytes = moments + kWarps * (2 * 16 + 1) * int(sizeof(float));
  }
  // of 16 pixels that a warp has
  int pixel_tiles() const {
    return blocks > kWarps ? kPixelTiles + 1 : ceil_div(Planes<H, W>::kStrips / 2, kWarps / blocks);
  }
};

// Of some values the mean, and the sum of squared deviations from it.
struct Sample {
  float mean, square;
};

// Sample of `count` values, of whose deviations from one of them, `about`, these are the sums.
__device__ __forceinline__ Sample sample_of(float about, float sum, float square, float per_count) {
  float mean = sum * per_count;
  return {about + mean, square - sum * mean};
}
// Chan's merge, to each of them, of the lanes whose numbers differ in the bits `from` to `to` / 2, each with `count`
// values.
__device__ __forceinline__ Sample merged(Sample one, float count, float per_total, int from, int to) {
  float sum = one.mean * count;
  for (int bit = from; bit < to; bit *= 2) sum += __shfl_sync(0xffffffffu, sum, (threadIdx.x % 32) ^ bit);
  float mean = sum * per_total, off = one.mean - mean, square = one.square + count * off * off;
  for (int bit = from; bit < to; bit *= 2) square += __shfl_sync(0xffffffffu, square, (threadIdx.x % 32) ^ bit);
  return {mean, square};
}

template <class T, int H, int W>
struct StripForwardBlock {
  using Branch = typename ConvForward<T>::Branch;
  const StripConvForward<T>& a;
  unsigned char* shared;

  typename ConvForward<T>::State state = a.state[blockIdx.y];
  // or -1
  int max_pool = pool_of(Op::MaxPool), avg_pool = pool_of(Op::AvgPool);
  using P = Planes<H, W>;
  P at{a.reach};
  SideBySide beside{a.c, a.group};
  StripForwardTile<T, H, W> tile{a.reach, a.c, a.group, a.one_source};
  T *planes = reinterpret_cast<T*>(shared), *ds = reinterpret_cast<T*>(shared + tile.ds);
  Sample* samples = reinterpret_cast<Sample*>(shared + tile.moments);
  float* counts = reinterpret_cast<float*>(samples + kWarps * 16);
  Corner corner = a.tiling.corner(blockIdx.x);
  int c = a.c, vh = min(H, a.oh - corner.y), vw = min(W, a.ow - corner.x);
  float per_pixel = 1 / float(vh * vw);
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;

  __device__ int pool_of(Op op) const {
    for (int b = state.pools; b < state.end; b++)
      if (a.branch[b].op == int(op)) return b;
    return -1;
  }

  // planes [first, first + c) = x, or relu of its BatchNorm `norm`. Outside the image 0, or, for pools, the lowest
  // value. `seen`: see look_at.
  template <int V>
  __device__ void load(const ImageView<T>& x, int norm, int first, bool for_pools, uint32_t& seen) const {
    constexpr int pairs = P::kColumns / 2;
    Share share(c / V, warp);
    const T* image = x.data + corner.n * x.image;
    for (int v = share.first; v < c / V; v += share.apart) {
      float scale[V], shift[V];
      if (norm >= 0) {
        int ch = v * V + lane % V;
        float own = a.norms.scale(norm, ch), behind = a.norms.beta[norm * c + ch] - a.norms.mean(norm, ch) * own;
#pragma unroll
        for (int i = 0; i < V; i++)
          scale[i] = __shfl_sync(0xffffffffu, own, i), shift[i] = __shfl_sync(0xffffffffu, behind, i);
      }
      for (int i = share.number * 32 + lane; i < at.rows * pairs; i += share.of * 32) {
        int row = i / pairs, q = i % pairs;
        int y = corner.y - at.reach + row, x0 = corner.x - kMargin + 2 * q, place = y * x.row + x0 * x.pixel + v * V;
        uint32_t value[2][V / 2];
#pragma unroll
        for (int side = 0; side < 2; side++) {
          Pack<uint32_t, V / 2> pack;
          bool inside = unsigned(y) < unsigned(a.h) && unsigned(x0 + side) < unsigned(a.w);
#pragma unroll
          for (int k = 0; k < V / 2; k++) pack.v[k] = for_pools ? kLowestPair<T> : 0;
          if (inside) pack = *reinterpret_cast<const Pack<uint32_t, V / 2>*>(image + place + side * x.pixel);
#pragma unroll
          for (int k = 0; k < V / 2; k++) {
            uint32_t both = pack.v[k];
            if (norm >= 0 && inside)
              both = pair<T>(scale[2 * k] * first_of<T>(both) + shift[2 * k],
                             scale[2 * k + 1] * second_of<T>(both) + shift[2 * k + 1]);
            value[side][k] = for_pools ? both : relu_pair<T>(both);
          }
        }
        T* to = planes + (first + v * V) * at.apart + row * kPlaneRow + 2 * q;
#pragma unroll
        for (int k = 0; k < V / 2; k++) {
          if (!for_pools) look_at<T>(value[0][k], seen), look_at<T>(value[1][k], seen);
          *reinterpret_cast<uint32_t*>(to + 2 * k * at.apart) = firsts(value[0][k], value[1][k]);
          *reinterpret_cast<uint32_t*>(to + (2 * k + 1) * at.apart) = seconds(value[0][k], value[1][k]);
        }
      }
    }
  }
  __device__ void load(const Branch& branch, int first, bool for_pools, uint32_t& seen) const {
    a.wide ? load<8>(branch.x, branch.norm, first, for_pools, seen)
           : load<4>(branch.x, branch.norm, first, for_pools, seen);
  }
  __device__ void relu_planes(uint32_t& seen) const {
    constexpr int vectors = P::kColumns / 8;
    for (int ch = warp; ch < c; ch += kWarps)
      for (int i = lane; i < at.rows * vectors; i += 32) {
        T* at_row = planes + ch * at.apart + i / vectors * kPlaneRow + i % vectors * 8;
        Pack<uint32_t, 4> pack = *reinterpret_cast<Pack<uint32_t, 4>*>(at_row);
#pragma unroll
        for (int k = 0; k < 4; k++) {
          pack.v[k] = relu_pair<T>(pack.v[k]);
          look_at<T>(pack.v[k], seen);
        }
        *reinterpret_cast<Pack<uint32_t, 4>*>(at_row) = pack;
      }
  }

  __device__ void write_moments(int branch, int ch, Sample sample) const {
    double* partial = a.partial + int64_t(branch) * 2 * a.tiling.count * c;
    partial[int64_t(blockIdx.x) * c + ch] = double(sample.mean);
    partial[(int64_t(a.tiling.count) + blockIdx.x) * c + ch] = double(sample.square);
  }
  // Of a strip's first `valid` values, over all lanes that share a channel.
  __device__ void strip_moments(int branch, int ch, const float (&value)[kStrip], int valid, bool writes) const {
    float sum = 0, square = 0;
#pragma unroll
    for (int n = 0; n < kStrip; n++) {
      float off = n < valid ? value[n] - value[0] : 0.f;
      sum += off, square += off * off;
    }
    Sample own = valid ? sample_of(value[0], sum, square, 1 / float(valid)) : Sample{};
    Sample all = merged(own, float(valid), per_pixel, 1, P::kStrips);
    if (writes) write_moments(branch, ch, all);
  }
  // The moments of both pools; a lane has a strip.
  __device__ void pools() const {
    constexpr int channels_at_once = 32 / P::kStrips;
    int strip = lane % P::kStrips, r = P::row_of(strip), x0 = P::column_of(strip);
    int valid = r < vh ? min(kStrip, max(0, vw - x0)) : 0;
    int y = corner.y + r, x = corner.x + x0, rows = window(y, a.oh);
    for (int first = warp * channels_at_once; first < c; first += kWarps * channels_at_once) {
      int ch = min(first + lane / P::kStrips, c - 1);
      const T* from = planes + ch * at.apart + (r + at.reach - 1) * kPlaneRow + x0;
      // columns kMargin - 2 .. kMargin + 9 of three rows
      uint32_t most[6];
      float sums[12] = {};
#pragma unroll
      for (int u = 0; u < 3; u++) {
        bool row_inside = unsigned(y + u - 1) < unsigned(a.oh);
#pragma unroll
        for (int k = 0; k < 6; k++) {
          uint32_t both = *reinterpret_cast<const uint32_t*>(from + u * kPlaneRow + kMargin - 2 + 2 * k);
          most[k] = u ? max_pair<T>(most[k], both) : both;
          sums[2 * k] += row_inside ? first_of<T>(both) : 0.f;
          sums[2 * k + 1] += row_inside ? second_of<T>(both) : 0.f;
        }
      }
#pragma unroll
      for (int k = 0; k < 12; k++) sums[k] = unsigned(x + k - 2) < unsigned(a.ow) ? sums[k] : 0.f;
      float value[kStrip];
      bool writes = lane % P::kStrips == 0 && first + lane / P::kStrips < c;
      if (max_pool >= 0) {
#pragma unroll
        for (int k = 0; k < 4; k++) {
          uint32_t left = most[k] >> 16 | most[k + 1] << 16, right = most[k + 1] >> 16 | most[k + 2] << 16;
          uint32_t both = max_pair<T>(max_pair<T>(left, most[k + 1]), right);
          value[2 * k] = first_of<T>(both), value[2 * k + 1] = second_of<T>(both);
        }
        strip_moments(max_pool, ch, value, valid, writes);
      }
      if (avg_pool >= 0) {
#pragma unroll
        for (int n = 0; n < kStrip; n++) {
          float sum = sums[n + 1] + sums[n + 2] + sums[n + 3];
          value[n] = widen(narrow<T>(sum / float(rows * window(x + n, a.ow))));
        }
        strip_moments(avg_pool, ch, value, valid, writes);
      }
    }
  }

  // ds of branches [b0, b0 + count); `exact`: tap by tap
  __device__ void depthwise(int b0, int count, bool exact) const {
    auto plane_of = [&](int j) { return planes + (a.one_source ? beside.channel(j) : j) * at.apart; };
    auto taps_of = [&](int j) { return a.conv_weights + a.branch[b0 + beside.branch(j)].weight + beside.channel(j); };
    if (exact) [[unlikely]] {
      for (int i = threadIdx.x; i < count * c * P::kStrips * kStrip; i += kThreads) {
        int n = i % kStrip, strip = i / kStrip % P::kStrips, j = i / (kStrip * P::kStrips);
        const Branch& branch = a.branch[b0 + beside.branch(j)];
        ds[j * P::kChannel + strip * kStrip + n] = narrow<T>(depthwise_exact<T, false>(
            at, plane_of(j), taps_of(j), c, branch.kernel, branch.dilation, strip, n));
      }
      return;
    }
    for (int j = warp; j < tile.channels; j += kWarps) {
      float sums[P::kSixteens][4] = {};
      if (j < count * c) {
        const Branch& branch = a.branch[b0 + beside.branch(j)];
        depthwise_warp<T, false>(at, plane_of(j), taps_of(j), c, branch.kernel, branch.dilation, sums);
      }
      store_strips<H, W>(sums, ds + j * P::kChannel);
    }
  }

  // weight from channel i to channel o of a group of branches
  __device__ float weight(int b0, int count, int i, int o) const {
    int number = beside.branch(i);
    if (number != beside.branch(o) || number >= count) return 0;
    const Branch& branch = a.branch[b0 + number];
    int taps = branch.kernel * branch.kernel;
    return a.conv_weights[branch.weight + (taps + beside.channel(i)) * c + beside.channel(o)];
  }
  // A lane's pixels in `multiply`, the same for all branches: how many are valid, of its warp too.
  struct Pixels {
    int valid = 0;
    float per_valid, per_total;
  };
  __device__ bool is_valid(int strip) const {
    return strip < P::kStrips && P::row_of(strip) < vh && P::column_of(strip) + g < vw;
  }
  __device__ Pixels pixels_of_lane() const {
    Pixels p;
    Share share(tile.blocks, warp);
    if (share.first < tile.blocks)
#pragma unroll
      for (int i = 0; i < kPixelTiles; i++)
#pragma unroll
        for (int r = 0; r < 2; r++) p.valid += is_valid(2 * (share.number + i * share.of) + r);
    int total = p.valid;
#pragma unroll
    for (int bit = 4; bit < 32; bit *= 2) total += __shfl_sync(0xffffffffu, total, lane ^ bit);
    p.per_valid = p.valid ? 1 / float(p.valid) : 0.f, p.per_total = total ? 1 / float(total) : 0.f;
    if (lane == 0) counts[warp] = float(total);
    return p;
  }
  // y of branches [b0, b0 + count), and of each warp's pixels the moments
  __device__ void multiply(int b0, int count, const Pixels& pixels) const {
    Share share(tile.blocks, warp);
    int per = share.of, first = share.number, o0 = share.first * 16;
    if (share.first >= tile.blocks) return;
    constexpr int tiles = P::kStrips / 2;
    const Branch& branch = a.branch[b0];
    const float* alone = a.conv_weights + branch.weight + branch.kernel * branch.kernel * c;
    float acc[kPixelTiles][2][4] = {};
#pragma unroll 1
    for (int k = 0; k < tile.channels; k += 16) {
      // a lane's outputs are neighbours: columns 2 t and 2 t + 1 of matrix m are outputs 4 t + 2 m and the next
      uint32_t b[2][2];
#pragma unroll
      for (int m = 0; m < 2; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          int i = k + 8 * half + 2 * t, o = o0 + g / 2 * 4 + 2 * m + g % 2;
          b[m][half] = a.group == 1 ? pair<T>(alone[i * c + o], alone[i * c + c + o])
                                    : pair<T>(weight(b0, count, i, o), weight(b0, count, i + 1, o));
        }
      const T* from = ds + (k + lane % 8 + lane / 16 * 8) * P::kChannel + lane / 8 % 2 * kStrip;
#pragma unroll
      for (int i = 0; i < kPixelTiles; i++) {
        int p = first + i * per;
        if (p >= tiles) break;
        uint32_t d[4];
        load_matrices<true>(d, from + 2 * p * kStrip);
        multiply_tile<T>(acc[i][0], d, b[0]);
        multiply_tile<T>(acc[i][1], d, b[1]);
      }
    }
    int number = beside.branch(o0 + 4 * t), ch = beside.channel(o0 + 4 * t);
    bool kept = number < count;
    T* y = kept ? a.branch[b0 + number].y + corner.n * a.image + ch : nullptr;
    float about[4], sum[4] = {}, square[4] = {};
#pragma unroll
    for (int i = 0; i < kPixelTiles; i++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        int strip = 2 * (first + i * per) + r, row = P::row_of(strip), column = P::column_of(strip) + g;
        uint32_t low = pair<T>(acc[i][0][2 * r], acc[i][0][2 * r + 1]);
        uint32_t high = pair<T>(acc[i][1][2 * r], acc[i][1][2 * r + 1]);
        float value[4] = {first_of<T>(low), second_of<T>(low), first_of<T>(high), second_of<T>(high)};
        if (i + r == 0)
#pragma unroll
          for (int k = 0; k < 4; k++) about[k] = value[k];
        // a lane's first pixel is in no later row or column than its others: valid if any is
        if (!is_valid(strip)) continue;
        if (kept)
          *reinterpret_cast<Pack<uint32_t, 2>*>(y + ((corner.y + row) * a.ow + corner.x + column) * c) = {
              low, high};
#pragma unroll
        for (int k = 0; k < 4; k++) {
          float off = value[k] - about[k];
          sum[k] += off, square[k] += off * off;
        }
      }
    if (!a.partial) return;
#pragma unroll
    for (int k = 0; k < 4; k++) {
      Sample own = sample_of(about[k], sum[k], square[k], pixels.per_valid);
      if (!pixels.valid) own = {};
      Sample all = merged(own, float(pixels.valid), pixels.per_total, 4, 32);
      if (g == 0) samples[warp * 16 + 4 * t + k] = all;
    }
  }
  __device__ void merge_warps(int b0, int count) const {
    for (int j = threadIdx.x; j < count * c; j += kThreads) {
      float mean = 0, square = 0;
      int of = Share(tile.blocks, 0).of, first = j / 16 * of;
      for (int w = first; w < first + of; w++) mean += counts[w] * samples[w * 16 + j % 16].mean;
      mean *= per_pixel;
      for (int w = first; w < first + of; w++) {
        Sample one = samples[w * 16 + j % 16];
        float off = one.mean - mean;
        square += one.square + counts[w] * off * off;
      }
      write_moments(b0 + beside.branch(j), beside.channel(j), {mean, square});
    }
  }

  __device__ void run() const {
    bool has_pools = max_pool >= 0 || avg_pool >= 0, exact = false;
    if (a.one_source) {
      uint32_t seen = 0;
      load(a.branch[state.begin], 0, has_pools, seen);
      if (has_pools) {
        __syncthreads();
        pools();
        __syncthreads();
        relu_planes(seen);
      }
      exact = __syncthreads_or((seen & 0x7fff7fff) != 0);
    }
    Pixels pixels = pixels_of_lane();
    for (int b0 = state.begin; b0 < state.pools; b0 += a.group) {
      int count = min(a.group, state.pools - b0);
      if (!a.one_source) {
        uint32_t seen = 0;
        for (int k = 0; k < count; k++) load(a.branch[b0 + k], k * c, false, seen);
        exact = __syncthreads_or((seen & 0x7fff7fff) != 0);
      }
      depthwise(b0, count, exact);
      // ds is complete, and nobody reads planes or moments any more
      __syncthreads();
      multiply(b0, count, pixels);
      __syncthreads();
      if (a.partial) merge_warps(b0, count);
    }
  }
};

// Blocks: tiles of H x W x states.
template <class T, int H, int W>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    strip_conv_forward_kernel(const __grid_constant__ StripConvForward<T> a) {
  RFDARTS_SHARED(shared);
  StripForwardBlock<T, H, W>{a, shared}.run();
}

}  // namespace rfdarts::cuda
