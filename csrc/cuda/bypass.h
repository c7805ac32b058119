// The channels that bypass a mixed op, for K > 1: they pass as they are, or through a 2x2 maximum where it halves.
#pragma once
#include "cuda/params.h"

namespace rfdarts::cuda {

// V channels at `from`, a pixel of x, or their 2x2 maximum from there on. A NaN wins.
template <class T, int V>
__device__ __forceinline__ void bypass_at(const ImageView<T>& x, int stride, const T* from, Acc<T> (&value)[V]) {
  load<V>(from, value);
  if (stride == 1) return;
#pragma unroll
  for (int k = 1; k < 4; k++) {
    Acc<T> other[V];
    load<V>(from + k / 2 * x.row + k % 2 * x.pixel, other);
#pragma unroll
    for (int i = 0; i < V; i++)
      if (other[i] > value[i] || other[i] != other[i]) value[i] = other[i];
  }
}

// grad_x from channel c on = sum over leaving edges of edge weight g, through the 2x2 maximum where the stride is 2
// (its first maximum takes all), + outer.
template <class T>
struct BypassBackward {
  ImageView<T> x, outer;  // outer: gradient from outside the cell, or null
  T* grad_x;              // [images][h][w][channels]
  const Acc<T>* edge_weights;  // or null
  int images, h, w, oh, ow, c, channels, stride;
  int leaving;
  struct Leaving {
    ImageView<T> g;
    int edge;
  } edge[kMaxIncoming];
};

template <class T>
__global__ void __launch_bounds__(kThreads, kMostResident)
    bypass_backward_kernel(const __grid_constant__ BypassBackward<T> a) {
  using A = Acc<T>;
  int stride = a.stride, K = a.channels / a.c, rest = a.channels - a.c;
  int64_t pixels = int64_t(a.h) * a.w, items = a.images * pixels * rest;
  int64_t first = int64_t(blockIdx.x) * kThreads + threadIdx.x, apart = int64_t(gridDim.x) * kThreads;
  for (int64_t item = first; item < items; item += apart) {
    int ch = a.c + int(item % rest), group = ch / a.c, from = ch % a.c * K + group;
    int64_t pixel = item / rest;
    int n = int(pixel / pixels), y = int(pixel % pixels) / a.w, x = int(pixel % pixels) % a.w;
    bool takes = y / stride < a.oh && x / stride < a.ow;
    if (stride == 2 && takes) {
      int best = 0;
      A top = A(-INFINITY);
      for (int k = 0; k < 4; k++) {
        A value = widen(a.x.at(n, y / 2 * 2 + k / 2, x / 2 * 2 + k % 2)[ch]);
        if (value > top || value != value) top = value, best = k;
      }
      takes = best == y % 2 * 2 + x % 2;
    }
    A sum = a.outer.data ? widen(a.outer.at(n, y, x)[ch]) : A(0);
    if (takes)
      for (int e = 0; e < a.leaving; e++) {
        A weight = a.edge_weights ? a.edge_weights[a.edge[e].edge] : A(1);
        sum += weight * widen(a.edge[e].g.at(n, y / stride, x / stride)[from]);
      }
    a.grad_x[pixel * a.channels + ch] = narrow<T>(sum);
  }
}

}  // namespace rfdarts::cuda
