// Storage types and the type of arithmetic: float for all but double.
#pragma once
#include <cstdint>

#include "cuda/port.h"

namespace rfdarts::cuda {

template <class T>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<double> {
  using type = double;
};
template <class T>
using Acc = typename Arithmetic<T>::type;

// vectors of V elements; pointers must be aligned to the vector
template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T v[V];
};
// 16 bytes, the widest access
template <class T>
constexpr int kWide = 16 / sizeof(T);

__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T narrow(Acc<T> x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16(x);
}
template <>
__device__ __forceinline__ __half narrow<__half>(float x) {
  return __float2half(x);
}

// the elements of a vector
template <class T, int V>
__device__ __forceinline__ void unpack(const Pack<T, V>& from, Acc<T> (&to)[V]) {
#pragma unroll
  for (int i = 0; i < V; i++) to[i] = widen(from.v[i]);
}
#ifndef RFDARTS_EMULATION
// two at a time, with one instruction each
template <int V>
__device__ __forceinline__ void unpack(const Pack<__nv_bfloat16, V>& from, float (&to)[V]) {
  if constexpr (V % 2)
    to[0] = widen(from.v[0]);
  else
#pragma unroll
    for (int i = 0; i < V; i += 2) {
      unsigned pair = reinterpret_cast<const unsigned&>(from.v[i]);
      to[i] = __uint_as_float(pair << 16), to[i + 1] = __uint_as_float(pair & 0xffff0000u);
    }
}
#endif

// V elements in accesses of up to 16 bytes, to which the pointer must be aligned
template <int V, class T>
__device__ __forceinline__ void load(const T* from, Acc<T> (&to)[V]) {
  constexpr int W = V < kWide<T> ? V : kWide<T>;
#pragma unroll
  for (int i = 0; i < V; i += W) {
    Pack<T, W> p = *reinterpret_cast<const Pack<T, W>*>(from + i);
#pragma unroll
    for (int j = 0; j < W; j++) to[i + j] = widen(p.v[j]);
  }
}
template <int V, class T>
__device__ __forceinline__ void store(T* to, const Acc<T> (&from)[V]) {
  constexpr int W = V < kWide<T> ? V : kWide<T>;
#pragma unroll
  for (int i = 0; i < V; i += W) {
    Pack<T, W> p;
#pragma unroll
    for (int j = 0; j < W; j++) p.v[j] = narrow<T>(from[i + j]);
    *reinterpret_cast<Pack<T, W>*>(to + i) = p;
  }
}

// a NaN is not <= 0 and passes, as in torch
template <class A>
__device__ __forceinline__ A relu(A x) {
  return x <= A(0) ? A(0) : x;
}
__device__ __forceinline__ float inverse_root(float x) { return 1.0f / sqrtf(x); }
__device__ __forceinline__ double inverse_root(double x) { return 1.0 / sqrt(x); }

template <class I>
__host__ __device__ constexpr I ceil_div(I a, I b) {
  return (a + b - 1) / b;
}
__host__ __device__ inline int round_up(int n, int to) { return (n + to - 1) / to * to; }

}  // namespace rfdarts::cuda
