// Convolutions of NAS-Bench-201, from all channels to all: those of one state together. A 3x3 one takes the way of
// Winograd, F(2x2, 3x3) (Lavin and Gray, arXiv 1509.09308): tiles of 2x2 outputs from 4x4 inputs, 16 products instead
// of 36. What all of them read is transformed once; the weights are frozen, and transformed when they are packed.
constexpr int kTile = 2, kPatch = 4, kPlaces = kPatch * kPatch;

// Room of one pixel around the image, and whole tiles.
template <class T>
Frame nor_frame(Size size) {
  auto [h, w, c] = size;
  int64_t pitch = (round_up(w, kTile) + 2) * c;
  return {pitch + c, pitch, (round_up(h, kTile) + 2) * pitch};
}

// The tiles of a strip of an image: as many as fill the registers of the product.
struct Tiles {
  int64_t w, rows, count, pitch;
  Tiles(Size size)
      : w((size.w + 1) / kTile), rows(least((size.h + 1) / kTile, (kStripTiles + w - 1) / w)), count(rows * w),
        pitch(nor_conv_pitch(size.w, size.c)) {}
};

// values[place][tile][channel] = B^T d B of each patch d; x: the upper left one's first pixel
template <class T, int L>
RF_INLINE void transform_patches(const T* x, int64_t row, int64_t c, const Tiles& tiles, int64_t rows, T* values) {
  using V = Vec<T, L>;
  for (int64_t r = 0; r < rows; r++)
    for (int64_t k = 0; k < c; k += L) {
      const T* from = x + r * kTile * row + k;
      V t[kPatch][kPatch];
      auto column = [&](int64_t q, auto j) __attribute__((always_inline)) {
        const T* p = from + q * c;
        V d0 = load<L>(p), d1 = load<L>(p + row), d2 = load<L>(p + 2 * row), d3 = load<L>(p + 3 * row);
        t[0][j] = d0 - d2, t[1][j] = d1 + d2, t[2][j] = d2 - d1, t[3][j] = d1 - d3;
      };
      column(0, std::integral_constant<int, 2>{});
      column(1, std::integral_constant<int, 3>{});
      for (int64_t q = 0; q < tiles.w; q++) {
        unroll<kPatch>(RF_LAMBDA(i) { t[i][0] = t[i][2], t[i][1] = t[i][3]; });
        column(kTile * q + 2, std::integral_constant<int, 2>{});
        column(kTile * q + 3, std::integral_constant<int, 3>{});
        T* to = values + (r * tiles.w + q) * c + k;
        unroll<kPatch>(RF_LAMBDA(i) {
          T* at = to + i * kPatch * tiles.pitch;
          store<L>(at, t[i][0] - t[i][2]);
          store<L>(at + tiles.pitch, t[i][1] + t[i][2]);
          store<L>(at + 2 * tiles.pitch, t[i][2] - t[i][1]);
          store<L>(at + 3 * tiles.pitch, t[i][1] - t[i][3]);
        });
      }
    }
}

// out(row, column, value) = A^T m A for the outputs of each tile, of the L channels that m begins with
template <class T, int L, class Out>
RF_INLINE void transform_products(const T* m, int64_t c, const Tiles& tiles, int64_t rows, Out&& out) {
  using V = Vec<T, L>;
  for (int64_t r = 0; r < rows; r++)
    for (int64_t q = 0; q < tiles.w; q++) {
      const T* from = m + (r * tiles.w + q) * c;
      V upper[kPatch], lower[kPatch];
      unroll<kPatch>(RF_LAMBDA(j) {
        const T* at = from + j * tiles.pitch;
        V m0 = load<L>(at), m1 = load<L>(at + 4 * tiles.pitch), m2 = load<L>(at + 8 * tiles.pitch);
        upper[j] = m0 + m1 + m2, lower[j] = m1 - m2 - load<L>(at + 12 * tiles.pitch);
      });
      out(kTile * r, kTile * q, upper[0] + upper[1] + upper[2]);
      out(kTile * r, kTile * q + 1, upper[1] - upper[2] - upper[3]);
      out(kTile * r + 1, kTile * q, lower[0] + lower[1] + lower[2]);
      out(kTile * r + 1, kTile * q + 1, lower[1] - lower[2] - lower[3]);
    }
}

// The mean of the outputs of the first strip, to take moments about: a sum of outputs is one of products.
template <class T, int L>
void mean_of_tiles(const T* m, int64_t c, const Tiles& tiles, T* shift) {
  constexpr T sums[kPatch] = {1, 2, 0, -1};
  T part = 1 / T(kTile * kTile * tiles.count);
  for (int64_t k = 0; k < c; k += L) {
    Vec<T, L> mean{};
    for (int64_t i = 0; i < kPlaces; i++) {
      T weight = sums[i / kPatch] * sums[i % kPatch] * part;
      for (int64_t q = 0; weight != 0 && q < tiles.count; q++)
        mean += load<L>(m + i * tiles.pitch + q * c + k) * weight;
    }
    store<L>(shift + k, mean);
  }
}

