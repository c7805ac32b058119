// The 3x3 pools.
#pragma once
#include "cuda/params.h"

namespace rfdarts::cuda {

// 3x3 windows with padding 1, clipped at the border; at(y, x) gives the values of V channels. The maximum as in
// torch: the last NaN wins, else the first of equals. The mean is rounded as if it were stored.
template <class T, int V>
struct Pooled {
  Acc<T> max[V], avg[V];
  // place of the maximum in its window, row-major
  int where[V];

  template <class At>
  __device__ void compute(int y, int x, int h, int w, At&& at) {
    // where all are lowest, the first one inside the image
    int size = 0, first = 3 * (y == 0) + (x == 0);
#pragma unroll
    for (int i = 0; i < V; i++) max[i] = Acc<T>(-INFINITY), avg[i] = 0, where[i] = first;
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

// pixels of a window around `centre` that lie in [0, n)
__device__ __forceinline__ int window(int centre, int n) { return 1 + (centre > 0) + (centre < n - 1); }

}  // namespace rfdarts::cuda
