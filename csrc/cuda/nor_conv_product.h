// Convolutions of NAS-Bench-201, from all channels to all, as products of a tile in shared memory with the matrices of
// the kernel's taps, which stay in global memory: on tensor cores as nor_conv_factors.h lays them out, of the storage
// type, else as they are packed, of the type of arithmetic.
#pragma once
#include <type_traits>

#include "cuda/pointwise.h"
#include "cuda/strips.h"

namespace rfdarts::cuda {

// most sixteens of pixels of a warp's item
constexpr int kWarpSixteens = 4;

// A tile of th x tw pixels with `reach` more around: [rows][columns][ld] factors.
template <class T, bool TensorCores>
struct NorConvTile {
  using Factor = std::conditional_t<TensorCores, T, Acc<T>>;
  int th, tw, c, reach;
  int rows, columns, pixels, ld;

  __host__ __device__ NorConvTile(const Tiling& t, int c, int reach)
      : th(t.th), tw(t.tw), c(c), reach(reach), rows(th + 2 * reach), columns(tw + 2 * reach), pixels(th * tw) {
    // on tensor cores, 16 bytes of eight neighbouring pixels lie in different banks
    ld = TensorCores ? c + 8 : round_up(c, 4) + 4;
  }
  __host__ __device__ int bytes() const { return round_up(rows * columns * ld * int(sizeof(Factor)), 16); }
  // of the pixel at (y, x) from the tile's corner
  __device__ int at(int y, int x) const { return ((y + reach) * columns + x + reach) * ld; }
};

// Matrices of a convolution whose packed ones begin at `weight`: the taps [kernel^2][c inputs][c outputs], or factors.
// back: of the transposed convolution, which has them behind the others, or factors of its own.
template <class T, bool TensorCores>
__device__ auto matrices_of(const Acc<T>* conv_weights, const T* factors, int64_t weight, int kernel, int c,
                            bool back) {
  if constexpr (TensorCores)
    return factors + weight / 2;
  else
    return conv_weights + weight + (back ? kernel * kernel * c * c : 0);
}

// The convolution of a tile. begin(p, o, sums) sets the sums of pixel p and the outputs from o on, some at a time,
// end(p, o, sums) takes them. Of plain products, those beyond c mean nothing.
template <class T, bool TensorCores>
struct NorConvProduct {
  using A = Acc<T>;
  const NorConvTile<T, false>& tile;

  // An item: 4 outputs of 4 pixels of a row.
  template <class Begin, class End>
  __device__ void run(const A* xs, const A* matrices, int kernel, Begin&& begin, End&& end) const {
    int groups = ceil_div(tile.c, 4), apart = tile.tw / 4, half = kernel / 2;
    for (int i = threadIdx.x; i < tile.pixels / 4 * groups; i += kThreads) {
      int o = i % groups * 4, x = i / groups % apart, y = i / groups / apart;
      A sums[4][4];
#pragma unroll
      for (int k = 0; k < 4; k++) begin(y * tile.tw + x + k * apart, o, sums[k]);
      const A* w = matrices + o;
#pragma unroll 1
      for (int u = -half; u <= half; u++)
#pragma unroll 1
        for (int v = -half; v <= half; v++, w += tile.c * tile.c)
          multiply(xs + tile.at(y + u, x + v), apart * tile.ld, tile.c, w, tile.c, tile.c - o, sums);
#pragma unroll
      for (int k = 0; k < 4; k++) end(y * tile.tw + x + k * apart, o, sums[k]);
    }
  }
};

// An item of a warp: 16 outputs of up to kWarpSixteens x 16 pixels.
template <class T>
struct NorConvProduct<T, true> {
  const NorConvTile<T, true>& tile;

  // what a lane takes for 16 outputs and 16 inputs
  using Factors = Pack<uint32_t, 4>;

  template <class Begin, class End>
  __device__ void run(const T* xs, const T* factors, int kernel, Begin&& begin, End&& end) const {
    int lane = threadIdx.x % 32, blocks = tile.c / 16, products = kernel * kernel * blocks;
    int sixteens = tile.pixels / 16, several = max(1, kWarps / blocks);
    int of_item = min(kWarpSixteens, ceil_div(sixteens, several)), items = ceil_div(sixteens, of_item) * blocks;
    for (int item = threadIdx.x / 32; item < items; item += kWarps) {
      int n = item % blocks * 16, first = item / blocks * of_item, count = min(of_item, sixteens - first);
      float sums[kWarpSixteens][2][4];
      // where the lane's row of a matrix begins
      int from[kWarpSixteens];
#pragma unroll
      for (int m = 0; m < kWarpSixteens; m++) {
        if (m >= count) break;
        int p = (first + m) * 16 + lane % 16;
        from[m] = tile.at(p / tile.tw, p % tile.tw) + lane / 16 * 8;
        each_pair(first + m, n, sums[m], begin);
      }
      add(xs, reinterpret_cast<const Factors*>(factors) + n / 16 * products * 32 + lane, kernel, count, from, sums);
#pragma unroll
      for (int m = 0; m < kWarpSixteens; m++) {
        if (m >= count) break;
        each_pair(first + m, n, sums[m], end);
      }
    }
  }
  // f(p, o, sums) for the lane's outputs of a sixteen
  template <class F>
  __device__ void each_pair(int sixteen, int n, float (&sums)[2][4], F&& f) const {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        float two[2] = {sums[j][2 * r], sums[j][2 * r + 1]};
        f(sixteen * 16 + lane / 4 + 8 * r, n + 8 * j + lane % 4 * 2, two);
        sums[j][2 * r] = two[0], sums[j][2 * r + 1] = two[1];
      }
  }
  // factors: of the lane
  __device__ void add(const T* xs, const Factors* factors, int kernel, int count, const int (&from)[kWarpSixteens],
                      float (&sums)[kWarpSixteens][2][4]) const {
    int half = kernel / 2, left = kernel * kernel * (tile.c / 16);
    Factors next = *factors;
#pragma unroll 1
    for (int u = half; u >= -half; u--)
#pragma unroll 1
      for (int v = half; v >= -half; v--) {
        const T* tap = xs + (u * tile.columns + v) * tile.ld;
#pragma unroll 1
        for (int k = 0; k < tile.c; k += 16) {
          uint32_t b[2][2] = {{next.v[0], next.v[1]}, {next.v[2], next.v[3]}};
          // the next ones are under way while these are multiplied
          factors += 32;
          if (--left) next = *factors;
#pragma unroll
          for (int m = 0; m < kWarpSixteens; m++) {
            if (m >= count) break;
            uint32_t a[4];
            load_matrices<false>(a, tap + from[m] + k);
            multiply_tile<T>(sums[m][0], a, b[0]);
            multiply_tile<T>(sums[m][1], a, b[1]);
          }
        }
      }
  }
};

}  // namespace rfdarts::cuda
