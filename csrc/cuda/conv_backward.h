// Backward of a branch's depthwise and 1x1 convolution, or of FactorizedReduce, for one tile of its input, in phases:
//
//   1 load      grad_ys  the gradient at the outputs y that the tile depends on, `ck` channels at a time
//   2 multiply  grad_ds  grad_ys times the transposed 1x1 convolution, summed over all these chunks
//   3 spread    strip    in registers, += the transposed depthwise convolution of grad_ds
//
// Barriers: before 1, until nobody multiplies the chunk before, nor spreads the branch before; between 1 and 2, until
// the chunk is complete; between 2 and 3, until grad_ds is complete.
#pragma once
#include "cuda/batch_norm.h"
#include "cuda/depthwise.h"
#include "cuda/pointwise.h"

namespace rfdarts::cuda {

// Items of 4 pixels x 4 channels of the 1x1 product that a thread may hold.
constexpr int kItems = 2;

// Columns (rows) of [oh][ow] that n neighbours in [h][w] depend on, for a kernel of reach R.
__host__ __device__ inline int region_size(int n, int reach, int stride) {
  return stride == 1 ? n + 2 * reach : (n - 1 + reach) / 2 + (reach + 1) / 2 + 1;
}

template <class T>
struct BackwardBranch {
  ImageView<T> g;  // the gradient at its BatchNorm's output
  const T* y;
  const Acc<T>* coefficients;  // of NormBackward
  int64_t weight;
  int16_t op;
  int8_t kernel, dilation;
};

// What the parameters of both kernels have in common.
template <class T>
struct ConvBackward {
  Tiling tiling;  // of the [h][w] that the gradient goes to
  int h, w, oh, ow, c;
  int region;     // largest number of pixels of [oh][ow] that a tile depends on
  int64_t image;  // of branch outputs
  bool wide;      // 16-byte loads are aligned
  const Acc<T>* conv_weights;
  Norms<T> norms;
};

// A block's shared memory: grad_ys [pixels][ld], grad_ds [rows][pitch]; in their place the pools' input and gradients,
// and where their maxima are; sums for statistics.
template <class T>
struct BackwardTile {
  int lanes, ld;                      // lanes: channels of a chunk, rounded up
  int grad_ds, where, sums, bytes;  // offsets in bytes

  // ck: at most kStrip tiles
  __host__ __device__ BackwardTile(const Tiling& t, int region, bool pools) {
    int item = sizeof(Acc<T>), around = (t.th + 4) * (t.tw + 4), pooled = (t.th + 2) * (t.tw + 2);
    lanes = round_up(t.ck, 4);
    ld = lanes + 4;
    // an image row of grad_ds is padded by at most 128 bytes and one pixel
    int ds = region * lanes + (t.th + 8) * (128 / item + lanes), ys = round_up(region, 16) * ld;
    if (pools) {
      ys = ys > around * t.ck ? ys : around * t.ck;
      ds = ds > 2 * pooled * t.ck ? ds : 2 * pooled * t.ck;
    }
    grad_ds = round_up(ys * item, 16);
    where = grad_ds + round_up(ds * item, 16);
    sums = where + round_up(pools ? pooled * t.ck : 0, 16);
    bytes = sums + 2 * kThreads * item;
  }
};

// One branch's backward for channels [d0, d0 + count) of its input.
template <class T, int S>
struct BranchBackward {
  using A = Acc<T>;
  const ConvBackward<T>& a;
  const BackwardBranch<T>& branch;
  const BackwardTile<T>& tile;
  Corner corner;
  int d0, count;
  A *grad_ys, *grad_ds;

  bool reduces = branch.op == int(Op::Reduce);
  int taps = branch.kernel * branch.kernel, reach = reduces ? 0 : (branch.kernel - 1) * branch.dilation / 2;
  // the outputs that the tile depends on: how many, the first one, and that one relative to the tile's corner
  int rows = region_size(a.tiling.th, reach, S), columns = region_size(a.tiling.tw, reach, S), pixels = rows * columns;
  int y0 = corner.y / S - (reach + S - 1) / S, x0 = corner.x / S - (reach + S - 1) / S;
  int first_y = y0 - corner.y / S, first_x = x0 - corner.x / S;
  int pitch = tile_pitch(columns, tile.lanes, sizeof(A));  // of grad_ds
  // the transposed 1x1 convolution lies behind the forward one
  const A* weights = a.conv_weights + branch.weight + taps * a.c + a.c * a.c;

