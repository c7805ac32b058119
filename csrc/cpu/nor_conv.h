// Convolutions of NAS-Bench-201, from all channels to all: those of one state together. A 3x3 one takes the way of
// Winograd, F(2x2, 3x3) (Lavin and Gray, arXiv 1509.09308): tiles of 2x2 outputs from 4x4 inputs, 16 products instead
// of 36. (F(4x4, 3x3), with 36 for 16 outputs, is five to ten times as far from float64 as the convolution itself.) The
// weights are frozen, and transformed when they are packed.
constexpr int kTile = 2, kPatch = 4, kPlaces = kPatch * kPatch;

// Room of one pixel around the image, and whole tiles.
template <class T>
Frame nor_frame(Size size) {
  auto [h, w, c] = size;
  int64_t pitch = (round_up(w, kTile) + 2) * c;
  return {pitch + c, pitch, (round_up(h, kTile) + 2) * pitch};
}

// Tiles of an image that pass through the products together: `rows` of them from output row r on, `w` in each from
// column q on.
struct Strip {
  int64_t r, q, rows, w;
  int64_t count() const { return rows * w; }
};
// f(strip), over the image
template <class F>
RF_INLINE void each_strip(Size size, F&& f) {
  int64_t across = (size.w + 1) / kTile, down = (size.h + 1) / kTile, most_tiles = strip_tiles(size.c);
  int64_t w = least(across, most_tiles), rows = most_tiles / w;
  for (int64_t r = 0; r < down; r += rows)
    for (int64_t q = 0; q < across; q += w)
      f(Strip{kTile * r, kTile * q, least(rows, down - r), least(w, across - q)});
}

// values[place][tile][channel] = B^T d B of each patch d of a framed image
template <class T, int L>
RF_INLINE void transform_patches(const T* x, Frame f, int64_t c, const Strip& strip, Operand<T>* values) {
  using V = Vec<T, L>;
  int64_t row = f.pitch, pitch = place_pitch(c);
  for (int64_t r = 0; r < strip.rows; r++)
    for (int64_t k = 0; k < c; k += L) {
      // a patch begins one pixel before its outputs
      const T* from = x + f.origin + (strip.r + r * kTile - 1) * row + (strip.q - 1) * c + k;
      V t[kPatch][kPatch];
      auto column = [&](int64_t q, auto j) __attribute__((always_inline)) {
        const T* p = from + q * c;
        V d0 = load<L>(p), d1 = load<L>(p + row), d2 = load<L>(p + 2 * row), d3 = load<L>(p + 3 * row);
        t[0][j] = d0 - d2, t[1][j] = d1 + d2, t[2][j] = d2 - d1, t[3][j] = d1 - d3;
      };
      column(0, std::integral_constant<int, 2>{});
      column(1, std::integral_constant<int, 3>{});
      for (int64_t q = 0; q < strip.w; q++) {
        unroll<kPatch>(RF_LAMBDA(i) { t[i][0] = t[i][2], t[i][1] = t[i][3]; });
        column(kTile * q + 2, std::integral_constant<int, 2>{});
        column(kTile * q + 3, std::integral_constant<int, 3>{});
        Operand<T>* to = values + (r * strip.w + q) * c + k;
        unroll<kPatch>(RF_LAMBDA(i) {
          Operand<T>* at = to + i * kPatch * pitch;
          store<L>(at, t[i][0] - t[i][2]);
          store<L>(at + pitch, t[i][1] + t[i][2]);
          store<L>(at + 2 * pitch, t[i][2] - t[i][1]);
          store<L>(at + 3 * pitch, t[i][1] - t[i][3]);
        });
      }
    }
}

// out(row, column, value) = A^T m A for the outputs of each tile that lie in the image, of the L channels that m begins
// with
template <class T, int L, class Out>
RF_INLINE void transform_products(const T* m, Size size, const Strip& strip, Out&& out) {
  using V = Vec<T, L>;
  int64_t pitch = place_pitch(size.c);
  for (int64_t i = 0; i < strip.rows; i++)
    for (int64_t j = 0; j < strip.w; j++) {
      const T* from = m + (i * strip.w + j) * size.c;
      int64_t r = strip.r + kTile * i, q = strip.q + kTile * j;
      bool last_row = r + 1 == size.h, last_column = q + 1 == size.w;
      V upper[kPatch], lower[kPatch];
      unroll<kPatch>(RF_LAMBDA(n) {
        const T* at = from + n * pitch;
        V m0 = load<L>(at), m1 = load<L>(at + 4 * pitch), m2 = load<L>(at + 8 * pitch);
        upper[n] = m0 + m1 + m2, lower[n] = m1 - m2 - load<L>(at + 12 * pitch);
      });
      out(r, q, upper[0] + upper[1] + upper[2]);
      if (!last_column) out(r, q + 1, upper[1] - upper[2] - upper[3]);
      if (last_row) continue;
      out(r + 1, q, lower[0] + lower[1] + lower[2]);
      if (!last_column) out(r + 1, q + 1, lower[1] - lower[2] - lower[3]);
    }
}

