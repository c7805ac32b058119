// The convolutions of one branch, backward.
// A vector of channels of NormBackward.
template <class T, int L>
struct NormCoefficients {
  Vec<T, L> scale, slope, mean, shift;
  RF_INLINE NormCoefficients(const T* rows, int64_t period)
      : scale(load<L>(rows + kScale * period)), slope(load<L>(rows + kSlope * period)),
        mean(load<L>(rows + kMean * period)), shift(load<L>(rows + kShift * period)) {}
  template <class G, class S>
  RF_INLINE Vec<T, L> operator()(const G* g, const S* y) const {
    // with running statistics slope is 0, whatever y is: an infinity or NaN too
    Vec<T, L> of_statistics = slope != 0 ? slope * (load<L>(y) - mean) + shift : shift;
    return scale * load<L>(g) + of_statistics;
  }
};

// d = `count` elements from element `at` on
template <class T, class G, class S, class D>
RF_INLINE void norm_backward_dense(const NormBackward<T, G, S>& norm, int64_t at, int64_t count, int64_t c, D* d) {
  int64_t period = period_of<T>(c);
  const G* g = norm.g + at;
  const S* y = norm.y + at;
  sweep_channels<T>(count, period, [&](auto lanes, int64_t k) __attribute__((always_inline)) {
    constexpr int L = lanes;
    NormCoefficients<T, L> gradient(norm.coefficients + k, period);
    return [=](int64_t i) __attribute__((always_inline)) { store<L>(d + i, gradient(g + i, y + i)); };
  });
}

// d = `pixels` pixels from pixel `begin` on, `step` apart, of some of the c channels
template <class T, class G, class S, class D>
void norm_backward_pixels(const NormBackward<T, G, S>& norm, int64_t c, Channels some, int64_t begin, int64_t pixels,
                          D* d, int64_t step) {
  if (some.count == c && step == c) return norm_backward_dense(norm, begin * c, pixels * c, c, d);
  int64_t period = period_of<T>(c);
  const G* g = norm.g + begin * c + some.first;
  const S* y = norm.y + begin * c + some.first;
  with_lanes<T>(some.count, [&](auto lanes) __attribute__((always_inline)) {
    for (int64_t k = 0; k < some.count; k += lanes) {
      NormCoefficients<T, lanes> gradient(norm.coefficients + some.first + k, period);
      for (int64_t p = 0; p < pixels; p++) store<lanes>(d + p * step + k, gradient(g + p * c + k, y + p * c + k));
    }
  });
}

template <class T, class G, class S, int L>
void conv_backward_wide(const NormBackward<T, G, S>& norm, Size size, const Conv<T>& conv, Frame f, T* framed,
                        bool add, T* dx, T* scratch, Ahead& ahead) {
  auto [h, w, c] = size;
  int64_t oh = pooled(h, conv.stride), ow = pooled(w, conv.stride);
  bool dense = f.pitch == ow * c;
  int64_t rows = dense ? strip_rows<T>(oh, ow * c) : 1;
  auto depthwise = depthwise_row_for<T, L, Pass::Backward>(conv);
  int64_t reach = (conv.kernel - 1) * conv.dilation / 2, done = 0;
  auto* d = operands(scratch);
  for (int64_t r0 = 0; r0 < oh; r0 += rows) {
    int64_t n = least(rows, oh - r0);
    norm_backward_dense(norm, r0 * ow * c, n * ow * c, c, d);
    pointwise<T, L>(d, n * ow, c, conv.pw_t, c, c, framed + f.origin + r0 * f.pitch, ahead);
    // rows of dx follow as soon as the framed rows that they need are there, still in the first-level cache
    int64_t ready = r0 + n == oh ? h : conv.stride * (r0 + n) - reach;
    for (; done < ready; done++)
      depthwise(framed + f.origin, f.pitch, conv.dw, c, done, oh, w, add, dx + done * w * c, ahead);
  }
}

