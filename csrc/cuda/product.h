// Products of 1x1 convolutions whose inputs and outputs differ in number: [pixels][k] times [k][columns], both factors
// in shared memory, sums in registers over all chunks of k.
#pragma once
#include <type_traits>

#include "cuda/pointwise.h"

namespace rfdarts::cuda {

// most columns of a block's product; each 8 cost a thread 4 registers on tensor cores
constexpr int kManyColumns = 64, kFewColumns = 32;
// blocks of a multiprocessor that must have enough registers
template <class T>
constexpr int kProductBlocks = sizeof(T) == 8 ? 1 : 3;

// Of a block: its tile of pixels, its columns, the channels of a chunk, and those whose weights are in shared memory at
// once (a chunk's, or all).
struct ProductShape {
  int pixels, columns, ck, wk;
};

// One thread's share. Weights lie [k][columns], for tensor cores [columns][k]. Rows of the first factor are ldd apart,
// those of the weights ldw.
template <class T, bool TensorCores, int Columns>
struct Product {
  using Factor = Acc<T>;
  // no more than kThreads items of 4 pixels x 4 columns
  static constexpr int kGroup = 4, kChunk = 32;
  static int pixels(int columns) { return columns <= 16 ? 256 : columns <= 32 ? 128 : 64; }

  Factor acc[4][4] = {};
  int p, o, apart;

  __device__ explicit Product(const ProductShape& shape) : apart(shape.pixels / 4) {
    int groups = shape.columns / 4;
    p = threadIdx.x / groups, o = threadIdx.x % groups * 4;
  }
  __device__ void add(const Factor* ds, int ldd, const Factor* ws, int ldw, int k, int) {
    if (p < apart) multiply(ds + p * ldd, apart * ldd, k, ws + o, ldw, 4, acc);
  }
  // to [pixels][ld]
  __device__ void put(T* to, int ld, int) const {
    if (p >= apart) return;
#pragma unroll
    for (int i = 0; i < 4; i++) store<4>(to + (p + i * apart) * ld + o, acc[i]);
  }
};

// A warp has 16 pixels and all columns.
template <class T, int Columns>
struct Product<T, true, Columns> {
  using Factor = T;
  static constexpr int kGroup = 8, kChunk = 64;
  static int pixels(int) { return 16 * kWarps; }

  float acc[Columns / 8][4] = {};
  int pixel, g, t;

  __device__ explicit Product(const ProductShape&) {
    pixel = threadIdx.x / 32 * 16, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  }
  __device__ void add(const T* ds, int ldd, const T* ws, int ldw, int k, int columns) {
    const T *low = ds + (pixel + g) * ldd + 2 * t, *high = low + 8 * ldd, *column = ws + g * ldw + 2 * t;
#pragma unroll 1
    for (int i = 0; i < k; i += 16) {
      uint32_t a[4] = {pair_at(low + i), pair_at(high + i), pair_at(low + i + 8), pair_at(high + i + 8)};
#pragma unroll
      for (int j = 0; j < Columns / 8; j++)
        if (8 * j < columns) {
          const T* at = column + 8 * j * ldw + i;
          uint32_t b[2] = {pair_at(at), pair_at(at + 8)};
          multiply_tile<T>(acc[j], a, b);
        }
    }
  }
  __device__ void put(T* to, int ld, int columns) const {
#pragma unroll
    for (int j = 0; j < Columns / 8; j++)
      if (8 * j < columns) {
        float low[2] = {acc[j][0], acc[j][1]}, high[2] = {acc[j][2], acc[j][3]};
        T* at = to + (pixel + g) * ld + 8 * j + 2 * t;
        store<2>(at, low), store<2>(at + 8 * ld, high);
      }
  }
};

// Byte offsets in a block's shared memory.
template <class T, bool TensorCores>
struct ProductShared {
  using Factor = std::conditional_t<TensorCores, T, Acc<T>>;
  int ldd, ldw, ldy;
  int ws, ys, places, sums, bytes;

  __host__ __device__ explicit ProductShared(const ProductShape& s) {
    // rows next to each other begin in different banks
    constexpr int apart = 16 / int(sizeof(Factor));
    ldd = round_up(s.ck, 8) + apart;
    ldw = TensorCores ? round_up(s.wk, 8) + apart : s.columns;
    ldy = s.columns + 16 / int(sizeof(T));
    ws = round_up(s.pixels * ldd * int(sizeof(Factor)), 16);
    ys = ws + round_up((TensorCores ? s.columns : s.wk) * ldw * int(sizeof(Factor)), 16);
    places = ys + round_up(s.pixels * ldy * int(sizeof(T)), 16);
    sums = places + s.pixels * int(sizeof(int64_t));
    bytes = sums + 2 * kThreads * int(sizeof(Acc<T>));
  }
};

// ws = k x count weights, of which w [k][ldw] and its transpose wt [count][ldt] are in memory; 0 up to `columns`
template <bool Transposed, class A, class F>
__device__ void stage_weights(const A* w, int ldw, const A* wt, int ldt, int k, int count, int columns, F* ws, int ld) {
  if constexpr (Transposed) {
    for (int i = threadIdx.x; i < count * k; i += kThreads)
      ws[i / k * ld + i % k] = narrow<F>(wt[int64_t(i / k) * ldt + i % k]);
  } else {
    for (int i = threadIdx.x; i < columns * k; i += kThreads) {
      int row = i / columns, column = i % columns;
      ws[row * ld + column] = column < count ? w[int64_t(row) * ldw + column] : A(0);
    }
  }
}

}  // namespace rfdarts::cuda