// The mean of the outputs of the first strip, to take moments about: a sum of outputs is one of products.
template <class T, int L>
void mean_of_tiles(const T* m, int64_t c, const Strip& strip, T* shift) {
  constexpr T sums[kPatch] = {1, 2, 0, -1};
  T part = 1 / T(kTile * kTile * strip.count());
  for (int64_t k = 0; k < c; k += L) {
    Vec<T, L> mean{};
    for (int64_t i = 0; i < kPlaces; i++) {
      T weight = sums[i / kPatch] * sums[i % kPatch] * part;
      for (int64_t q = 0; weight != 0 && q < strip.count(); q++)
        mean += load<L>(m + i * place_pitch(c) + q * c + k) * weight;
    }
    store<L>(shift + k, mean);
  }
}

// The outputs of one strip, stored, with their moments.
template <class T, class S, int L, bool NonTemporal>
__attribute__((noinline)) void store_tiles(const T* m, Size size, const Strip& strip, S* y, const T* shift, T* sum,
                                           T* square) {
  for (int64_t k = 0; k < size.c; k += L) {
    Vec<T, L> about = load<L>(shift + k), s{}, q{};
    transform_products<T, L>(m + k, size, strip,
                             [&](int64_t r, int64_t p, Vec<T, L> v) __attribute__((always_inline)) {
                               S* to = y + (r * size.w + p) * size.c + k;
                               if constexpr (NonTemporal)
                                 stream<L>(to, v);
                               else
                                 store<L>(to, v);
                               Vec<T, L> off = v - about;
                               s += off;
                               q += off * off;
                             });
    store<L>(sum + k, s);
    store<L>(square + k, q);
  }
}

// products[place] = values[place] weights[place], of whole tiles of the product: there is room for them
template <class T, int L, int Pixels, int Blocks>
__attribute__((noinline)) void multiply_columns(const Operand<T>* values, int64_t count, int64_t c, const T* weights,
                                                T* products, Ahead& ahead) {
#ifdef RFDARTS_AMX
  if constexpr (L == kTileSize)
    if (int64_t pairs = tile_pairs(c)) {
      static_assert(2 * kFewTiles <= kTileSize);
      Tiles tiles(count, pairs);
      for (int64_t i = 0; i < kPlaces; i++) {
        fetch<L>(ahead, count * Blocks * c);
        multiply_tiles<1, Blocks>(values + i * place_pitch(c), c, pairs, weights + i * c * c, c);
        store_sums<1, Blocks>(products + i * place_pitch(c), c);
      }
      return;
    }
#endif
  for (int64_t i = 0; i < kPlaces; i++) {
    fetch<L>(ahead, count * Blocks * c);
    const Operand<T>* d = values + i * place_pitch(c);
    const T* w = weights + i * c * c;
    T* to = products + i * place_pitch(c);
    for (int64_t p = 0; p < count; p += Pixels)
      pointwise_tile<T, L, Pixels, Blocks>(d + p * c, c, w, c,
                                           [&](int64_t m, int64_t n, Vec<T, L> v) __attribute__((always_inline)) {
                                             store<L>(to + (p + m) * c + n, v);
                                           });
  }
}
template <class T, int L>
void multiply_places(const Operand<T>* values, const Strip& strip, int64_t c, const T* weights, T* products,
                     Ahead& ahead) {
  for_column_groups<L>(c, [&](auto blocks, int64_t o) {
    constexpr int P = blocks == 1 ? int(kFewTiles) : kTilePixels<blocks>;
    multiply_columns<T, L, P, blocks>(values, strip.count(), c, weights + o, products + o, ahead);
  });
}

