// Vectors of L lanes in GCC's vector extension. Included inside each instruction set's namespace.
#define RF_INLINE inline __attribute__((always_inline))

template <class T, int L>
struct VecType {
  typedef T type __attribute__((vector_size(L * sizeof(T)), aligned(sizeof(T)), may_alias));
};
template <class T, int L>
using Vec = typename VecType<T, L>::type;

template <class T>
constexpr int kLanes = RFDARTS_VECTOR_BYTES / sizeof(T);
// registers left for accumulators decide the tiles
constexpr bool kManyRegisters = RFDARTS_VECTOR_BYTES == 64;

// products of bfloat16 instead of float numbers
#ifdef RFDARTS_BFLOAT16_PRODUCTS
constexpr bool kBfloat16Products = true;
#else
constexpr bool kBfloat16Products = false;
#endif
// what a product takes from memory beside its weights
template <class T>
using Operand = std::conditional_t<kBfloat16Products && std::is_same_v<T, float>, bf16, T>;
// how many inputs one multiplication takes
template <class T>
constexpr int kDepth = std::is_same_v<Operand<T>, T> ? 1 : 2;
// scratch for as many operands as it has numbers
template <class T>
RF_INLINE Operand<T>* operands(T* scratch) {
  return reinterpret_cast<Operand<T>*>(scratch);
}

// Own versions of a few std functions: a template of std instantiated here under one instruction set could be
// the copy that the linker picks for the whole library.
template <class I>
RF_INLINE I least(I a, I b) {
  return b < a ? b : a;
}
template <class I>
RF_INLINE I most(I a, I b) {
  return a < b ? b : a;
}
template <class T>
RF_INLINE void fill(T* p, int64_t n, T value) {
  for (int64_t i = 0; i < n; i++) p[i] = value;
}
template <class T>
RF_INLINE void copy(const T* from, int64_t n, T* to) {
  for (int64_t i = 0; i < n; i++) to[i] = from[i];
}

// after `count` multiply-adds of L lanes; see Ahead
template <int L>
RF_INLINE void fetch(Ahead& ahead, int64_t count) {
  ahead.due += count * L / 16 * ahead.rate;
  if (ahead.due < 1 << 16) return;
  Ahead::Range& range = *ahead.next;
  int64_t lines = ahead.due >> 16;
  ahead.due &= (1 << 16) - 1;
  range.lines -= lines;
  // addresses past the end do no harm
  for (; lines > 0; lines--, range.at += range.step) __builtin_prefetch(range.at, 0, 2);
  if (range.lines <= 0 && ++ahead.next == ahead.end) ahead.rate = ahead.due = 0;
}

template <class F, int... I>
RF_INLINE void unroll_impl(F&& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
// keeps arrays of vectors in registers where a pragma does not
template <int N, class F>
RF_INLINE void unroll(F&& f) {
  unroll_impl(f, std::make_integer_sequence<int, N>{});
}
#define RF_LAMBDA(i) [&](auto i) __attribute__((always_inline))

template <int L, class T>
  requires std::is_floating_point_v<T>
RF_INLINE Vec<T, L> load(const T* p) {
  return *reinterpret_cast<const Vec<T, L>*>(p);
}
template <int L>
RF_INLINE Vec<float, L> load(const bf16* p) {
  auto wide = __builtin_convertvector(*reinterpret_cast<const Vec<uint16_t, L>*>(p), Vec<uint32_t, L>) << 16;
  return reinterpret_cast<Vec<float, L>&>(wide);
}
template <int L, class T>
  requires std::is_floating_point_v<T>
RF_INLINE void store(T* p, Vec<T, L> v) {
  *reinterpret_cast<Vec<T, L>*>(p) = v;
}
template <int L>
RF_INLINE Vec<uint16_t, L> to_bf16(Vec<float, L> v) {
#ifdef RFDARTS_AVX512_BF16
  // subnormal numbers become 0
  if constexpr (L == 16) return (Vec<uint16_t, L>)_mm512_cvtneps_pbh((__m512)v);
  if constexpr (L == 8) return (Vec<uint16_t, L>)_mm256_cvtneps_pbh((__m256)v);
#endif
  auto bits = reinterpret_cast<Vec<uint32_t, L>&>(v);
  // round to nearest even; a NaN keeps its upper half, with the quiet bit set so that it stays one
  auto rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  auto chosen = (v != v) ? (bits | 0x400000u) : rounded;
  return __builtin_convertvector(chosen >> 16, Vec<uint16_t, L>);
}
template <int L>
RF_INLINE void store(bf16* p, Vec<float, L> v) {
  *reinterpret_cast<Vec<uint16_t, L>*>(p) = to_bf16<L>(v);
}
// past the caches, for results that are next read after they would have been evicted
template <int L, class T>
  requires std::is_floating_point_v<T>
RF_INLINE void stream(T* p, Vec<T, L> v) {
#if RFDARTS_VECTOR_BYTES == 64 && !defined(RFDARTS_EMULATED_TILES)
  if constexpr (L * sizeof(T) == 64) {
    if constexpr (sizeof(T) == 4)
      _mm512_stream_ps(p, (__m512)v);
    else
      _mm512_stream_pd(p, (__m512d)v);
    return;
  }
#endif
  store<L>(p, v);
}
template <int L>
RF_INLINE void stream(bf16* p, Vec<float, L> v) {
#if RFDARTS_VECTOR_BYTES == 64 && !defined(RFDARTS_EMULATED_TILES)
  if constexpr (L == 16) {
    auto half = to_bf16<L>(v);
    return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i&>(half));
  }
#endif
  store<L>(p, v);
}