  // Phase 1, with the barriers around it: grad_ys = channels [c0, c0 + part); 0 outside the image and, of
  // FactorizedReduce, for the other convolution's outputs. Returns part.
  __device__ int load(int pass, int c0) const {
    int part = min(a.tiling.ck, a.c - c0);
    __syncthreads();
    with_width<T>(a.wide, [&]<int V>() { load_gradient<V>(c0, part); });
    __syncthreads();
    if (reduces) zero_half(1 - pass, c0, part);
    return part;
  }
  // in a loop of its own: the registers of the other one are few
  __device__ void zero_half(int half, int c0, int part) const {
    Lanes<1> lane(part);
    if ((c0 + lane.channel >= a.c / 2) == half)
      for (int p = lane.pixel; p < pixels; p += lane.step) grad_ys[p * tile.ld + lane.channel] = 0;
    __syncthreads();
  }
  template <int V>
  __device__ void load_gradient(int c0, int part) const {
    Lanes<V> lane(part);
    NormBackward<A, V> backward(branch.coefficients + c0 + lane.channel, a.c);
    for (int p = lane.pixel; p < pixels; p += lane.step) {
      int y = y0 + p / columns, x = x0 + p % columns;
      A v[V] = {};
      if (unsigned(y) < unsigned(a.oh) && unsigned(x) < unsigned(a.ow)) {
        A g[V], output[V];
        rfdarts::cuda::load<V>(branch.g.at(corner.n, y, x) + c0 + lane.channel, g);
        rfdarts::cuda::load<V>(branch.y + corner.n * a.image + (int64_t(y) * a.ow + x) * a.c + c0 + lane.channel, output);
#pragma unroll
        for (int i = 0; i < V; i++) v[i] = backward(i, g[i], output[i]);
      }
#pragma unroll
      for (int i = 0; i < V; i++) grad_ys[p * tile.ld + lane.channel + i] = v[i];
    }
  }

  __device__ A* grad_d(int pixel, int channel) const {
    return grad_ds + pixel / columns * pitch + pixel % columns * tile.lanes + channel;
  }
  __device__ const A* chunk_weights(int c0) const { return weights + int64_t(c0) * a.c + d0; }

  // Phases 1 and 2 with sums in registers.
  __device__ void multiply_in_registers(int pass) const {
    int apart = ceil_div(pixels, 4), groups = ceil_div(count, 4);
    A acc[kItems][4][4] = {};
    for (int c0 = 0; c0 < a.c; c0 += a.tiling.ck) {
      int part = load(pass, c0);
      const A* w = chunk_weights(c0);
#pragma unroll
      for (int k = 0; k < kItems; k++) {
        int i = threadIdx.x + k * kThreads, o = i % groups * 4, p = i / groups;
        if (p < apart) multiply(grad_ys + p * tile.ld, apart * tile.ld, part, w + o, a.c, count - o, acc[k]);
      }
    }
#pragma unroll
    for (int k = 0; k < kItems; k++) {
      int i = threadIdx.x + k * kThreads, o = i % groups * 4, first = i / groups;
      if (first >= apart) continue;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        int p = first + j * apart;
        if (p >= pixels) continue;
#pragma unroll
        for (int m = 0; m < 4; m++) grad_d(p, o)[m] = acc[k][j][m];
      }
    }
  }
  // Phases 1 and 2 with sums in grad_ds itself: a warp comes back to the same tiles.
  __device__ void multiply_on_tensor_cores(int pass) const {
    int across = count / 8, tiles = ceil_div(pixels, 16) * across, g = threadIdx.x % 32 / 4;
    for (int c0 = 0; c0 < a.c; c0 += a.tiling.ck) {
      int part = load(pass, c0);
      const A* w = chunk_weights(c0);
      for (int i = threadIdx.x / 32; i < tiles; i += kWarps) {
        int p0 = i / across * 16, o0 = i % across * 8, o = o0 + threadIdx.x % 4 * 2;
        A *low = grad_d(p0 + g, o), *high = grad_d(p0 + g + 8, o);
        bool has_low = p0 + g < pixels, has_high = p0 + g + 8 < pixels;
        float acc[4] = {};
        if (c0 && has_low) acc[0] = low[0], acc[1] = low[1];
        if (c0 && has_high) acc[2] = high[0], acc[3] = high[1];
        multiply_warp<T>(grad_ys, tile.ld, p0, part, w, a.c, o0, acc);
        if (has_low) low[0] = acc[0], low[1] = acc[1];
        if (has_high) high[0] = acc[2], high[1] = acc[3];
      }
    }
  }

  // Phase 3.
  __device__ void spread(int pass, Strip<A>& strip) const {
    if (!strip.valid) return;
    if (reduces) {
      // the second half of the outputs belongs to odd rows and columns
      if (strip.y % S != pass) return;
#pragma unroll
      for (int o = 0; o < kStrip; o++)
        if (o % S == pass)
          strip.acc[o] += grad_ds[strip.y / S * pitch + (strip.x + o) / S * tile.lanes + strip.channel];
    } else {
      const A* taps = a.conv_weights + branch.weight + d0 + strip.channel;
      with_kernel(branch.kernel, branch.dilation, [&]<int K, int D>() {
        depthwise_transposed<K, D, S>(grad_ds + strip.channel, pitch, tile.lanes, first_y, first_x, taps, a.c, strip);
      });
    }
  }

  // strip += the gradient that the branch sends back; FactorizedReduce does so in two passes, one per convolution
  __device__ void add_to(Strip<A>& strip) const {
    for (int pass = 0; pass < (reduces ? 2 : 1); pass++) {
      if constexpr (sizeof(T) == 2)
        on_tensor_cores<T>(a.c, count) ? multiply_on_tensor_cores(pass) : multiply_in_registers(pass);
      else
        multiply_in_registers(pass);
      __syncthreads();
      spread(pass, strip);
    }
  }
};

}  // namespace rfdarts::cuda
