// 1x1 convolutions with as many outputs as inputs, between tiles in shared memory; weights stay in global memory.
#pragma once
#include "cuda/mma.h"
#include "cuda/tile.h"

namespace rfdarts::cuda {

template <class A>
__device__ __forceinline__ void load_weights(const A* w, int n, A (&to)[4]) {
  if (n >= 4 && (reinterpret_cast<uintptr_t>(w) & (4 * sizeof(A) - 1)) == 0) return load<4>(w, to);
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

}  // namespace rfdarts::cuda