// sum += weights times pairs, both of two bfloat16 in each lane
template <int L>
RF_INLINE void multiply_pairs(Vec<float, L>& sum, Vec<float, L> weights, Vec<uint32_t, L> pairs) {
#ifdef RFDARTS_AVX512_BF16
  using V = Vec<float, L>;
  if constexpr (L == 16) return void(sum = (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weights, (__m512bh)pairs));
  if constexpr (L == 8) return void(sum = (V)_mm256_dpbf16_ps((__m256)sum, (__m256bh)weights, (__m256bh)pairs));
  if constexpr (L == 4) return void(sum = (V)_mm_dpbf16_ps((__m128)sum, (__m128bh)weights, (__m128bh)pairs));
#endif
  auto half = [](Vec<uint32_t, L> bits) __attribute__((always_inline)) {
    return reinterpret_cast<Vec<float, L>&>(bits);
  };
  auto bits = reinterpret_cast<Vec<uint32_t, L>&>(weights);
  sum += half(bits << 16) * half(pairs << 16);
  sum += half(bits & 0xffff0000u) * half(pairs & 0xffff0000u);
}
// sum += weights times kDepth consecutive operands
template <int L, class T>
  requires std::is_floating_point_v<T>
RF_INLINE void multiply_add(Vec<T, L>& sum, Vec<T, L> weights, const T* operand) {
  sum += weights * *operand;
}
template <int L>
RF_INLINE void multiply_add(Vec<float, L>& sum, Vec<float, L> weights, const bf16* operand) {
  uint32_t pair;
  __builtin_memcpy(&pair, operand, sizeof pair);
  multiply_pairs<L>(sum, weights, pair + Vec<uint32_t, L>{});
}

template <int L, class T>
RF_INLINE Vec<T, L> splat(T s) {
  return s - Vec<T, L>{};
}
// b > a ? b : a in one instruction, where there is one; b if either is NaN
template <class T, int L>
RF_INLINE Vec<T, L> max_or_second(Vec<T, L> a, Vec<T, L> b) {
#if defined(__x86_64__)
  constexpr int bytes = L * sizeof(T);
  if constexpr (bytes == 16 && sizeof(T) == 4) return (Vec<T, L>)_mm_max_ps((__m128)a, (__m128)b);
  if constexpr (bytes == 16 && sizeof(T) == 8) return (Vec<T, L>)_mm_max_pd((__m128d)a, (__m128d)b);
#if RFDARTS_VECTOR_BYTES >= 32
  if constexpr (bytes == 32 && sizeof(T) == 4) return (Vec<T, L>)_mm256_max_ps((__m256)a, (__m256)b);
#endif
#if RFDARTS_VECTOR_BYTES >= 64 && !defined(RFDARTS_EMULATED_TILES)
  if constexpr (bytes == 64 && sizeof(T) == 4) return (Vec<T, L>)_mm512_max_ps((__m512)a, (__m512)b);
#endif
#endif
  return a > b ? a : b;
}
// a NaN passes, as in torch
template <class T, int L>
RF_INLINE Vec<T, L> relu_vec(Vec<T, L> v) {
  return max_or_second<T, L>(Vec<T, L>{}, v);
}
// the larger, or NaN if either is
template <class T, int L>
RF_INLINE Vec<T, L> max_vec(Vec<T, L> a, Vec<T, L> b) {
  return a != a ? a : max_or_second<T, L>(a, b);
}

// the larger so far and its place, as in torch's pools: the first of equals, the last NaN
template <class T, int L, class Places>
RF_INLINE void take_larger(Vec<T, L> v, int place, Vec<T, L>& top, Places& where) {
  auto larger = (v > top) | (v != v);
  top = larger ? v : top;
  where = larger ? place - Places{} : where;
}

// lanes First, First + 1, ... of [a | b]
template <int First, class V, int... l>
RF_INLINE auto consecutive_lanes(V a, V b, std::integer_sequence<int, l...>) {
  return __builtin_shufflevector(a, b, (First + l)...);
}

// A vector that divides C channels, as a constant handed to f: full, or 4 lanes, or one. (More would only make
// the build longer: elementwise passes repeat small C, and flat convolutions have their own code.)
template <class T, class F>
RF_INLINE void with_lanes(int64_t c, F&& f) {
  constexpr int full = kLanes<T>;
  if (c % full == 0) return f(std::integral_constant<int, full>{});
  if constexpr (full > 4)
    if (c % 4 == 0) return f(std::integral_constant<int, 4>{});
  f(std::integral_constant<int, 1>{});
}
// The widest vector that C channels fill, not always without a remainder.
template <class T, class F>
RF_INLINE void with_most_lanes(int64_t c, F&& f) {
  constexpr int full = kLanes<T>;
  if (c >= full) return f(std::integral_constant<int, full>{});
  if constexpr (full > 8)
    if (c >= 8) return f(std::integral_constant<int, 8>{});
  if constexpr (full > 4)
    if (c >= 4) return f(std::integral_constant<int, 4>{});
  if constexpr (full > 2)
    if (c >= 2) return f(std::integral_constant<int, 2>{});
  f(std::integral_constant<int, 1>{});
}
