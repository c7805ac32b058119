// Depthwise convolutions of one framed image, a block of outputs in registers while the taps go by.
// Wide: C fills vectors; a block is kBlock columns of one row. Flat: C divides a vector; a block is kBlock rows
// of one vector of a row's pixels and channels. Both read each input once per tap row (column).
constexpr int kBlock = 8;
// the widest reach of a 5x5 kernel with dilation 2
constexpr int kReach = 4;

template <class T>
RF_INLINE bool is_flat(int64_t c, int stride) {
  return stride == 1 && c < kLanes<T> && kLanes<T> % c == 0;
}
// f(C) with the C < lanes that divide a vector as a constant
template <class T, class F>
RF_INLINE void with_flat_channels(int64_t c, F&& f) {
  constexpr int L = kLanes<T>;
  // pairs have two channels at least
  if constexpr (L > 1 && kDepth<T> == 1)
    if (c == 1) return f(std::integral_constant<int, 1>{});
  if constexpr (L > 2)
    if (c == 2) return f(std::integral_constant<int, 2>{});
  if constexpr (L > 4)
    if (c == 4) return f(std::integral_constant<int, 4>{});
  if constexpr (L > 8)
    if (c == 8) return f(std::integral_constant<int, 8>{});
}
// whole blocks of full vectors clip their columns at compile time and need no border
template <class T>
RF_INLINE bool clips(int64_t w, int64_t c, int stride) {
  return stride == 1 && w % kBlock == 0 && c % kLanes<T> == 0;
}
RF_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <class T>
Frame make_frame(Size size, int stride) {
  auto [h, w, c] = size;
  if (is_flat<T>(c, stride)) {
    int64_t pitch = (w + 2 * kReach) * c;
    int64_t rows = round_up(h, kBlock) + 2 * kReach;
    return {kReach * pitch + kReach * c, pitch, rows * pitch + 2 * kLanes<T>};
  }
  if (clips<T>(w, c, stride)) return {0, w * c, h * w * c};
  int64_t pitch = (round_up(w, 2 * kBlock) + 2 * kReach) * c;
  return {kReach * c, pitch, h * pitch};
}

// acc[o] += sum over taps of x[row * S + u D - P][x0 S + o S + v D - P] w[u][v]; x points at column x0 S of row 0.
template <class T, int L, int K, int D, int S, bool Flip, bool ClipLeft, bool ClipRight>
RF_INLINE void depthwise_block(const T* x, int64_t pitch, const T* w, int64_t c, int64_t row, int64_t h,
                               Vec<T, L>* acc, Ahead& ahead) {
  constexpr int P = (K - 1) * D / 2;
  for (int u = 0; u < K; u++) {
    fetch<L>(ahead, kBlock * K);
    int64_t y = row * S + u * D - P;
    if (uint64_t(y) >= uint64_t(h)) continue;
    const T* taps = w + (Flip ? K - 1 - u : u) * K * c;
    Vec<T, L> tap[K];
    unroll<K>(RF_LAMBDA(v) { tap[v] = load<L>(taps + (Flip ? K - 1 - v : v) * c); });
    const T* in = x + y * pitch - (ClipLeft ? 0 : P) * c;
    unroll<(kBlock - 1) * S + 1 + 2 * P>(RF_LAMBDA(i) {
      constexpr int j = i - P;
      if constexpr (!(ClipLeft && j < 0) && !(ClipRight && j >= kBlock * S)) {
        Vec<T, L> value = load<L>(in);
        in += c;
        unroll<K>(RF_LAMBDA(v) {
          constexpr int to = j + P - v * D;
          if constexpr (to >= 0 && to % S == 0 && to / S < kBlock) acc[to / S] += value * tap[v];
        });
      }
    });
  }
}

// Transpose of a depthwise convolution of stride 2: acc[i] += sum of e[q][p] w[u][v] over 2q - P + u D = row and
// 2p - P + v D = i, columns relative to an even x0; e points at column x0 / 2 of row 0.
template <class T, int L, int K, int D>
RF_INLINE void depthwise_transposed_block(const T* e, int64_t pitch, const T* w, int64_t c, int64_t row, int64_t oh,
                                          Vec<T, L>* acc, Ahead& ahead) {
  constexpr int P = (K - 1) * D / 2;
  constexpr int first = P / 2;
  for (int u = 0; u < K; u++) {
    fetch<L>(ahead, kBlock * K / 4);
    int64_t twice = row + P - u * D;
    if (twice % 2 || uint64_t(twice / 2) >= uint64_t(oh)) continue;
    Vec<T, L> tap[K];
    unroll<K>(RF_LAMBDA(v) { tap[v] = load<L>(w + (u * K + v) * c); });
    const T* in = e + twice / 2 * pitch - first * c;
    unroll<(kBlock - 1 + P) / 2 + first + 1>(RF_LAMBDA(i) {
      constexpr int p = i - first;
      Vec<T, L> value = load<L>(in);
      in += c;
      unroll<K>(RF_LAMBDA(v) {
        constexpr int to = 2 * p - P + v * D;
        if constexpr (to >= 0 && to < kBlock) acc[to] += value * tap[v];
      });
    });
  }
}