template <class T, int K, int D>
void depthwise_flat_backward(const T* framed, Frame f, Size size, const T* dw, bool add, T* dx, Ahead& ahead) {
  auto [h, w, c] = size;
  constexpr int L = kLanes<T>;
  int64_t row = w * c;
  for (int64_t r0 = 0; r0 < h; r0 += kBlock)
    for (int64_t i = 0; i < row; i += L) {
      int64_t rows = least<int64_t>(kBlock, h - r0), count = least<int64_t>(L, row - i);
      T* to = dx + r0 * row + i;
      const T* from = framed + f.origin + r0 * f.pitch + i;
      Vec<T, L> acc[kBlock];
      if (rows == kBlock && count == L) {
        unroll<kBlock>(RF_LAMBDA(o) { acc[o] = Vec<T, L>{}; });
        if (add) unroll<kBlock>(RF_LAMBDA(o) { acc[o] = load<L>(to + o * row); });
        depthwise_flat_block<T, K, D, true>(from, f.pitch, dw, c, acc, ahead);
        unroll<kBlock>(RF_LAMBDA(o) { store<L>(to + o * row, acc[o]); });
        continue;
      }
      unroll<kBlock>(RF_LAMBDA(o) { acc[o] = add && o < rows ? load_some<T>(to + o * row, count) : Vec<T, L>{}; });
      depthwise_flat_block<T, K, D, true>(from, f.pitch, dw, c, acc, ahead);
      unroll<kBlock>(RF_LAMBDA(o) {
        if (o < rows) store_some<T>(to + o * row, acc[o], count);
      });
    }
}

template <class T, class G, class S, int C>
void pointwise_flat_backward(const NormBackward<T, G, S>& norm, int64_t h, int64_t w, const T* pw_t, Frame f,
                             T* framed, Ahead& ahead) {
  constexpr int L = kLanes<T>;
  Vec<T, L> weights[C];
  unroll<C / kDepth<T>>(RF_LAMBDA(j) { weights[j] = load<L>(pw_t + j * L); });
  NormCoefficients<T, L> gradient(norm.coefficients, L);
  const G* g = norm.g;
  const S* y = norm.y;
  for (int64_t r = 0; r < h; r++)
    for (int64_t i = 0; i < w * C; i += L) {
      int64_t at = r * w * C + i, count = w * C - i;
      T* to = framed + f.origin + r * f.pitch + i;
      fetch<L>(ahead, C);
      if (count >= L) {
        store<L>(to, pointwise_flat<T, C>(gradient(g + at, y + at), weights));
      } else {
        alignas(64) G some_g[L] = {};
        alignas(64) S some_y[L] = {};
        copy(g + at, count, some_g);
        copy(y + at, count, some_y);
        store_some<T>(to, pointwise_flat<T, C>(gradient(some_g, some_y), weights), count);
      }
    }
}

template <class T, class G, class S>
void conv_backward(const NormBackward<T, G, S>& norm, Size size, const Conv<T>& conv, Frame f, T* framed, bool add,
                   T* dx, T* scratch, Ahead& ahead) {
  if (is_flat<T>(size.c, conv.stride)) {
    with_flat_channels<T>(size.c, [&](auto channels) {
      pointwise_flat_backward<T, G, S, channels>(norm, size.h, size.w, conv.pw_t, f, framed, ahead);
    });
    return with_kernel(
        conv, [&](auto k, auto d) { depthwise_flat_backward<T, k, d>(framed, f, size, conv.dw, add, dx, ahead); });
  }
  with_lanes<T>(size.c, [&](auto lanes) {
    conv_backward_wide<T, G, S, lanes>(norm, size, conv, f, framed, add, dx, scratch, ahead);
  });
}

template <class T, class S>
void reduce_backward(const NormBackward<T, T, S>& norm, Size size, const T* pw_t, T* dx, T* scratch, Ahead& ahead) {
  auto [h, w, c] = size;
  int64_t ow = w / 2;
  auto* d = operands(scratch);
  T* back = scratch + ow * c;
  // row y of dx: a pixel of every two, from one half of the outputs
  for (int64_t y = 0; y < h; y++) {
    int half = y % 2;
    Channels part = part_of(c, half, 2);
    norm_backward_pixels(norm, c, part, y / 2 * ow, ow, d, part.count);
    with_lanes<T>(c, [&](auto lanes) {
      pointwise<T, lanes>(d, ow, part.count, pw_t + part.first / kDepth<T> * c, c, c, back, ahead);
    });
    T* to = dx + (y * w + half) * c;
    for (int64_t q = 0; q < ow; q++)
      for (int64_t k = 0; k < c; k++) to[2 * q * c + k] += back[q * c + k];
  }
}
