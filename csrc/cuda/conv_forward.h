// Stages 1 and 2 of a cell forward: all branches that read a tile, from one load of it.
#pragma once
#include "cuda/tile.h"

namespace rfdarts::cuda {

// Byte offsets in a block's shared memory.
template <class T>
struct ForwardShared {
  int rows, columns, pitch, pixels, ld;
  int ds, ys, sums, middles, bytes;  // middles: what each channel's moments are taken about

  __host__ __device__ ForwardShared(const Tiling& t, int c, int reach, int stride) {
    rows = (t.th - 1) * stride + 1 + 2 * reach;
    columns = (t.tw - 1) * stride + 1 + 2 * reach;
    pitch = tile_pitch(columns, t.ck, sizeof(T));
    pixels = t.th * t.tw;
    // four consecutive rows of ds lie in different banks
    ld = round_up(c, 4) + 4;
    ds = round_up(rows * pitch * int(sizeof(T)), 16);
    ys = ds + pixels * ld * int(sizeof(Acc<T>));
    sums = round_up(ys + pixels * c * int(sizeof(T)), 16);
    middles = sums + 2 * (kThreads > c ? kThreads : c) * int(sizeof(Acc<T>));
    bytes = middles + c * int(sizeof(Acc<T>));
  }
};

// ys [pixels][c] columns [begin, end) = ds w, w [c][c]
template <class T>
__device__ void pointwise(const Acc<T>* ds, int ld, int pixels, const Acc<T>* w, int c, int begin, int end, T* ys) {
  if constexpr (sizeof(T) == 2)
    if (on_tensor_cores<T>(c, end - begin)) {
      int columns = (end - begin) / 8, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
      for (int tile = threadIdx.x / 32; tile < pixels / 16 * columns; tile += kWarps) {
        int p0 = tile / columns * 16, o0 = begin + tile % columns * 8;
        float acc[4] = {};
        multiply_warp<T>(ds, ld, p0, c, w, c, o0, acc);
#pragma unroll
        for (int r = 0; r < 4; r++) ys[(p0 + g + r / 2 * 8) * c + o0 + 2 * t + r % 2] = narrow<T>(acc[r]);
      }
      return;
    }
  int groups = ceil_div(end - begin, 4), apart = pixels / 4;
  for (int i = threadIdx.x; i < groups * apart; i += kThreads) {
    int o = begin + i % groups * 4, p = i / groups, outputs = end - o;
    Acc<T> acc[4][4] = {};
    multiply(ds + p * ld, apart * ld, c, w + o, c, outputs, acc);
#pragma unroll
    for (int k = 0; k < 4; k++)
#pragma unroll
      for (int j = 0; j < 4; j++)
        if (j < outputs) ys[(p + k * apart) * c + o + j] = narrow<T>(acc[k][j]);
  }
}

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

template <class T, int S>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    conv_forward_kernel(const __grid_constant__ ConvForward<T> a) {
  RFDARTS_SHARED(shared);
  using A = Acc<T>;
  const Tiling& t = a.tiling;
  ForwardShared<T> at(t, a.c, a.reach, S);
  T* xs = reinterpret_cast<T*>(shared);
  A* ds = reinterpret_cast<A*>(shared + at.ds);
  T* ys = reinterpret_cast<T*>(shared + at.ys);
  A *sums = reinterpret_cast<A*>(shared + at.sums), *middles = reinterpret_cast<A*>(shared + at.middles);
  int n, y0, x0;
  t.place(blockIdx.x, n, y0, x0);
  int vh = min(t.th, a.oh - y0), vw = min(t.tw, a.ow - x0), c = a.c;

  for (int b = 0; b < a.branches; b++) {
    const auto& branch = a.branch[b];
    bool pools = branch.op == int(Op::MaxPool) || branch.op == int(Op::AvgPool);
    int passes = branch.op == int(Op::Reduce) ? 2 : 1;
    for (int pass = 0; pass < passes; pass++) {
      for (int c0 = 0; c0 < c; c0 += t.ck) {
        int count = min(t.ck, c - c0);
        // branches of one source find it still in shared memory
        if (t.ck < c || b == 0 || branch.x.data != a.branch[b - 1].x.data) {
          __syncthreads();
          if (a.wide)
            load_tile<T, kWide<T>>(branch.x, a.norms, branch.norm, n, y0 * S - a.reach, x0 * S - a.reach, at.rows,
                                   at.columns, a.h, a.w, c0, count, t.ck, at.pitch, xs);
          else
            load_tile<T, 1>(branch.x, a.norms, branch.norm, n, y0 * S - a.reach, x0 * S - a.reach, at.rows,
                            at.columns, a.h, a.w, c0, count, t.ck, at.pitch, xs);
          __syncthreads();
        }
        if (pools) {
          for (int i = threadIdx.x; i < vh * vw * count; i += kThreads) {
            int ch = i % count, q = i / count % vw, r = i / (count * vw);
            Pooled<T, 1> pooled;
            pooled.compute((y0 + r) * S, (x0 + q) * S, a.h, a.w, [&](int y, int x, A (&v)[1]) {
              v[0] = widen(xs[(y - y0 * S + a.reach) * at.pitch + (x - x0 * S + a.reach) * t.ck + ch]);
            });
            bool max = branch.op == int(Op::MaxPool);
            ys[(r * t.tw + q) * c + c0 + ch] = narrow<T>(max ? pooled.max[0] : pooled.avg[0]);
          }
        } else if (branch.op == int(Op::Reduce)) {
          // FactorizedReduce: the second half of its outputs reads one pixel further
          for (int i = threadIdx.x; i < at.pixels * count; i += kThreads) {
            int ch = i % count, p = i / count;
            int from = (p / t.tw * S + a.reach + pass) * at.pitch + (p % t.tw * S + a.reach + pass) * t.ck + ch;
            ds[p * at.ld + c0 + ch] = relu(widen(xs[from]));
          }
        } else {
          with_kernel(branch.kernel, branch.dilation, [&]<int K, int D>() {
            depthwise<K, D, S>(xs, at.pitch, t.ck, a.reach, a.weights + branch.weight, c, c0, count, t.th, t.tw, ds,
                               at.ld);
          });
        }
      }
      __syncthreads();
      if (pools) continue;
      bool reduces = branch.op == int(Op::Reduce);
      int64_t taps = reduces ? int64_t(pass) * c : branch.kernel * branch.kernel;
      int half = c / 2, begin = reduces && pass ? half : 0, end = reduces && !pass ? half : c;
      pointwise<T>(ds, at.ld, at.pixels, a.weights + branch.weight + taps * c, c, begin, end, ys);
      __syncthreads();
    }

    if (branch.y) {
      int row = vw * c;
      for (int r = 0; r < vh; r++) {
        T* to = branch.y + n * a.image + (int64_t(y0 + r) * a.ow + x0) * c;
        const T* from = ys + r * t.tw * c;
        if (a.wide)
          for (int i = threadIdx.x * kWide<T>; i < row; i += kThreads * kWide<T>)
            *reinterpret_cast<Pack<T, kWide<T>>*>(to + i) = *reinterpret_cast<const Pack<T, kWide<T>>*>(from + i);
        else
          for (int i = threadIdx.x; i < row; i += kThreads) to[i] = from[i];
      }
    }
    if (!a.partial) continue;
    int groups = max(1, kThreads / c), size = groups * c;
    for (int i = threadIdx.x; i < size; i += kThreads) {
      int ch = i % c;
      A shift = middle(ys + ch, c, t.tw, vh, vw), sum = 0, square = 0;
      for (int p = i / c; p < vh * vw; p += groups) {
        A off = widen(ys[(p / vw * t.tw + p % vw) * c + ch]) - shift;
        sum += off;
        square += off * off;
      }
      if (i < c) middles[ch] = shift;
      sums[2 * i] = sum;
      sums[2 * i + 1] = square;
    }
    __syncthreads();
    double* out = a.partial + int64_t(b) * 2 * t.count * c;
    for (int ch = threadIdx.x; ch < c; ch += kThreads) {
      A sum = 0, square = 0;
      for (int g = 0; g < groups; g++) {
        sum += sums[2 * (g * c + ch)];
        square += sums[2 * (g * c + ch) + 1];
      }
      A mean = sum / A(vh * vw);
      out[int64_t(blockIdx.x) * c + ch] = double(middles[ch] + mean);
      out[(int64_t(t.count) + blockIdx.x) * c + ch] = double(square - sum * mean);
    }
    // the next branch overwrites ys only after the barrier that follows its depthwise part
    if (b + 1 < a.branches && (a.branch[b + 1].op == int(Op::MaxPool) || a.branch[b + 1].op == int(Op::AvgPool)))
      __syncthreads();
  }
}

// Chan's merge of the tiles' moments, in a fixed order. One block per target and kMergeChannels.
constexpr int kMergeChannels = 8;
template <int Channels>
__global__ void __launch_bounds__(kThreads) merge_moments_kernel(const __grid_constant__ Moments a) {
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
      int n, y, x;
      a.tiling.place(t, n, y, x);
      double pixels = min(a.tiling.th, a.h - y) * min(a.tiling.tw, a.w - x), tile = mean_of[int64_t(t) * a.c];
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