enum class Pass { Forward, Backward };
// forward, what comes out is multiplied next
template <class T, Pass pass>
using DepthwiseOut = std::conditional_t<pass == Pass::Forward, Operand<T>, T>;

// One block of a row: stored to out, or added to it. `valid` columns of it exist.
template <class T, int L, int K, int D, int S, Pass pass, bool ClipLeft, bool ClipRight>
RF_INLINE void depthwise_columns(const T* x, int64_t pitch, const T* w, int64_t c, int64_t row, int64_t h,
                                 int64_t x0, int64_t valid, bool add, DepthwiseOut<T, pass>* out, Ahead& ahead) {
  constexpr bool whole = ClipLeft || ClipRight;
  for (int64_t cb = 0; cb < c; cb += L) {
    Vec<T, L> acc[kBlock];
    auto* to = out + x0 * c + cb;
    unroll<kBlock>(RF_LAMBDA(o) {
      if (pass == Pass::Forward || !add || !(whole || o < valid))
        acc[o] = Vec<T, L>{};
      else
        acc[o] = load<L>(to + o * c);
    });
    if constexpr (pass == Pass::Backward && S == 2)
      depthwise_transposed_block<T, L, K, D>(x + x0 / 2 * c + cb, pitch, w + cb, c, row, h, acc, ahead);
    else
      depthwise_block<T, L, K, D, S, pass == Pass::Backward, ClipLeft, ClipRight>(x + x0 * S * c + cb, pitch, w + cb,
                                                                                   c, row, h, acc, ahead);
    unroll<kBlock>(RF_LAMBDA(o) {
      if (whole || o < valid) store<L>(to + o * c, acc[o]);
    });
  }
}

// One row of w outputs. h: rows of the framed image. add: backward only.
template <class T, int L, int K, int D, int S, Pass pass>
__attribute__((noinline)) void depthwise_row(const T* x, int64_t pitch, const T* w, int64_t c, int64_t row, int64_t h,
                                             int64_t width, bool add, DepthwiseOut<T, pass>* out, Ahead& ahead) {
  if (!clips<T>(width, c, S)) {
    for (int64_t x0 = 0; x0 < width; x0 += kBlock)
      depthwise_columns<T, L, K, D, S, pass, false, false>(x, pitch, w, c, row, h, x0, width - x0, add, out, ahead);
    return;
  }
  if constexpr (S == 1 && L == kLanes<T>) {
    if (width == kBlock)
      return depthwise_columns<T, L, K, D, S, pass, true, true>(x, pitch, w, c, row, h, 0, kBlock, add, out, ahead);
    depthwise_columns<T, L, K, D, S, pass, true, false>(x, pitch, w, c, row, h, 0, kBlock, add, out, ahead);
    int64_t x0 = kBlock;
    for (; x0 + kBlock < width; x0 += kBlock)
      depthwise_columns<T, L, K, D, S, pass, false, false>(x, pitch, w, c, row, h, x0, kBlock, add, out, ahead);
    depthwise_columns<T, L, K, D, S, pass, false, true>(x, pitch, w, c, row, h, x0, kBlock, add, out, ahead);
  }
}

template <class T, Pass pass>
using DepthwiseRow = void (*)(const T*, int64_t, const T*, int64_t, int64_t, int64_t, int64_t, bool,
                              DepthwiseOut<T, pass>*, Ahead&);

template <class T, int L, Pass pass>
DepthwiseRow<T, pass> depthwise_row_for(const Conv<T>& conv) {
#define RF_ROW(K, D, S) \
  if (conv.kernel == K && conv.dilation == D && conv.stride == S) return depthwise_row<T, L, K, D, S, pass>;
  RF_ROW(3, 1, 1) RF_ROW(5, 1, 1) RF_ROW(3, 2, 1) RF_ROW(5, 2, 1)
  RF_ROW(3, 1, 2) RF_ROW(5, 1, 2) RF_ROW(3, 2, 2) RF_ROW(5, 2, 2)
#undef RF_ROW
  return nullptr;
}

// Flat, stride 1: acc[i] is row i of kBlock; x points at the block's first row and vector; taps are [K][K][lanes].
template <class T, int K, int D, bool Flip>
RF_INLINE void depthwise_flat_block(const T* x, int64_t pitch, const T* taps, int64_t c,
                                    Vec<T, kLanes<T>>* acc, Ahead& ahead) {
  constexpr int L = kLanes<T>, P = (K - 1) * D / 2;
  for (int v = 0; v < K; v++) {
    fetch<L>(ahead, kBlock * K);
    const T* in = x + (v * D - P) * c - P * pitch;
    Vec<T, L> tap[K];
    unroll<K>(RF_LAMBDA(u) {
      tap[u] = load<L>(taps + (Flip ? (K - 1 - u) * K + K - 1 - v : u * K + v) * L);
    });
    unroll<kBlock + 2 * P>(RF_LAMBDA(i) {
      Vec<T, L> value = load<L>(in);
      in += pitch;
      unroll<K>(RF_LAMBDA(u) {
        constexpr int to = i - u * D;
        if constexpr (to >= 0 && to < kBlock) acc[to] += value * tap[u];
      });
    });
  }
}
