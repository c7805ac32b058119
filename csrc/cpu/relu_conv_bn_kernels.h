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
void conv1x1_forward(ImageView<T> x, int64_t oh, int64_t ow, int64_t ci, bool reduce, int n, const Conv1x1<T>* convs,
                     T* scratch, Ahead& ahead) {
  int64_t inputs = reduce ? 2 * ci : ci, rows = strip_rows<T>(oh, ow * inputs);
  auto room = [&](const Conv1x1<T>& conv) { return 3 * conv.co + round_up(inputs, kLanes<T>); };
  T* d = scratch;
  for (int i = 0; i < n; i++) d += room(convs[i]);
  d = scratch + round_up(d - scratch, kLanes<T>);
  for (int64_t r0 = 0; r0 < oh; r0 += rows) {
    int64_t count = least(rows, oh - r0);
    for (int64_t r = r0; r < r0 + count; r++) {
      T* to = d + (r - r0) * ow * inputs;
      if (!reduce) {
        relu_pixels(x.data + r * x.row, ow, x.pixel, ci, to, inputs);
        continue;
      }
      const T* even = x.data + 2 * r * x.row;
      relu_pixels(even, ow, 2 * x.pixel, ci, to, inputs);
      relu_pixels(even + x.row + x.pixel, ow, 2 * x.pixel, ci, to + ci, inputs);
    }
    T* own = scratch;
    for (int i = 0; i < n; i++) {
      const Conv1x1<T>& conv = convs[i];
      with_lanes<T>(conv.co, [&](auto lanes) {
        OutputRows<T, T, lanes> output(inputs, conv.co, conv.pw, conv.out, own, ahead);
        output.strip(d, r0 * ow, count * ow);
        if (r0 + count == oh) output.finish(oh * ow);
      });
      own += room(conv);
    }
  }
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

// pixels of d, `step` apart
template <class T>
RF_INLINE void norm_backward_pixels(const Conv1x1Backward<T>& conv, int64_t first, int64_t pixels, T* d,
                                    int64_t step) {
  int64_t c = conv.co, period = period_of<T>(c);
  if (step == c) return norm_backward_dense(conv.norm, first * c, pixels * c, c, d);
  const T *g = conv.norm.g + first * c, *y = conv.norm.y + first * c;
  with_lanes<T>(c, [&](auto lanes) __attribute__((always_inline)) {
    for (int64_t k = 0; k < c; k += lanes) {
      NormCoefficients<T, lanes> gradient(conv.norm.coefficients + k, period);
      for (int64_t p = 0; p < pixels; p++) store<lanes>(d + p * step + k, gradient(g + p * c + k, y + p * c + k));
    }
  });
}

// dx dense, and too large to be in the caches when it is read; pw_t: of all convolutions, one below the other
template <class T>
void conv1x1_backward(ImageView<T> x, int64_t oh, int64_t ow, int64_t ci, bool reduce, int n,
                      const Conv1x1Backward<T>* convs, const T* pw_t, T* dx, T* scratch, Ahead& ahead) {
  int64_t inputs = reduce ? 2 * ci : ci, co = 0;
  for (int i = 0; i < n; i++) co += convs[i].co;
  int64_t rows = strip_rows<T>(oh, ow * most(inputs, co));
  T* back = scratch + rows * ow * co;
  for (int64_t r0 = 0; r0 < oh; r0 += rows) {
    int64_t count = least(rows, oh - r0);
    T* to = scratch;
    for (int i = 0; i < n; to += convs[i++].co) norm_backward_pixels(convs[i], r0 * ow, count * ow, to, co);
    with_lanes<T>(inputs, [&](auto lanes) { pointwise<T, lanes>(scratch, count * ow, co, pw_t, inputs, back, ahead); });
    for (int64_t r = r0; r < r0 + count; r++) {
      const T* d = back + (r - r0) * ow * inputs;
      if (!reduce) {
        masked_pixels<T, true>(d, x.data + r * x.row, ow, inputs, x.pixel, ci, ci, dx + r * ow * ci);
        continue;
      }
      const T *in = x.data + 2 * r * x.row, *in_odd = in + x.row + x.pixel;
      T *even = dx + 4 * r * ow * ci, *odd = even + 2 * ow * ci;
      fill(even, 4 * ow * ci, T(0));
      masked_pixels(d, in, ow, inputs, 2 * x.pixel, ci, 2 * ci, even);
      masked_pixels(d + ci, in_odd, ow, inputs, 2 * x.pixel, ci, 2 * ci, odd + ci);
    }
  }
}

// out = scale y + shift
template <class T>
void affine(const T* y, const T* scale, const T* shift, int64_t count, int64_t period, bool bypass_cache,
            T* out) {
  auto run = [&](auto bypass) __attribute__((always_inline)) {
    sweep_channels<T>(count, period, [&](auto lanes, int64_t k) __attribute__((always_inline)) {
      constexpr int L = lanes;
      auto a = load<L>(scale + k), b = load<L>(shift + k);
      return [=](int64_t i) __attribute__((always_inline)) {
        Vec<T, L> v = a * load<L>(y + i) + b;
        if constexpr (bypass && L == kLanes<T>)
          stream<L>(out + i, v);
        else
          store<L>(out + i, v);
      };
    });
  };
  // an image of few channels may begin amidst a vector
  if (bypass_cache && reinterpret_cast<uintptr_t>(out) % 64 == 0)
    run(std::true_type{});
  else
    run(std::false_type{});
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
