// state_backward.h for 16-bit storage and stride 1: see strip_backward.h. A thread has 4 channels of a pixel.
#pragma once
#include "cuda/state_backward.h"
#include "cuda/strip_backward.h"

namespace rfdarts::cuda {

template <class T>
struct StripStateBackward : StateBackward<T> {
  int group, reach;
};

// Shared memory of the pools' part, behind the staged sums: xs [rows][columns][c], the input with two pixels around; of
// the windows that reach the tile the gradients [2][rows - 2][columns - 2][c] of the maxima and averages, and where
// the maxima are, a byte each, 255 beyond the image.
template <class T, int H, int W>
struct StripPools {
  static constexpr int kRows = H + 4, kColumns = W + 4;
  static constexpr int kWindows = (H + 2) * (W + 2), kAcross = W + 2;  // kAcross: windows in a row
  int grads, where, bytes;

  __host__ __device__ explicit StripPools(int c) {
    grads = round_up(kRows * kColumns * c * int(sizeof(T)), 16);
    where = grads + 2 * kWindows * c * int(sizeof(float));
    bytes = round_up(where + kWindows * c, 16);
  }
};

template <class T, int H, int W>
struct StripPoolsBackward {
  const StripStateBackward<T>& a;
  Corner corner;
  unsigned char* shared;

  using P = StripPools<T, H, W>;
  P at{a.c};
  T* xs = reinterpret_cast<T*>(shared);
  float* grads = reinterpret_cast<float*>(shared + at.grads);
  uint8_t* where = shared + at.where;
  int c = a.c, quads = a.c / 4, ch = threadIdx.x % quads * 4, first = threadIdx.x / quads, step = kThreads / quads;

  __device__ float* grad(int pool, int window) const { return grads + (pool * P::kWindows + window) * c + ch; }

  __device__ void load_input() const {
    for (int p = first; p < P::kRows * P::kColumns; p += step) {
      int row = p / P::kColumns, y = corner.y - 2 + row, x = corner.x - 2 + p - row * P::kColumns;
      Pack<uint32_t, 2> pack = {kLowestPair<T>, kLowestPair<T>};
      if (unsigned(y) < unsigned(a.h) && unsigned(x) < unsigned(a.w))
        pack = *reinterpret_cast<const Pack<uint32_t, 2>*>(a.x.at(corner.n, y, x) + ch);
      *reinterpret_cast<Pack<uint32_t, 2>*>(xs + p * c + ch) = pack;
    }
  }

  // A row of a window, or several: sum and maximum of those inside the image; `place` as in Pooled.
  struct Window {
    float sum[4], most[4];
    int place[4];

    // what comes later wins if it is greater, or a NaN
    __device__ void take(int i, float value, int at) {
      if (value > most[i] || value != value) most[i] = value, place[i] = at;
    }
  };
  // pixels x - 1 .. x + 1 of a row of xs, of which the first is at `from`
  __device__ Window row_of(const T* from, int x) const {
    Window w;
    float value[3][4];
#pragma unroll
    for (int v = 0; v < 3; v++) load<4>(from + v * c, value[v]);
    bool left = x > 0, right = x + 1 < a.w;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      w.sum[i] = left ? value[0][i] + value[1][i] : value[1][i];
      w.most[i] = left ? value[0][i] : value[1][i];
      w.place[i] = left ? 0 : 1;
      if (left) w.take(i, value[1][i], 1);
      if (right) w.sum[i] += value[2][i], w.take(i, value[2][i], 2);
    }
    return w;
  }
  // The pools' coefficients, summed over their BatchNorms: the gradient is scale g + slope y + shift.
  struct Coefficients {
    float slope[4] = {}, shift[4] = {};
  };
  __device__ void add_coefficients(int norm, Coefficients& to) const {
    if (norm < 0) return;
    NormBackward<float, 4> one(a.coefficients + int64_t(norm) * 4 * c + ch, c);
#pragma unroll
    for (int i = 0; i < 4; i++) to.slope[i] += one.slope[i], to.shift[i] += one.shift[i] - one.slope[i] * one.mean[i];
  }
  __device__ void add_scaled(int norm, const float (&g)[4], float (&to)[4]) const {
    if (norm < 0) return;
    float scale[4];
    load<4>(a.coefficients + int64_t(norm) * 4 * c + ch, scale);
#pragma unroll
    for (int i = 0; i < 4; i++) to[i] += scale[i] * g[i];
  }
  __device__ void gradient_of_window(int number, int y, int x, const Window& w, const Coefficients& of_max,
                                     const Coefficients& of_avg) const {
    float size = float(window(y, a.h) * window(x, a.w)), grad_max[4], grad_avg[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float avg = widen(narrow<T>(w.sum[i] / size));
      // as in NormBackward, running statistics have no slope
      grad_max[i] = of_max.shift[i] + (of_max.slope[i] != 0 ? of_max.slope[i] * w.most[i] : 0.f);
      grad_avg[i] = of_avg.shift[i] + (of_avg.slope[i] != 0 ? of_avg.slope[i] * avg : 0.f);
    }
    for (int e = 0; e < a.leaving; e++) {
      const auto& edge = a.edge[e];
      float g[4];
      load<4>(edge.g.at(corner.n, y, x) + ch, g);
      add_scaled(edge.max_norm, g, grad_max);
      add_scaled(edge.avg_norm, g, grad_avg);
    }
    uint32_t places = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) grad_avg[i] /= size, places |= uint32_t(w.place[i]) << 8 * i;
    store<4>(grad(0, number), grad_max);
    store<4>(grad(1, number), grad_avg);
    *reinterpret_cast<uint32_t*>(where + number * c + ch) = places;
  }

  // Columns of windows are cut into pieces; a thread walks down one.
  __device__ void gradients_of_windows() const {
    constexpr int piece = 6;
    Coefficients of_max, of_avg;
    for (int e = 0; e < a.leaving; e++) {
      add_coefficients(a.edge[e].max_norm, of_max);
      add_coefficients(a.edge[e].avg_norm, of_avg);
    }
    constexpr int down = H + 2;
    for (int p = first; p < ceil_div(down, piece) * P::kAcross; p += step) {
      int column = p % P::kAcross, row = p / P::kAcross * piece, last = min(row + piece, down);
      int x = corner.x - 1 + column;
      const T* from = xs + (row * P::kColumns + column) * c + ch;
      bool inside = unsigned(x) < unsigned(a.w);
      Window above, here = row_of(from, x);
      // its windows' middle row is row + 1 of xs
      Window below = row_of(from + P::kColumns * c, x);
#pragma unroll 1
      for (; row < last; row++) {
        int y = corner.y - 1 + row, number = row * P::kAcross + column;
        above = here, here = below;
        from += P::kColumns * c;
        below = row_of(from + P::kColumns * c, x);
        if (!inside || unsigned(y) >= unsigned(a.h)) {
          *reinterpret_cast<uint32_t*>(where + number * c + ch) = ~0u;
          continue;
        }
        Window all = y > 0 ? above : here;
#pragma unroll
        for (int i = 0; i < 4; i++) {
          if (y > 0)
            all.sum[i] += here.sum[i], all.take(i, here.most[i], here.place[i] + 3);
          else
            all.place[i] += 3;
          if (y + 1 < a.h) all.sum[i] += below.sum[i], all.take(i, below.most[i], below.place[i] + 6);
        }
        gradient_of_window(number, y, x, all, of_max, of_avg);
      }
    }
  }
  // to += what the windows around row r, column q of the tile send back
  __device__ void spread(int r, int q, float (&to)[4]) const {
#pragma unroll 1
    for (int u = 0; u < 3; u++)
#pragma unroll
      for (int v = 0; v < 3; v++) {
        // the pixel has place 8 - 3 u - v in window (u, v) of those around it
        int window = (r + u) * P::kAcross + q + v, own = 8 - 3 * u - v;
        uint32_t places = *reinterpret_cast<const uint32_t*>(where + window * c + ch);
        if (places == ~0u) continue;
        float grad_max[4], grad_avg[4];
        load<4>(grad(0, window), grad_max), load<4>(grad(1, window), grad_avg);
#pragma unroll
        for (int i = 0; i < 4; i++)
          to[i] += grad_avg[i] + (int(places >> 8 * i & 255) == own ? grad_max[i] : 0.f);
      }
  }
  // fills shared memory for `spread`
  __device__ void prepare() const {
    load_input();
    __syncthreads();
    gradients_of_windows();
  }
};

