// Depthwise convolutions of 16-bit tiles on tensor cores. A strip is kStrip = 8 neighbours of a row. Whatever the
// kernel, up to a reach of 4, they depend on 16 inputs: the product of 16 strips' inputs with the Toeplitz matrix of
// one row of the kernel, 16 x 8, is that row's part of their outputs.
//
//     out[strip][n] += in[strip][k] B[k][n],   B[k][n] = tap[v] where k - n = 4 - reach + v dilation, else 0
//
// Inputs are planes, one per channel: [row][column], columns from kMargin before the tile's first on. A zero of B times
// an infinity would be a NaN, so tiles with such inputs are convolved one by one: `depthwise_exact`.
#pragma once
#include "cuda/mma.h"
#include "cuda/pool_column.h"
#include "cuda/tile.h"

namespace rfdarts::cuda {

constexpr int kMargin = 4;
// elements between the rows of a plane: eight neighbouring rows, 16 bytes of each, lie in different banks
constexpr int kPlaneRow = 24;

// Branches of c channels that stand side by side as one with 16 channels or a multiple: `group` of them, 0 where none do.
// Channel j of theirs is channel j % c of branch j / c.
struct SideBySide {
  int c, group;

  __host__ __device__ static int group_of(int c) { return c % 16 == 0 ? 1 : c == 4 || c == 8 ? 16 / c : 0; }
  // without divisions
  __device__ int branch(int j) const { return group == 1 ? 0 : j >> (c == 4 ? 2 : 3); }
  __device__ int channel(int j) const { return group == 1 ? j : j & (c - 1); }
};

// How warps share pixels whose channels are in `parts`, one part a warp: the first part of the warp, and as what of how
// many warps it takes it. One that is left over begins behind the last.
struct Share {
  int first, apart, number, of;

  __device__ Share(int parts, int warp) {
    // kWarps / parts, or 1, is two to this; without a division
    int log = parts == 1 ? 3 : parts == 2 ? 2 : parts <= 4 ? 1 : 0;
    static_assert(kWarps == 8);
    of = 1 << log, apart = kWarps >> log, first = warp >> log, number = warp & (of - 1);
  }
};

// Of a tile of H x W outputs.
template <int H, int W>
struct Planes {
  // strip s: row s % H, columns from s / H * kStrip on
  static constexpr int kStrips = H * W / kStrip, kSixteens = kStrips > 16 ? kStrips / 16 : 1;
  static constexpr int kColumns = W + 2 * kMargin;  // of a row of a plane
  static constexpr int kChannel = H * W + 8;        // elements between channels of strips [channel][strip][kStrip]
  int reach, rows;
  int apart;  // elements between planes; pairs of columns of eight neighbouring planes lie in different banks

  __host__ __device__ explicit Planes(int reach)
      : reach(reach), rows(H + 2 * reach), apart(rows * kPlaneRow + 8) {}
  static __device__ int row_of(int strip) { return strip % H; }
  static __device__ int column_of(int strip) { return strip / H * kStrip; }
};

// Two 16-bit values in a register, the first one in its lower half.
template <class T>
__device__ __forceinline__ float first_of(uint32_t pair) {
  uint16_t bits = uint16_t(pair);
  T value;
  memcpy(&value, &bits, 2);
  return widen(value);
}
template <class T>
__device__ __forceinline__ float second_of(uint32_t pair) {
  return first_of<T>(pair >> 16);
}
// of two pairs, both first ones, both second ones
__device__ __forceinline__ uint32_t firsts(uint32_t a, uint32_t b) { return (a & 0xffff) | b << 16; }
__device__ __forceinline__ uint32_t seconds(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xffff0000); }

// NaNs pass
template <class T>
__device__ __forceinline__ uint32_t max_pair(uint32_t a, uint32_t b) {
  Pack<T, 2> left, right;
  memcpy(&left, &a, 4), memcpy(&right, &b, 4);
  left = greater(left, right);
  memcpy(&a, &left, 4);
  return a;
}
template <class T>
__device__ __forceinline__ uint32_t relu_pair(uint32_t x) {
  return max_pair<T>(x, 0);
}

#ifdef RFDARTS_EMULATION
// seen stays 0 until a value is not finite
template <class T>
void look_at(uint32_t x, uint32_t& seen) {
  seen = pair<T>(first_of<T>(x) * 0 + first_of<T>(seen), second_of<T>(x) * 0 + second_of<T>(seen));
}
#else
template <class T>
struct Packed;
template <>
struct Packed<__nv_bfloat16> {
  using type = __nv_bfloat162;
};
template <>
struct Packed<__half> {
  using type = __half2;
};
template <class T>
__device__ __forceinline__ typename Packed<T>::type packed(uint32_t x) {
  return reinterpret_cast<typename Packed<T>::type&>(x);
}
// seen stays 0 until a value is not finite
template <class T>
__device__ __forceinline__ void look_at(uint32_t x, uint32_t& seen) {
  typename Packed<T>::type sum = __hfma2(packed<T>(x), packed<T>(0), packed<T>(seen));
  memcpy(&seen, &sum, 4);
}
#endif
template <class T>
constexpr uint32_t kLowestPair = 0xff80ff80;
template <>
inline constexpr uint32_t kLowestPair<__half> = 0xfc00fc00;

