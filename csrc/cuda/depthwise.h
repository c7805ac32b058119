// Depthwise convolutions between tiles in shared memory; a thread computes kStrip neighbours of one channel.
#pragma once
#include "cuda/tile.h"

namespace rfdarts::cuda {

// f(kernel, dilation) as constants
template <class F>
__device__ __forceinline__ void with_kernel(int kernel, int dilation, F&& f) {
  if (kernel == 3)
    dilation == 1 ? f.template operator()<3, 1>() : f.template operator()<3, 2>();
  else
    dilation == 1 ? f.template operator()<5, 1>() : f.template operator()<5, 2>();
}

// ds[pixel][c0 + channel] = depthwise convolution of relu(xs) for `count` channels. Tile: see ForwardTile.
template <int K, int D, int S, class T, class Tile>
__device__ void depthwise(const Tile& tile, const T* xs, const Acc<T>* taps, int c, int c0, int count, Acc<T>* ds) {
  constexpr int R = (K - 1) * D / 2;
  int th = tile.th, tw = tile.tw, ck = tile.ck, strips = tw / kStrip;
  for (int i = threadIdx.x; i < count * th * strips; i += kThreads) {
    int ch = i % count, r = i / count % th, x0 = i / (count * th) * kStrip;
    Acc<T> acc[kStrip] = {};
#pragma unroll 1
    for (int u = 0; u < K; u++) {
      const T* row = xs + (r * S + u * D + tile.reach - R) * tile.pitch + (x0 * S + tile.reach - R) * ck + ch;
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
    for (int o = 0; o < kStrip; o++) ds[(r * tw + x0 + o) * tile.ld + c0 + ch] = acc[o];
  }
}

// One thread's share of a tile of the input's gradient: kStrip neighbours of one channel.
template <class A>
struct Strip {
  int channel, y, x;
  bool valid;
  A acc[kStrip];

  __device__ Strip(const Tiling& t, int count) : acc{} {
    int id = threadIdx.x;
    channel = id % count;
    y = id / count % t.th;
    x = id / (count * t.th) * kStrip;
    valid = x < t.tw;
  }
};

// strip += transpose of a depthwise convolution of grad_ds [rows][pitch], ck apart, of the outputs from (first_y,
// first_x) on, relative to the tile's corner; taps and grad_ds: of the strip's channel
template <int K, int D, int S, class A>
__device__ void depthwise_transposed(const A* grad_ds, int pitch, int ck, int first_y, int first_x, const A* taps,
                                     int c, Strip<A>& strip) {
  constexpr int R = (K - 1) * D / 2;
  // columns of grad_ds that a strip depends on, relative to x / S
  constexpr int first = -(R / S), last = (kStrip - 1 + R) / S;
#pragma unroll 1
  for (int u = 0; u < K; u++) {
    int twice = strip.y + R - u * D;
    if (twice % S) continue;
    const A* row = grad_ds + (twice / S - first_y) * pitch - first_x * ck;
    A tap[K];
#pragma unroll
    for (int v = 0; v < K; v++) tap[v] = taps[(u * K + v) * c];
#pragma unroll
    for (int q = first; q <= last; q++) {
      A value = row[(strip.x / S + q) * ck];
#pragma unroll
      for (int v = 0; v < K; v++) {
        int o = q * S - R + v * D;
        if (o >= 0 && o < kStrip) strip.acc[o] += value * tap[v];
      }
    }
  }
}

}  // namespace rfdarts::cuda
