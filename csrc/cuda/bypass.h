// The channels that bypass a mixed op, for K > 1: they pass as they are, or through a 2x2 maximum where it halves.
#pragma once
#include "cuda/params.h"

namespace rfdarts::cuda {

// N elements, in vectors of V
template <int V, int N, class T>
__device__ __forceinline__ void load_by(const T* from, Acc<T> (&to)[N]) {
#pragma unroll
  for (int i = 0; i < N; i += V) {
    Acc<T> part[V];
    load<V>(from + i, part);
#pragma unroll
    for (int j = 0; j < V; j++) to[i + j] = part[j];
  }
}

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

// A thread: V channels of each of the K - 1 groups at one pixel. In g they lie together, K V elements.
template <class T, int K, int V>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    bypass_backward_kernel(const __grid_constant__ BypassBackward<T> a) {
  using A = Acc<T>;
  constexpr int width = V == 1 ? 1 : K * V;
  int stride = a.stride;
  unsigned vectors = a.c / V, wide = a.w, high = a.h, items = a.images * high * wide * vectors;
  for (unsigned item = blockIdx.x * kThreads + threadIdx.x; item < items; item += gridDim.x * kThreads) {
    unsigned pixel = item / vectors, line = pixel / wide, n = line / high;
    int ch = int(item - pixel * vectors) * V, x = int(pixel - line * wide), y = int(line - n * high);
    bool inside = y / stride < a.oh && x / stride < a.ow;
    A sum[K][V] = {};
    if (inside)
      for (int e = 0; e < a.leaving; e++) {
        A weight = a.edge_weights ? a.edge_weights[a.edge[e].edge] : A(1), g[K * V];
        load_by<width>(a.edge[e].g.at(n, y / stride, x / stride) + ch * K, g);
#pragma unroll
        for (int k = 1; k < K; k++)
#pragma unroll
          for (int i = 0; i < V; i++) sum[k][i] += weight * g[i * K + k];
      }
#pragma unroll
    for (int k = 1; k < K; k++) {
      A outer[V] = {}, top[V];
      if (a.outer.data) load<V>(a.outer.at(n, y, x) + k * a.c + ch, outer);
      int best[V] = {};
      if (stride == 2 && inside) {
#pragma unroll
        for (int i = 0; i < V; i++) top[i] = A(-INFINITY);
#pragma unroll
        for (int place = 0; place < 4; place++) {
          A value[V];
          load<V>(a.x.at(n, y / 2 * 2 + place / 2, x / 2 * 2 + place % 2) + k * a.c + ch, value);
#pragma unroll
          for (int i = 0; i < V; i++)
            if (value[i] > top[i] || value[i] != value[i]) top[i] = value[i], best[i] = place;
        }
      }
#pragma unroll
      for (int i = 0; i < V; i++) outer[i] += stride == 1 || best[i] == y % 2 * 2 + x % 2 ? sum[k][i] : A(0);
      store<V>(a.grad_x + int64_t(pixel) * a.channels + k * a.c + ch, outer);
    }
  }
}

}  // namespace rfdarts::cuda
