// The 3x3 pools of a column of outputs, from the top down: what a row of the input gives to its windows, the greatest
// and the sum of three neighbours, is loaded and computed once. The maxima's places are not known: pool.h has them.
#pragma once
#include "cuda/params.h"

namespace rfdarts::cuda {

// the greater one as it is stored; a NaN wins
template <class T>
__device__ __forceinline__ T greater(T a, T b) {
  return widen(b) > widen(a) || widen(b) != widen(b) ? b : a;
}
#ifdef RFDARTS_EMULATION
template <class T, int V>
Pack<T, V> greater(const Pack<T, V>& a, const Pack<T, V>& b) {
  Pack<T, V> c;
  for (int i = 0; i < V; i++) c.v[i] = greater(a.v[i], b.v[i]);
  return c;
}
#else
template <>
__device__ __forceinline__ float greater(float a, float b) {
  float c;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}
// two in one register
__device__ __forceinline__ void greater_pair(const __nv_bfloat16* a, const __nv_bfloat16* b, __nv_bfloat16* c) {
  using Pair = __nv_bfloat162;
  *reinterpret_cast<Pair*>(c) = __hmax2_nan(*reinterpret_cast<const Pair*>(a), *reinterpret_cast<const Pair*>(b));
}
__device__ __forceinline__ void greater_pair(const __half* a, const __half* b, __half* c) {
  using Pair = __half2;
  *reinterpret_cast<Pair*>(c) = __hmax2_nan(*reinterpret_cast<const Pair*>(a), *reinterpret_cast<const Pair*>(b));
}
template <class T, int V>
__device__ __forceinline__ Pack<T, V> greater(const Pack<T, V>& a, const Pack<T, V>& b) {
  Pack<T, V> c;
  if constexpr (sizeof(T) == 2 && V % 2 == 0)
#pragma unroll
    for (int i = 0; i < V; i += 2) greater_pair(a.v + i, b.v + i, c.v + i);
  else
#pragma unroll
    for (int i = 0; i < V; i++) c.v[i] = greater(a.v[i], b.v[i]);
  return c;
}
#endif

// A column of windows: V channels, outputs of one x. Loads beyond the border are of the nearest pixel, which every
// window there has too: maxima need no more, and sums leave it out.
template <class T, int V, int S>
struct PoolColumn {
  using A = Acc<T>;
  struct Row {
    Pack<T, V> max;
    A sum[V];
  };
  const T* centre;  // of row 0
  int row, pixel, h, wide;
  A whole;  // 1 / pixels of a window that is not cut off above or below
  bool has_left, has_right;

  __device__ __forceinline__ PoolColumn(const ImageView<T>& image, int n, int x, int ch, int h, int w)
      : centre(image.at(n, 0, x * S) + ch), row(image.row), pixel(image.pixel), h(h),
        wide(1 + (x > 0) + (x * S < w - 1)), whole(A(1) / A(3 * wide)), has_left(x > 0), has_right(x * S < w - 1) {}

  __device__ __forceinline__ bool inside(int y) const { return unsigned(y) < unsigned(h); }
  __device__ __forceinline__ Row load_row(int y) const {
    const T* at = centre + int64_t(min(max(y, 0), h - 1)) * row;
    auto pack = [](const T* from) { return *reinterpret_cast<const Pack<T, V>*>(from); };
    Pack<T, V> middle = pack(at), left = pack(at - (has_left ? pixel : 0)), right = pack(at + (has_right ? pixel : 0));
    Row r;
    r.max = greater(greater(left, middle), right);
    A to_left[V], to_right[V];
    unpack(left, to_left);
    unpack(middle, r.sum);
    unpack(right, to_right);
#pragma unroll
    for (int i = 0; i < V; i++) {
      if (has_left) r.sum[i] += to_left[i];
      if (has_right) r.sum[i] += to_right[i];
    }
    if (!inside(y))
#pragma unroll
      for (int i = 0; i < V; i++) r.sum[i] = 0;
    return r;
  }
  // means of `size` values are rounded as if they were stored; with 16 bits that hides how they are divided
  __device__ __forceinline__ static A mean(A sum, A size, A inverse) {
    return widen(narrow<T>(sizeof(T) == 2 ? sum * inverse : sum / size));
  }
  __device__ __forceinline__ static Row stacked(const Row& above, const Row& below) {
    Row r;
    r.max = greater(above.max, below.max);
#pragma unroll
    for (int i = 0; i < V; i++) r.sum[i] = above.sum[i] + below.sum[i];
    return r;
  }
  // f(i, maxima, means) for the outputs y + i, i in [0, count), Unrolled of them at a time
  template <int Unrolled, class F>
  __device__ __forceinline__ void walk(int y, int count, F&& f) const {
    // what the next window has of the rows before its last one
    Row above = load_row(y * S - 1), last;
    if constexpr (S == 1) last = load_row(y), above = stacked(above, last);
#pragma unroll Unrolled
    for (int i = 0; i < count; i++) {
      int centre = (y + i) * S;
      if constexpr (S == 2) above = stacked(above, load_row(centre));
      Row bottom = load_row(centre + 1), window = stacked(above, bottom);
      A size = A(3 * wide), inverse = whole, max[V], avg[V];
      if (int missing = !inside(centre - 1) + !inside(centre + 1))
        size = A((3 - missing) * wide), inverse = A(1) / size;
      unpack(window.max, max);
#pragma unroll
      for (int j = 0; j < V; j++) avg[j] = mean(window.sum[j], size, inverse);
      f(i, max, avg);
      above = S == 1 ? stacked(last, bottom) : bottom;
      last = bottom;
    }
  }
};

}  // namespace rfdarts::cuda