// n numbers as operands: where they are, or in scratch
template <class T>
RF_INLINE const Operand<T>* as_operands(const T* x, int64_t n, T* scratch) {
  if constexpr (kDepth<T> == 1) return x;
  to_operands(x, n, operands(scratch));
  return operands(scratch);
}

// A row of outputs, tap by tap; x: of the row's first pixel, framed; scratch: for a row.
template <class T, int L>
void nor_conv_row(const T* x, Frame f, int64_t w, int64_t c, const T* weights, bool add, T* out, T* scratch,
                  Ahead& ahead) {
  for (int64_t tap = 0; tap < 9; tap++) {
    auto* from = as_operands(x + (tap / 3 - 1) * f.pitch + (tap % 3 - 1) * c, w * c, scratch);
    if (add || tap)
      pointwise<T, L, true>(from, w, c, weights + tap * c * c, c, c, out, ahead);
    else
      pointwise<T, L>(from, w, c, weights + tap * c * c, c, c, out, ahead);
  }
}

template <class T, class S, int L>
void nor_conv_direct(const T* x, Frame f, Size size, const NorConv<T, S>& conv, T* scratch, Ahead& ahead) {
  auto [h, w, c] = size;
  T *shift = scratch, *sums = shift + period_of<T>(c), *row = sums + 2 * period_of<T>(c);
  for (int64_t r = 0; r < h; r++) {
    nor_conv_row<T, L>(x + f.origin + r * f.pitch, f, w, c, conv.weights, false, row, row + w * c, ahead);
    add_moments(row, w, c, r == 0, shift, conv.out.mean, conv.out.deviation, sums);
    for (int64_t i = 0; i < w * c; i += L) store<L>(conv.out.y + r * w * c + i, load<L>(row + i));
  }
  finish_moments(shift, h * w, c, conv.out.mean, conv.out.deviation);
}

// how many are 3x3, which come first
template <class Conv>
RF_INLINE int count_3x3(int n, const Conv* convs) {
  int count = 0;
  while (count < n && convs[count].kernel == 3) count++;
  return count;
}

template <class T, class S>
void nor_convs_forward(const T* x, Frame f, Size size, int n, const NorConv<T, S>* convs, T* scratch, Ahead& ahead) {
  auto [h, w, c] = size;
  int n3 = count_3x3(n, convs);
  with_lanes<T>(c, [&](auto lanes) {
    constexpr int L = lanes;
    int64_t period = period_of<T>(c);
    Operand<T>* values = operands(scratch);
    T *products = scratch + kPlaces * place_pitch(c), *moments = products + kPlaces * place_pitch(c);
    auto outputs = [&](const Strip& strip, int j) __attribute__((always_inline)) {
      const ConvOutput<S>& out = convs[j].out;
      T *shift = moments + 3 * j * period, *sum = shift + period, *square = sum + period;
      multiply_places<T, L>(values, strip, c, convs[j].transformed, products, ahead);
      if (strip.r + strip.q == 0) {
        mean_of_tiles<T, L>(products, c, strip, shift);
        fill(out.mean, c, 0.0);
        fill(out.deviation, c, 0.0);
      }
      auto* store = out.bypass_cache && L == kLanes<T> ? store_tiles<T, S, L, true> : store_tiles<T, S, L, false>;
      store(products, size, strip, out.y, shift, sum, square);
      for (int64_t i = 0; i < c; i++) out.mean[i] += sum[i], out.deviation[i] += square[i];
    };
    auto strips = [&](int first, int last) __attribute__((always_inline)) {
      each_strip(size, [&](const Strip& strip) {
        transform_patches<T, L>(x, f, c, strip, values);
        for (int j = first; j < last; j++) outputs(strip, j);
      });
    };
    // the first-level cache holds the values, products and weights of one convolution of few channels
    if (c <= kLanes<T>)
      for (int j = 0; j < n3; j++) strips(j, j + 1);
    else if (n3)
      strips(0, n3);
    for (int j = 0; j < n3; j++)
      finish_moments(moments + 3 * j * period, h * w, c, convs[j].out.mean, convs[j].out.deviation);
    // an infinity or NaN, or a sum beyond the largest number, reaches further through the transform
    for (int j = 0; j < n3; j++)
      if (!all_finite(convs[j].out.mean, c) || !all_finite(convs[j].out.deviation, c))
        nor_conv_direct<T, S, L>(x, f, size, convs[j], scratch, ahead);
    for (int j = n3; j < n; j++) {
      ConvOutput<S> out = convs[j].out;
      out.y = reinterpret_cast<S*>(scratch + ScratchSize<T>::moments(c, c)), out.bypass_cache = false;
      OutputRows<T, S, L> output(c, c, c, convs[j].weights, out, scratch, ahead);
      output.keep = false;
      T* row = scratch + ScratchSize<T>::moments(c, c) + w * c;
      for (int64_t r = 0; r < h; r++)
        output.strip(as_operands(x + f.origin + r * f.pitch, w * c, row), r * w, w);
      output.finish(h * w);
    }
  });
}

