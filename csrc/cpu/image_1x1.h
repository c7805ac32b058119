// ReLU and a frozen 1x1 convolution of whole images, ci -> co channels. `reduce`: FactorizedReduce, whose rows are
// [x(2r, 2q) | x(2r+1, 2q+1)], 2 ci wide, for a matrix that holds both convolutions.
template <class T>
RF_INLINE void relu_pixels(const T* from, int64_t pixels, int64_t step, int64_t c, T* to, int64_t to_step) {
  with_lanes<T>(c, [&](auto lanes) __attribute__((always_inline)) {
    for (int64_t p = 0; p < pixels; p++)
      for (int64_t k = 0; k < c; k += lanes)
        store<lanes>(to + p * to_step + k, relu_vec<T, lanes>(load<lanes>(from + p * step + k)));
  });
}

template <class T>
void conv1x1_forward(View<T> x, int64_t oh, int64_t ow, int64_t ci, int64_t co, bool reduce, const T* pw, T* y,
                     double* mean, double* deviation, T* scratch, Ahead& ahead) {
  int64_t wide = reduce ? 2 * ci : ci, rows = strip_rows<T>(oh, ow * wide);
  with_lanes<T>(co, [&](auto lanes) {
    constexpr int L = lanes;
    T* d = scratch + 3 * round_up(co, kLanes<T>) + round_up(wide, kLanes<T>);
    KeptRows<T, T, L> kept(wide, co, pw, y, false, mean, deviation, scratch, ahead);
    for (int64_t r0 = 0; r0 < oh; r0 += rows) {
      int64_t n = least(rows, oh - r0);
      for (int64_t r = r0; r < r0 + n; r++) {
        T* to = d + (r - r0) * ow * wide;
        if (!reduce) {
          relu_pixels(x.data + r * x.row, ow, x.pixel, ci, to, wide);
          continue;
        }
        const T* even = x.data + 2 * r * x.row;
        relu_pixels(even, ow, 2 * x.pixel, ci, to, wide);
        relu_pixels(even + x.row + x.pixel, ow, 2 * x.pixel, ci, to + ci, wide);
      }
      kept.strip(d, r0 * ow, n * ow);
    }
    finish_moments(kept.shift, oh * ow, co, mean, deviation);
  });
}

template <class T, bool NonTemporal = false>
RF_INLINE void masked_pixels(const T* d, const T* x, int64_t pixels, int64_t d_step, int64_t x_step, int64_t c,
                             int64_t to_step, T* to) {
  with_lanes<T>(c, [&](auto lanes) __attribute__((always_inline)) {
    constexpr int L = lanes;
    for (int64_t p = 0; p < pixels; p++)
      for (int64_t k = 0; k < c; k += L) {
        Vec<T, L> masked = load<L>(x + p * x_step + k) <= 0 ? Vec<T, L>{} : load<L>(d + p * d_step + k);
        if constexpr (NonTemporal && L == kLanes<T>)
          stream<L>(to + p * to_step + k, masked);
        else
          store<L>(to + p * to_step + k, masked);
      }
  });
}

// dx dense, and too large to be in the caches when it is read; coef as of norm_backward
template <class T>
void conv1x1_backward(const T* g, const T* y, const T* coef, View<T> x, int64_t oh, int64_t ow, int64_t ci, int64_t co,
                      bool reduce, const T* pw_t, T* dx, T* scratch, Ahead& ahead) {
  int64_t wide = reduce ? 2 * ci : ci, rows = strip_rows<T>(oh, ow * wide);
  T* back = scratch + rows * ow * co;
  for (int64_t r0 = 0; r0 < oh; r0 += rows) {
    int64_t n = least(rows, oh - r0);
    norm_backward_dense(g + r0 * ow * co, y + r0 * ow * co, coef, n * ow * co, co, scratch);
    with_lanes<T>(wide, [&](auto lanes) { pointwise<T, lanes>(scratch, n * ow, co, pw_t, wide, back, ahead); });
    for (int64_t r = r0; r < r0 + n; r++) {
      const T* d = back + (r - r0) * ow * wide;
      if (!reduce) {
        masked_pixels<T, true>(d, x.data + r * x.row, ow, wide, x.pixel, ci, ci, dx + r * ow * ci);
        continue;
      }
      const T *in = x.data + 2 * r * x.row, *in_odd = in + x.row + x.pixel;
      T *even = dx + 4 * r * ow * ci, *odd = even + 2 * ow * ci;
      fill(even, 4 * ow * ci, T(0));
      masked_pixels(d, in, ow, wide, 2 * x.pixel, ci, 2 * ci, even);
      masked_pixels(d + ci, in_odd, ow, wide, 2 * x.pixel, ci, 2 * ci, odd + ci);
    }
  }
}

// out = scale y + shift
template <class T>
void affine(const T* y, const T* scale, const T* shift, int64_t size, int64_t period, T* out) {
  sweep<T>(size, period, [&](auto lanes, int64_t i, int64_t k) __attribute__((always_inline)) {
    store<lanes>(out + i, load<lanes>(scale + k) * load<lanes>(y + i) + load<lanes>(shift + k));
  });
}

template <class T>
void spread(const T* x, int64_t pixels, int64_t c, T* to, int64_t step) {
  with_lanes<T>(c, [&](auto lanes) __attribute__((always_inline)) {
    constexpr bool aligned = lanes == kLanes<T>;
    for (int64_t p = 0; p < pixels; p++)
      for (int64_t k = 0; k < c; k += lanes)
        if constexpr (aligned)
          stream<lanes>(to + p * step + k, load<lanes>(x + p * c + k));
        else
          store<lanes>(to + p * step + k, load<lanes>(x + p * c + k));
  });
}
