// 1x1 products of 16-bit storage on tensor cores: mma.sync m16n8k16, factors rounded to the storage type, sums in
// float. A warp's tile is 16 pixels x 8 outputs; lane = 4 g + t, as in the PTX manual's fragment layouts.
#pragma once
#include "cuda/numeric.h"

namespace rfdarts::cuda {

constexpr int kWarps = 8;

// whether a product with `ci` inputs and `co` outputs is one for tensor cores
template <class T>
__device__ __forceinline__ bool on_tensor_cores(int ci, int co) {
  return sizeof(T) == 2 && ci % 16 == 0 && co % 8 == 0;
}

#ifdef RFDARTS_EMULATION
template <class T>
uint32_t pair(float low, float high) {
  T values[2] = {narrow<T>(low), narrow<T>(high)};
  uint32_t bits;
  std::memcpy(&bits, values, 4);
  return bits;
}
template <class T>
void multiply_tile(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::multiply_tile(c, a, b, [](uint32_t bits, int i) {
    T values[2];
    std::memcpy(values, &bits, 4);
    return widen(values[i]);
  });
}
#else
template <class T>
__device__ __forceinline__ uint32_t pair(float low, float high);
template <>
__device__ __forceinline__ uint32_t pair<__nv_bfloat16>(float low, float high) {
  __nv_bfloat162 p = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<uint32_t&>(p);
}
template <>
__device__ __forceinline__ uint32_t pair<__half>(float low, float high) {
  __half2 p = __floats2half2_rn(low, high);
  return reinterpret_cast<uint32_t&>(p);
}
#define RFDARTS_MMA(type)                                                                        \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                            \
               ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                      \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                  \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
template <class T>
__device__ __forceinline__ void multiply_tile(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void multiply_tile<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4],
                                                             const uint32_t (&b)[2]) {
  RFDARTS_MMA("bf16");
}
template <>
__device__ __forceinline__ void multiply_tile<__half>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  RFDARTS_MMA("f16");
}
#undef RFDARTS_MMA
#endif

// two neighbours in memory, the first one even
template <class T>
__device__ __forceinline__ uint32_t pair_at(const T* from) {
  Pack<T, 2> two = *reinterpret_cast<const Pack<T, 2>*>(from);
  uint32_t bits;
  memcpy(&bits, &two, sizeof(bits));
  return bits;
}

// acc += rows p0 .. p0 + 15 of d, ci long and ld (even) apart, times columns o0 .. o0 + 7 of w [ci][ldw]
template <class T>
__device__ __forceinline__ void multiply_warp(const float* d, int ld, int p0, int ci, const float* w, int ldw, int o0,
                                              float (&acc)[4]) {
  int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const float *low = d + (p0 + g) * ld + 2 * t, *high = low + 8 * ld, *column = w + 2 * t * ldw + o0 + g;
#pragma unroll 1
  for (int k = 0; k < ci; k += 16) {
    float rows[4][2];
    load<2>(low + k, rows[0]), load<2>(high + k, rows[1]);
    load<2>(low + k + 8, rows[2]), load<2>(high + k + 8, rows[3]);
    uint32_t a[4];
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = pair<T>(rows[i][0], rows[i][1]);
    const float* at = column + k * ldw;
    uint32_t b[2] = {pair<T>(at[0], at[ldw]), pair<T>(at[8 * ldw], at[9 * ldw])};
    multiply_tile<T>(acc, a, b);
  }
}

}  // namespace rfdarts::cuda
