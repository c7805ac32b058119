// d = coef0 g + coef1 (y - coef2) + coef3: the gradient at a BatchNorm's input, formed where it is used.
template <class T, int L>
struct NormCoefficients {
  Vec<T, L> slope, factor, mean, constant;
  RF_INLINE NormCoefficients(const T* coef, int64_t period)
      : slope(load<L>(coef)), factor(load<L>(coef + period)), mean(load<L>(coef + 2 * period)),
        constant(load<L>(coef + 3 * period)) {}
  template <class G, class S>
  RF_INLINE Vec<T, L> operator()(const G* g, const S* y) const {
    return slope * load<L>(g) + (factor * (load<L>(y) - mean) + constant);
  }
};

template <class T, class G, class S>
RF_INLINE void norm_backward_dense(const G* g, const S* y, const T* coef, int64_t size, int64_t c, T* d) {
  int64_t period = repeated<T>(c);
  sweep_channels<T>(size, period, [&](auto lanes, int64_t k) __attribute__((always_inline)) {
    constexpr int L = lanes;
    NormCoefficients<T, L> norm(coef + k, period);
    return [=](int64_t i) __attribute__((always_inline)) { store<L>(d + i, norm(g + i, y + i)); };
  });
}

template <class T, class G, class S, int L>
void conv_backward_wide(const G* g, const S* y, const T* coef, int64_t h, int64_t w, int64_t c, Conv conv,
                        const T* dw, const T* pw_t, Frame f, T* e, bool add, T* dx, T* scratch, Ahead& ahead) {
  int64_t oh = pooled(h, conv.stride), ow = pooled(w, conv.stride);
  bool dense = f.pitch == ow * c;
  int64_t rows = dense ? strip_rows<T>(oh, ow * c) : 1;
  auto depthwise = depthwise_row_for<T, L, Pass::Backward>(conv);
  int64_t reach = (conv.kernel - 1) * conv.dilation / 2, done = 0;
  for (int64_t r0 = 0; r0 < oh; r0 += rows) {
    int64_t n = least(rows, oh - r0);
    norm_backward_dense(g + r0 * ow * c, y + r0 * ow * c, coef, n * ow * c, c, scratch);
    pointwise<T, L>(scratch, n * ow, c, pw_t, c, e + f.origin + r0 * f.pitch, ahead);
    // rows of dx follow as soon as the rows of e that they need are there, still in the first-level cache
    int64_t ready = r0 + n == oh ? h : conv.stride * (r0 + n) - reach;
    for (; done < ready; done++) depthwise(e + f.origin, f.pitch, dw, c, done, oh, w, add, dx + done * w * c, ahead);
  }
}

template <class T, int K, int D>
void depthwise_flat_backward(const T* e, Frame f, int64_t h, int64_t w, int64_t c, const T* dw, bool add, T* dx,
                             Ahead& ahead) {
  constexpr int L = kLanes<T>;
  int64_t row = w * c;
  for (int64_t r0 = 0; r0 < h; r0 += kBlock)
    for (int64_t i = 0; i < row; i += L) {
      int64_t rows = least<int64_t>(kBlock, h - r0), count = least<int64_t>(L, row - i);
      T* to = dx + r0 * row + i;
      const T* from = e + f.origin + r0 * f.pitch + i;
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
void pointwise_flat_backward(const G* g, const S* y, const T* coef, int64_t h, int64_t w, const T* pw_t, Frame f,
                             T* e, Ahead& ahead) {
  constexpr int L = kLanes<T>;
  Vec<T, L> weights[C];
  unroll<C>(RF_LAMBDA(j) { weights[j] = load<L>(pw_t + j * L); });
  NormCoefficients<T, L> norm(coef, L);
  for (int64_t r = 0; r < h; r++)
    for (int64_t i = 0; i < w * C; i += L) {
      int64_t at = r * w * C + i, count = w * C - i;
      T* to = e + f.origin + r * f.pitch + i;
      fetch<L>(ahead, C);
      if (count >= L) {
        store<L>(to, pointwise_flat<T, C>(norm(g + at, y + at), weights));
      } else {
        alignas(64) G some_g[L] = {};
        alignas(64) S some_y[L] = {};
        copy(g + at, count, some_g);
        copy(y + at, count, some_y);
        store_some<T>(to, pointwise_flat<T, C>(norm(some_g, some_y), weights), count);
      }
    }
}

template <class T, class G, class S>
void conv_backward(const G* g, const S* y, const T* coef, int64_t h, int64_t w, int64_t c, Conv conv, const T* dw,
                   const T* pw_t, Frame f, T* e, bool add, T* dx, T* scratch, Ahead& ahead) {
  if (is_flat<T>(c, conv.stride)) {
    with_flat_channels<T>(
        c, [&](auto channels) { pointwise_flat_backward<T, G, S, channels>(g, y, coef, h, w, pw_t, f, e, ahead); });
    return with_kernel(
        conv, [&](auto k, auto d) { depthwise_flat_backward<T, k, d>(e, f, h, w, c, dw, add, dx, ahead); });
  }
  with_lanes<T>(c, [&](auto lanes) {
    conv_backward_wide<T, G, S, lanes>(g, y, coef, h, w, c, conv, dw, pw_t, f, e, add, dx, scratch, ahead);
  });
}

template <class T, class S>
void reduce_backward(const T* g, const S* y, const T* coef, int64_t h, int64_t w, int64_t c, const T* pw_t, T* dx,
                     T* scratch, Ahead& ahead) {
  int64_t ow = w / 2;
  T* both = scratch + ow * c;
  for (int64_t r = 0; r < h / 2; r++) {
    norm_backward_dense(g + r * ow * c, y + r * ow * c, coef, ow * c, c, scratch);
    with_lanes<T>(c, [&](auto lanes) { pointwise<T, lanes>(scratch, ow, c, pw_t, 2 * c, both, ahead); });
    T *even = dx + 2 * r * w * c, *odd = even + (w + 1) * c;
    for (int64_t q = 0; q < ow; q++)
      for (int64_t k = 0; k < c; k++) {
        even[2 * q * c + k] += both[2 * q * c + k];
        odd[2 * q * c + k] += both[(2 * q + 1) * c + k];
      }
  }
}