// One block per tile of the state: its column, its row, its image. No register keeps where that is.
template <class T, int H, int W>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    strip_state_backward_kernel(const __grid_constant__ StripStateBackward<T> a) {
  RFDARTS_SHARED(shared);
  StripBackwardTile<T, H, W> tile(a.c, a.group, a.reach);
  auto corner = [] { return Corner{int(blockIdx.z), int(blockIdx.y) * H, int(blockIdx.x) * W}; };
  const float* stage;
  {
    StripBackward<T, H, W> block{a, tile, a.group, shared, corner()};
    block.clear(a.reach);
    for (int b0 = 0; b0 < a.branches; b0 += a.group)
      block.add(min(a.group, a.branches - b0),
                [&](int k) -> const BackwardBranch<T>& { return a.branch[b0 + k]; });
    stage = block.stage();
  }
  StripPoolsBackward<T, H, W> pools{a, corner(), shared + tile.staged};
  if (a.pools) pools.prepare();
  __syncthreads();
  int quads = a.c / 4, ch = threadIdx.x % quads * 4, n = corner().n;
  for (int p = threadIdx.x / quads; p < H * W; p += kThreads / quads) {
    int strip = p / kStrip, r = strip % H, q = strip / H * kStrip + p % kStrip;
    int y = corner().y + r, x = corner().x + q;
    if (y >= a.h || x >= a.w) continue;
    float input[4], sum[4] = {};
    load<4>(a.x.at(n, y, x) + ch, input);
    for (int k = 0; k < a.group; k++)
#pragma unroll
      for (int i = 0; i < 4; i++) sum[i] += stage[(k * a.c + ch + i) * tile.kStage + p];
    // the convolutions' ReLU
#pragma unroll
    for (int i = 0; i < 4; i++) sum[i] = input[i] <= 0 ? 0.f : sum[i];
    if (a.pools) pools.spread(r, q, sum);
    for (int e = 0; e < a.leaving; e++) {
      const auto& edge = a.edge[e];
      if (edge.identity_op < 0) continue;
      float term_weight = a.op_weights[edge.identity_op], g[4];
      if (a.edge_weights) term_weight *= a.edge_weights[edge.edge];
      load<4>(edge.g.at(n, y, x) + ch, g);
#pragma unroll
      for (int i = 0; i < 4; i++) sum[i] += term_weight * g[i];
    }
    if (a.outer.data) {
      float outer[4];
      load<4>(a.outer.at(n, y, x) + ch, outer);
#pragma unroll
      for (int i = 0; i < 4; i++) sum[i] += outer[i];
    }
    store<4>(a.grad_x + ((int64_t(n) * a.h + y) * a.w + x) * a.channels + ch, sum);
  }
}

}  // namespace rfdarts::cuda
