// to = n numbers as operands; may be where they are
template <class T>
RF_INLINE void to_operands(const T* from, int64_t n, Operand<T>* to) {
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) store<kLanes<T>>(to + i, load<kLanes<T>>(from + i));
  for (; i < n; i++) store<1>(to + i, load<1>(from + i));
}

// 1x1 convolutions: out[p][o] = sum_i d[p][i] w[i][o], a tile of pixels and output channels in registers.
template <class T, int L, int Pixels, int Blocks, class Out>
RF_INLINE void pointwise_tile(const Operand<T>* d, int64_t ci, const T* w, int64_t co, Out&& out) {
  Vec<T, L> acc[Pixels * Blocks];
  unroll<Pixels * Blocks>(RF_LAMBDA(i) { acc[i] = Vec<T, L>{}; });
#pragma GCC unroll 4
  for (int64_t i = 0; i < ci / kDepth<T>; i++) {
    Vec<T, L> column[Blocks];
    unroll<Blocks>(RF_LAMBDA(n) { column[n] = load<L>(w + i * co + n * L); });
    unroll<Pixels>(RF_LAMBDA(m) {
      const Operand<T>* value = d + m * ci + i * kDepth<T>;
      unroll<Blocks>(RF_LAMBDA(n) { multiply_add<L>(acc[m * Blocks + n], column[n], value); });
    });
  }
  unroll<Pixels>(RF_LAMBDA(m) {
    unroll<Blocks>(RF_LAMBDA(n) { out(int64_t(m), int64_t(n * L), acc[m * Blocks + n]); });
  });
}

// out(pixel, channel, value) for `pixels` pixels and the Blocks * L channels from `channel` on
template <class T, int L, int Pixels, int Blocks, class Out>
RF_INLINE void pointwise_columns(const Operand<T>* d, int64_t pixels, int64_t ci, const T* w, int64_t co, Ahead& ahead,
                                 Out&& out) {
#ifdef RFDARTS_AMX
  if constexpr (L == kTileSize)
    if (int64_t pairs = tile_pairs(ci)) return tile_columns<Blocks>(d, pixels, ci, pairs, w, co, ahead, out);
#endif
  int64_t p = 0;
  for (; p + Pixels <= pixels; p += Pixels) {
    fetch<L>(ahead, Pixels * Blocks * ci);
    pointwise_tile<T, L, Pixels, Blocks>(d + p * ci, ci, w, co,
                                         [&](int64_t m, int64_t n, Vec<T, L> v)
                                             __attribute__((always_inline)) { out(p + m, n, v); });
  }
  for (; p < pixels; p++)
    pointwise_tile<T, L, 1, Blocks>(d + p * ci, ci, w, co,
                                    [&](int64_t m, int64_t n, Vec<T, L> v)
                                        __attribute__((always_inline)) { out(p + m, n, v); });
}

// Where the tiles of a strip go: into a framed row or dense rows, plain; Add: to what is there.
template <class T, int L, int Pixels, int Blocks, bool Add>
__attribute__((noinline)) void pointwise_plain(const Operand<T>* d, int64_t pixels, int64_t ci, const T* w, int64_t co,
                                               T* out, Ahead& ahead) {
  pointwise_columns<T, L, Pixels, Blocks>(
      d, pixels, ci, w, co, ahead, [&](int64_t p, int64_t n, Vec<T, L> v) __attribute__((always_inline)) {
        T* to = out + p * co + n;
        if constexpr (Add) v += load<L>(to);
        store<L>(to, v);
      });
}

// Kept as S, with sums of (y - shift) and its square over the strip.
template <class T, class S, int L, int Pixels, int Blocks, bool NonTemporal>
__attribute__((noinline)) void pointwise_moments(const Operand<T>* d, int64_t pixels, int64_t ci, const T* w,
                                                 int64_t co, S* y, const T* shift, T* sum, T* square,
                                                 Ahead& ahead) {
  Vec<T, L> about[Blocks], s[Blocks], q[Blocks];
  unroll<Blocks>(RF_LAMBDA(n) {
    about[n] = load<L>(shift + n * L);
    s[n] = q[n] = Vec<T, L>{};
  });
  pointwise_columns<T, L, Pixels, Blocks>(
      d, pixels, ci, w, co, ahead, [&](int64_t p, int64_t n, Vec<T, L> v) __attribute__((always_inline)) {
        if constexpr (NonTemporal)
          stream<L>(y + p * co + n, v);
        else
          store<L>(y + p * co + n, v);
        Vec<T, L> off = v - about[n / L];
        s[n / L] += off;
        q[n / L] += off * off;
      });
  unroll<Blocks>(RF_LAMBDA(n) {
    store<L>(sum + n * L, s[n]);
    store<L>(square + n * L, q[n]);
  });
}

// Tile shapes: as many accumulators as the registers hold beside the columns of w.
template <int Blocks>
constexpr int kTilePixels = kManyRegisters ? (Blocks == 1 ? 16 : Blocks == 2 ? 8 : 4) : (Blocks == 1 ? 8 : 4);

// f(blocks, channel) over groups of output channels, L or more; the last ones may be in two groups
template <int L, class F>
RF_INLINE void for_column_groups(int64_t co, F&& f) {
  int64_t o = 0;
  if constexpr (kManyRegisters)
    for (; o + 4 * L <= co; o += 4 * L) f(std::integral_constant<int, 4>{}, o);
  for (; o + 2 * L <= co; o += 2 * L) f(std::integral_constant<int, 2>{}, o);
  for (; o + L <= co; o += L) f(std::integral_constant<int, 1>{}, o);
  if (o < co) f(std::integral_constant<int, 1>{}, co - L);
}

// the first c of co outputs
template <class T, int L, bool Add = false>
void pointwise(const Operand<T>* d, int64_t pixels, int64_t ci, const T* w, int64_t c, int64_t co, T* out,
               Ahead& ahead) {
  for_column_groups<L>(c, [&](auto blocks, int64_t o) {
    pointwise_plain<T, L, kTilePixels<blocks>, blocks, Add>(d, pixels, ci, w + o, co, out + o, ahead);
  });
}

// Flat: C divides a vector, which holds several pixels; lane l of row i of w is w[i][l % C].
// for each lane: operand i, or pair of operands, of its pixel
template <int C, int Depth, int I, int... l>
RF_INLINE auto operand_mask(std::integer_sequence<int, l...>) {
  return std::integer_sequence<int, (l / C * (C / Depth) + I)...>{};
}
template <class V, int... l>
RF_INLINE auto permute(V v, std::integer_sequence<int, l...>) {
  return __builtin_shufflevector(v, v, l...);
}
template <class T, int C>
RF_INLINE Vec<T, kLanes<T>> pointwise_flat(Vec<T, kLanes<T>> d, const Vec<T, kLanes<T>>* w) {
  constexpr int L = kLanes<T>, D = kDepth<T>;
  Vec<T, L> acc = Vec<T, L>{};
  auto lanes = std::make_integer_sequence<int, L>{};
  if constexpr (D == 1) {
    unroll<C>(RF_LAMBDA(i) { acc += permute(d, operand_mask<C, D, i>(lanes)) * w[i]; });
  } else {
    auto halves = to_bf16<L>(d);
    auto pairs = reinterpret_cast<Vec<uint32_t, L / 2>&>(halves);
    unroll<C / D>(RF_LAMBDA(i) {
      multiply_pairs<L>(acc, w[i], (Vec<uint32_t, L>)permute(pairs, operand_mask<C, D, i>(lanes)));
    });
  }
  return acc;
}