template <class T>
void relu_conv1x1(const T* x, int64_t pixels, int64_t c, const T* weights, T* y, T* scratch) {
  Ahead ahead;
  sweep<T>(pixels * c, period_of<T>(c), [&](auto lanes, int64_t i, int64_t) __attribute__((always_inline)) {
    store<lanes>(operands(scratch) + i, relu_vec<T, lanes>(load<lanes>(x + i)));
  });
  with_lanes<T>(c, [&](auto lanes) { pointwise<T, lanes>(operands(scratch), pixels, c, weights, c, c, y, ahead); });
}

// dx = or += the transposed 3x3 convolution of the framed gradient. Returns whether it is finite: else it may not be
// added, and Direct, tap by tap, is the way.
template <class T, int L, bool Direct>
bool nor_conv_transposed(const T* g, Frame f, Size size, const T* weights, bool add, T* dx, T* scratch, Ahead& ahead) {
  auto [h, w, c] = size;
  if constexpr (Direct) {
    for (int64_t r = 0; r < h; r++)
      nor_conv_row<T, L>(g + f.origin + r * f.pitch, f, w, c, weights, add, dx + r * w * c, scratch, ahead);
    return true;
  }
  Operand<T>* values = operands(scratch);
  T* products = scratch + kPlaces * place_pitch(c);
  Vec<T, L> rest{};
  each_strip(size, [&](const Strip& strip) {
    transform_patches<T, L>(g, f, c, strip, values);
    multiply_places<T, L>(values, strip, c, weights, products, ahead);
    for (int64_t k = 0; k < c; k += L)
      transform_products<T, L>(products + k, size, strip,
                               [&](int64_t r, int64_t q, Vec<T, L> v) __attribute__((always_inline)) {
                                 T* at = dx + (r * w + q) * c + k;
                                 rest += v * T(0);
                                 store<L>(at, add ? load<L>(at) + v : v);
                               });
  });
  T total = 0;
  for (int l = 0; l < L; l++) total += rest[l];
  return total == 0;
}

template <class T, class S>
void nor_convs_backward(const T* x, int n, const NorConvBackward<T, S>* convs, Size size, Frame f, T* framed, T* dx,
                        T* scratch, Ahead& ahead) {
  auto [h, w, c] = size;
  with_lanes<T>(c, [&](auto lanes) {
    constexpr int L = lanes;
    auto each = [&](auto direct) {
      bool finite = true;
      for (int j = 0; j < n; j++) {
        const auto& conv = convs[j];
        if (conv.kernel == 3) {
          for (int64_t r = 0; r < h; r++)
            norm_backward_dense(conv.norm, r * w * c, w * c, c, framed + f.origin + r * f.pitch);
          finite &= nor_conv_transposed<T, L, direct>(framed, f, size, direct ? conv.weights : conv.transformed, j > 0,
                                                      dx, scratch, ahead);
          continue;
        }
        for (int64_t r = 0, rows = strip_rows<T>(h, w * c); r < h; r += rows) {
          int64_t count = least(rows, h - r) * w, at = r * w * c;
          T *y = scratch + rows * w * c, *relu = y + rows * w * c;
          relu_conv1x1(x + at, count, c, conv.forward, y, relu);
          auto* d = operands(scratch);
          norm_backward_dense(NormBackward<T, T, T>{conv.norm.g + at, y, conv.norm.coefficients}, 0, count * c, c, d);
          if (j > 0)
            pointwise<T, L, true>(d, count, c, conv.weights, c, c, dx + r * w * c, ahead);
          else
            pointwise<T, L>(d, count, c, conv.weights, c, c, dx + r * w * c, ahead);
        }
      }
      return finite;
    };
    if (!each(std::false_type{})) each(std::true_type{});
  });
}
