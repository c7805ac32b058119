// Tiles in shared memory: [rows][pitch], a row being columns x ck channels.
#pragma once
#include "cuda/mma.h"
#include "cuda/params.h"

namespace rfdarts::cuda {

// Rows of fewer than 128 bytes a pixel are spread over the banks: neighbouring rows differ by one pixel.
__host__ __device__ inline int tile_pitch(int columns, int ck, int item) {
  int bank_row = 128 / item, row = columns * ck;
  return ck >= bank_row ? row : ceil_div(row, bank_row) * bank_row + ck;
}
__host__ __device__ inline int round_up(int n, int to) { return (n + to - 1) / to * to; }

// How threads share [pixels][ck]: a thread keeps its V channels, so that their coefficients stay in registers.
template <int V>
struct Lanes {
  int channel, pixel, step;
  __device__ explicit Lanes(int ck) {
    int lanes = ceil_div(ck, V), id = threadIdx.x;
    step = kThreads / lanes;
    channel = id % lanes * V;
    // threads that are left over have no pixel
    pixel = id < step * lanes ? id / lanes : 1 << 30;
  }
};

// xs = x, or relu-free scale x + shift where norm >= 0; 0 outside the image. y0, x0: the tile's first pixel.
template <class T, int V>
__device__ void load_tile(const Images<T>& x, const Norms<T>& norms, int norm, int n, int y0, int x0, int rows,
                          int columns, int h, int w, int c0, int count, int ck, int pitch, T* xs) {
  Lanes<V> lane(count);
  Acc<T> scale[V], shift[V];
  if (norm >= 0) {
#pragma unroll
    for (int i = 0; i < V; i++) {
      int ch = c0 + lane.channel + i;
      scale[i] = norms.scale(norm, ch);
      shift[i] = norms.beta[norm * norms.c + ch] - norms.centre(norm, ch) * scale[i];
    }
  }
  for (int p = lane.pixel; p < rows * columns; p += lane.step) {
    int r = p / columns, q = p % columns, y = y0 + r, z = x0 + q;
    Acc<T> v[V] = {};
    if (unsigned(y) < unsigned(h) && unsigned(z) < unsigned(w)) {
      load<V>(x.at(n, y, z) + c0 + lane.channel, v);
      if (norm >= 0) {
#pragma unroll
        for (int i = 0; i < V; i++) v[i] = scale[i] * v[i] + shift[i];
      }
    }
    store<V>(xs + r * pitch + q * ck + lane.channel, v);
  }
}

// ds[pixel][c0 + channel] = depthwise convolution of relu(xs); a thread computes kStrip neighbours of one channel
template <int K, int D, int S, class T>
__device__ void depthwise(const T* xs, int pitch, int ck, int reach, const Acc<T>* taps, int c, int c0, int count,
                          int th, int tw, Acc<T>* ds, int ld) {
  constexpr int R = (K - 1) * D / 2;
  int strips = tw / kStrip;
  for (int i = threadIdx.x; i < count * th * strips; i += kThreads) {
    int ch = i % count, r = i / count % th, x0 = i / (count * th) * kStrip;
    Acc<T> acc[kStrip] = {};
#pragma unroll 1
    for (int u = 0; u < K; u++) {
      const T* row = xs + (r * S + u * D + reach - R) * pitch + (x0 * S + reach - R) * ck + ch;
      Acc<T> tap[K];
#pragma unroll
      for (int v = 0; v < K; v++) tap[v] = taps[(u * K + v) * c + c0 + ch];
#pragma unroll
      for (int j = 0; j < (kStrip - 1) * S + (K - 1) * D + 1; j++) {
        Acc<T> value = relu(widen(row[j * ck]));
#pragma unroll
        for (int v = 0; v < K; v++) {
          int o = j - v * D;
          if (o >= 0 && o % S == 0 && o / S < kStrip) acc[o / S] += value * tap[v];
        }
      }
    }
#pragma unroll
    for (int o = 0; o < kStrip; o++) ds[(r * tw + x0 + o) * ld + c0 + ch] = acc[o];
  }
}

// acc += transpose of a depthwise convolution, from es [rows][pitch] of the output's pixels that begins at
// (ey, ex), to kStrip neighbours of one channel that begin at (y, x); x is a multiple of kStrip
template <int K, int D, int S, class A>
__device__ void depthwise_transposed(const A* es, int pitch, int ck, int ey, int ex, const A* taps, int c, int ch,
                                     int y, int x, A (&acc)[kStrip]) {
  constexpr int R = (K - 1) * D / 2;
  // columns of es that a strip depends on, relative to x / S
  constexpr int first = -(R / S), last = (kStrip - 1 + R) / S;
#pragma unroll 1
  for (int u = 0; u < K; u++) {
    int twice = y + R - u * D;
    if (twice % S) continue;
    const A* row = es + (twice / S - ey) * pitch - ex * ck;
    A tap[K];
#pragma unroll
    for (int v = 0; v < K; v++) tap[v] = taps[(u * K + v) * c + ch];
#pragma unroll
    for (int q = first; q <= last; q++) {
      A value = row[(x / S + q) * ck];
#pragma unroll
      for (int v = 0; v < K; v++) {
        int o = q * S - R + v * D;
        if (o >= 0 && o < kStrip) acc[o] += value * tap[v];
      }
    }
  }
}

template <class A>
__device__ __forceinline__ void load_weights(const A* w, int n, A (&to)[4]) {
  if (n >= 4 && (reinterpret_cast<uintptr_t>(w) & (4 * sizeof(A) - 1)) == 0)
    return load<4>(w, to);
#pragma unroll
  for (int i = 0; i < 4; i++) to[i] = i < n ? w[i] : A(0);
}

// acc[pixel][output] += d[pixel][i] w[i][output] for 4 pixels that lie `apart` rows of d apart, 4 outputs
template <class A>
__device__ __forceinline__ void multiply(const A* d, int apart, int ci, const A* w, int ldw, int outputs,
                                         A (&acc)[4][4]) {
  int i = 0;
#pragma unroll 1
  for (; i + 4 <= ci; i += 4) {
    A a[4][4];
#pragma unroll
    for (int p = 0; p < 4; p++) load<4>(d + p * apart + i, a[p]);
#pragma unroll
    for (int k = 0; k < 4; k++) {
      A b[4];
      load_weights(w + (i + k) * ldw, outputs, b);
#pragma unroll
      for (int p = 0; p < 4; p++)
#pragma unroll
        for (int o = 0; o < 4; o++) acc[p][o] += a[p][k] * b[o];
    }
  }
#pragma unroll 1
  for (; i < ci; i++) {
    A b[4];
    load_weights(w + i * ldw, outputs, b);
#pragma unroll
    for (int p = 0; p < 4; p++)
#pragma unroll
      for (int o = 0; o < 4; o++) acc[p][o] += d[p * apart + i] * b[o];
  }
}

// f(K, D) as constants
template <class F>
__device__ __forceinline__ void with_kernel(int kernel, int dilation, F&& f) {
  if (kernel == 3)
    dilation == 1 ? f.template operator()<3, 1>() : f.template operator()<3, 2>();
  else
    dilation == 1 ? f.template operator()<5, 1>() : f.template operator()<5, 2>();
}

// 3x3 windows with padding 1, clipped at the border; at(y, x) gives the values of V channels. The maximum as in
// torch: a NaN wins, and the first of equals. The mean is rounded as if it were stored.
template <class T, int V>
struct Pooled {
  Acc<T> max[V], avg[V];
  // place of the maximum in its window, row-major
  int where[V];

  template <class At>
  __device__ void compute(int y, int x, int h, int w, At&& at) {
    int size = 0;
#pragma unroll
    for (int i = 0; i < V; i++) max[i] = Acc<T>(-INFINITY), avg[i] = 0, where[i] = 0;
#pragma unroll
    for (int u = -1; u <= 1; u++)
#pragma unroll
      for (int v = -1; v <= 1; v++) {
        if (unsigned(y + u) >= unsigned(h) || unsigned(x + v) >= unsigned(w)) continue;
        Acc<T> value[V];
        at(y + u, x + v, value);
        size++;
#pragma unroll
        for (int i = 0; i < V; i++) {
          avg[i] += value[i];
          if (value[i] > max[i] || value[i] != value[i]) max[i] = value[i], where[i] = (u + 1) * 3 + v + 1;
        }
      }
#pragma unroll
    for (int i = 0; i < V; i++) avg[i] = widen(narrow<T>(avg[i] / Acc<T>(size)));
  }
};

__device__ __forceinline__ int window(int centre, int n) { return 1 + (centre > 0) + (centre < n - 1); }

}  // namespace rfdarts::cuda