// Four 8x8 matrices of 16-bit values in shared memory; lane 8 i + r names row r of matrix i, 16 bytes. Lane 4 g + t gets
// of each the values 2 t and 2 t + 1 of row g, or, transposed, of column g.
template <bool Transposed>
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
#ifdef RFDARTS_EMULATION
  emulation::load_matrices(to, row, Transposed);
#else
  uint32_t address = uint32_t(__cvta_generic_to_shared(row));
  if constexpr (Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address));
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address));
#endif
}

// The place in a kernel's row that B has on the diagonal k - n, or -1. Transposed: of the convolution's transpose.
template <bool Transposed>
__device__ __forceinline__ int tap_on(int diagonal, int kernel, int dilation) {
  int reach = (kernel - 1) * dilation / 2;
  int ahead = Transposed ? kMargin + reach - diagonal : diagonal - kMargin + reach;
  // dilation is 1 or 2
  bool has = ahead >= 0 && (ahead & (dilation - 1)) == 0 && ahead < kernel * dilation;
  return has ? ahead >> (dilation - 1) : -1;
}

// sums[m] += one channel's convolution for strips 16 m .. 16 m + 15, laid out as accumulators of multiply_tile. plane:
// of the channel; taps: of the channel, c apart. Every lane of the warp takes part. One loop for all kernels: code for
// each of them would not fit into the instruction cache.
template <class T, bool Transposed, int H, int W>
__device__ __forceinline__ void depthwise_warp(const Planes<H, W>& at, const T* plane, const float* taps, int c,
                                               int kernel, int dilation,
                                               float (&sums)[Planes<H, W>::kSixteens][4]) {
  int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, reach = (kernel - 1) * dilation / 2;
  // lane l has the diagonals l - 7 and l - 6
  int place = tap_on<Transposed>(lane - 7, kernel, dilation);
  const float* own = taps + max(place, 0) * c;
  float next = place < 0 ? 0.f : *own;
  const T* from = plane + (at.row_of(lane & 15) + at.reach + (Transposed ? reach : -reach)) * kPlaneRow + lane / 16 * 8;
#pragma unroll 1
  for (int u = 0; u < kernel; u++) {
    float tap = next;
    own += kernel * c;
    if (place >= 0 && u + 1 < kernel) next = *own;
    uint32_t both = pair<T>(tap, __shfl_sync(0xffffffffu, tap, (lane + 1) & 31));
    uint32_t b[2] = {__shfl_sync(0xffffffffu, both, 7 + 2 * t - g), __shfl_sync(0xffffffffu, both, 15 + 2 * t - g)};
#pragma unroll
    for (int m = 0; m < Planes<H, W>::kSixteens; m++) {
      // a second sixteen is the other half of as many rows
      static_assert(Planes<H, W>::kSixteens == 1 || H == 16);
      uint32_t a[4];
      load_matrices<false>(a, from + m * kStrip);
      multiply_tile<T>(sums[m], a, b);
    }
    from += (Transposed ? -dilation : dilation) * kPlaneRow;
  }
}

// strips = one channel's sums
template <int H, int W, class T>
__device__ __forceinline__ void store_strips(const float (&sums)[Planes<H, W>::kSixteens][4], T* strips) {
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < Planes<H, W>::kStrips / 8; i++)
    *reinterpret_cast<uint32_t*>(strips + (8 * i + lane / 4) * kStrip + lane % 4 * 2) =
        pair<T>(sums[i / 2][i % 2 * 2], sums[i / 2][i % 2 * 2 + 1]);
}

// The same for one output, tap by tap.
template <class T, bool Transposed, int H, int W>
__device__ float depthwise_exact(const Planes<H, W>& at, const T* plane, const float* taps, int c, int kernel, int dilation,
                                 int strip, int n) {
  int reach = (kernel - 1) * dilation / 2, sign = Transposed ? -1 : 1;
  const T* from = plane + (at.row_of(strip) + at.reach) * kPlaneRow + kMargin + at.column_of(strip) + n;
  float sum = 0;
  for (int u = 0; u < kernel; u++)
    for (int v = 0; v < kernel; v++)
      sum += widen(narrow<T>(taps[(u * kernel + v) * c])) *
             widen(from[sign * ((u * dilation - reach) * kPlaneRow + v * dilation - reach)]);
  return sum;
}

}  // namespace rfdarts::cuda