// The outputs of one strip, stored, with their moments.
template <class T, class S, int L, bool NonTemporal>
__attribute__((noinline)) void store_tiles(const T* m, Size size, const Tiles& tiles, int64_t rows, int64_t height,
                                           S* y, const T* shift, T* sum, T* square) {
  for (int64_t k = 0; k < size.c; k += L) {
    Vec<T, L> about = load<L>(shift + k), s{}, q{};
    transform_products<T, L>(
        m + k, size.c, tiles, rows, [&](int64_t r, int64_t p, Vec<T, L> v) __attribute__((always_inline)) {
          if (r >= height || p >= size.w) return;
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

// products[place] = values[place] weights[place], or added
template <class T, int L>
void multiply_places(const T* values, const Tiles& tiles, int64_t count, int64_t c, const T* weights, bool add,
                     T* products, Ahead& ahead) {
  for (int64_t i = 0; i < kPlaces; i++) {
    const T *d = values + i * tiles.pitch, *w = weights + i * c * c;
    T* out = products + i * tiles.pitch;
    add ? pointwise<T, L, true>(d, count, c, w, c, out, ahead) : pointwise<T, L>(d, count, c, w, c, out, ahead);
  }
}

// A row of outputs, tap by tap; x: of the row's first pixel, framed.
template <class T, int L>
void nor_conv_row(const T* x, Frame f, int64_t w, int64_t c, int kernel, const T* weights, bool add, T* out,
                  Ahead& ahead) {
  for (int64_t tap = 0; tap < kernel * kernel; tap++) {
    const T* from = kernel == 1 ? x : x + (tap / 3 - 1) * f.pitch + (tap % 3 - 1) * c;
    add || tap ? pointwise<T, L, true>(from, w, c, weights + tap * c * c, c, out, ahead)
               : pointwise<T, L>(from, w, c, weights + tap * c * c, c, out, ahead);
  }
}

template <class T, class S, int L>
void nor_conv_direct(const T* x, Frame f, Size size, const NorConv<T, S>& conv, T* scratch, Ahead& ahead) {
  auto [h, w, c] = size;
  T *shift = scratch, *sums = shift + period_of<T>(c), *row = sums + 2 * period_of<T>(c);
  for (int64_t r = 0; r < h; r++) {
    nor_conv_row<T, L>(x + f.origin + r * f.pitch, f, w, c, conv.kernel, conv.weights, false, row, ahead);
    add_moments(row, w, c, r == 0, shift, conv.out.mean, conv.out.deviation, sums);
    for (int64_t i = 0; i < w * c; i += L) store<L>(conv.out.y + r * w * c + i, load<L>(row + i));
  }
  finish_moments(shift, h * w, c, conv.out.mean, conv.out.deviation);
}

template <class T, class S, int L>
void nor_conv_moments(const T* sum, const T* square, int64_t c, const ConvOutput<S>& out) {
  for (int64_t i = 0; i < c; i++) out.mean[i] += sum[i], out.deviation[i] += square[i];
}

inline bool all_finite(const double* values, int64_t count) {
  double rest = 0;
  for (int64_t i = 0; i < count; i++) rest += values[i] * 0;
  return rest == 0;
}

template <class T, class S>
void nor_convs_forward(const T* x, Frame f, Size size, int n, const NorConv<T, S>* convs, T* scratch, Ahead& ahead) {
  auto [h, w, c] = size;
  Tiles tiles(size);
  with_lanes<T>(c, [&](auto lanes) {
    constexpr int L = lanes;
    int64_t period = period_of<T>(c), largest = kPlaces * tiles.pitch;
    T *values = scratch, *products = values + largest, *moments = products + largest;
    auto shift_of = [&](int j) { return moments + j * 3 * period; };
    for (int64_t r0 = 0; r0 < h; r0 += kTile * tiles.rows) {
      int64_t rows = least(tiles.rows, (h - r0 + 1) / kTile), height = least(kTile * rows, h - r0);
      const T* from = x + f.origin + r0 * f.pitch;
      bool transformed = false;
      for (int j = 0; j < n; j++) {
        const NorConv<T, S>& conv = convs[j];
        if (conv.kernel == 1) continue;
        if (!transformed) transform_patches<T, L>(from - f.pitch - c, f.pitch, c, tiles, rows, values);
        transformed = true;
        multiply_places<T, L>(values, tiles, rows * tiles.w, c, conv.transformed, false, products, ahead);
        T *shift = shift_of(j), *sum = shift + period, *square = sum + period;
        if (r0 == 0) {
          mean_of_tiles<T, L>(products, c, tiles, shift);
          fill(conv.out.mean, c, 0.0);
          fill(conv.out.deviation, c, 0.0);
        }
        auto* run = conv.out.bypass_cache && L == kLanes<T> ? store_tiles<T, S, L, true> : store_tiles<T, S, L, false>;
        run(products, size, tiles, rows, height, conv.out.y + r0 * w * c, shift, sum, square);
        nor_conv_moments<T, S, L>(sum, square, c, conv.out);
      }
    }
    for (int j = 0; j < n; j++) {
      const NorConv<T, S>& conv = convs[j];
      if (conv.kernel == 1) {
        OutputRows<T, S, L> output(c, c, conv.weights, conv.out, values, ahead);
        for (int64_t r = 0; r < h; r++) output.strip(x + f.origin + r * f.pitch, r * w, w);
        output.finish(h * w);
        continue;
      }
      finish_moments(shift_of(j), h * w, c, conv.out.mean, conv.out.deviation);
      // an infinity or NaN, or a sum beyond the largest number, reaches further through the transform
      if (!all_finite(conv.out.mean, c) || !all_finite(conv.out.deviation, c))
        nor_conv_direct<T, S, L>(x, f, size, conv, values, ahead);
    }
  });
}

// dx = the transposed convolutions of gradients, which are framed for 3x3 ones: `framed`, one image after the
// other. With Direct tap by tap, else true is returned where all of dx is finite.
template <class T, class S, int L, bool Direct>
bool nor_convs_transposed(int n, const NorConvBackward<T, S>* convs, Size size, Frame f, const T* framed, T* dx,
                          T* scratch, Ahead& ahead) {
  auto [h, w, c] = size;
  Tiles tiles(size);
  int64_t largest = kPlaces * tiles.pitch;
  T *values = scratch, *products = values + largest, *rows_of_gradient = products + largest;
  Vec<T, L> rest{};
  for (int64_t r0 = 0; r0 < h; r0 += kTile * tiles.rows) {
    int64_t rows = least(tiles.rows, (h - r0 + 1) / kTile), height = least(kTile * rows, h - r0);
    T* to = dx + r0 * w * c;
    bool started = false;
    const T* image = framed;
    for (int j = 0; j < n; j++) {
      if (convs[j].kernel == 1) continue;
      const T* from = image + f.origin + r0 * f.pitch;
      image += f.size;
      if constexpr (Direct) {
        for (int64_t r = 0; r < height; r++)
          nor_conv_row<T, L>(from + r * f.pitch, f, w, c, 3, convs[j].weights, started, to + r * w * c, ahead);
      } else {
        transform_patches<T, L>(from - f.pitch - c, f.pitch, c, tiles, rows, values);
        multiply_places<T, L>(values, tiles, rows * tiles.w, c, convs[j].transformed, started, products, ahead);
      }
      started = true;
    }
    if (started && !Direct)
      for (int64_t k = 0; k < c; k += L)
        transform_products<T, L>(
            products + k, c, tiles, rows, [&](int64_t r, int64_t q, Vec<T, L> v) __attribute__((always_inline)) {
              if (r >= height || q >= w) return;
              T* at = to + (r * w + q) * c + k;
              rest += v * T(0);
              store<L>(at, v);
            });
    for (int j = 0; j < n; j++) {
      if (convs[j].kernel == 3) continue;
      norm_backward_dense(convs[j].norm, r0 * w * c, height * w * c, c, rows_of_gradient);
      started ? pointwise<T, L, true>(rows_of_gradient, height * w, c, convs[j].weights, c, to, ahead)
                     : pointwise<T, L>(rows_of_gradient, height * w, c, convs[j].weights, c, to, ahead);
      started = true;
    }
  }
  T total = 0;
  for (int l = 0; l < L; l++) total += rest[l];
  return total == 0;
}

template <class T, class S>
void nor_convs_backward(int n, const NorConvBackward<T, S>* convs, Size size, Frame f, T* framed, T* dx,
                        T* scratch, Ahead& ahead) {
  auto [h, w, c] = size;
  T* image = framed;
  for (int j = 0; j < n; j++) {
    if (convs[j].kernel == 1) continue;
    for (int64_t r = 0; r < h; r++)
      norm_backward_dense(convs[j].norm, r * w * c, w * c, c, image + f.origin + r * f.pitch);
    image += f.size;
  }
  with_lanes<T>(c, [&](auto lanes) {
    constexpr int L = lanes;
    if (nor_convs_transposed<T, S, L, false>(n, convs, size, f, framed, dx, scratch, ahead)) return;
    nor_convs_transposed<T, S, L, true>(n, convs, size, f, framed, dx, scratch, ahead);
  });
}
