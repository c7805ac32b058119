// ReLU and a frozen 1x1 convolution of whole images, ci -> co channels. `reduce`: FactorizedReduce, a convolution of
// the pixels (2r, 2q) and one of (2r+1, 2q+1), for a half of the outputs each.
template <class T>
RF_INLINE void relu_pixels(const T* from, int64_t pixels, int64_t step, int64_t c, Operand<T>* to) {
  with_lanes<T>(c, [&](auto lanes) __attribute__((always_inline)) {
    for (int64_t p = 0; p < pixels; p++)
      for (int64_t k = 0; k < c; k += lanes)
        store<lanes>(to + p * c + k, relu_vec<T, lanes>(load<lanes>(from + p * step + k)));
  });
}

template <class T, class S>
void conv1x1_forward(ImageView<T> x, int64_t oh, int64_t ow, int64_t ci, bool reduce, int n,
                     const Conv1x1<T, S>* convs, T* scratch, Ahead& ahead) {
  int64_t rows = strip_rows<T>(oh, ow * ci);
  int parts = reduce ? 2 : 1;
  auto room = [&](const Conv1x1<T, S>& conv) { return 3 * conv.co + round_up(ci, kLanes<T>); };
  int64_t begin = 0;
  for (int i = 0; i < n; i++) begin += room(convs[i]);
  auto* d = operands(scratch + round_up(begin, kLanes<T>));
  for (int part = 0; part < parts; part++)
    for (int64_t r0 = 0; r0 < oh; r0 += rows) {
      int64_t count = least(rows, oh - r0);
      for (int64_t r = r0; r < r0 + count; r++)
        relu_pixels(x.data + (parts * r + part) * x.row + part * x.pixel, ow, parts * x.pixel, ci,
                    d + (r - r0) * ow * ci);
      T* own = scratch;
      for (int i = 0; i < n; i++) {
        const Conv1x1<T, S>& conv = convs[i];
        Channels some = part_of(conv.co, part, parts);
        with_most_lanes<T>(some.count, [&](auto lanes) {
          OutputRows<T, S, lanes> output(ci, some.count, conv.co, conv.pw + some.first, conv.out.from(some.first), own,
                                         ahead);
          output.strip(d, r0 * ow, count * ow);
          if (r0 + count == oh) output.finish(oh * ow);
        });
        own += room(conv);
      }
    }
}

template <class T, bool NonTemporal = false>
RF_INLINE void masked_pixels(const T* d, const T* x, int64_t pixels, int64_t x_step, int64_t c, int64_t to_step,
                             T* to) {
  with_lanes<T>(c, [&](auto lanes) __attribute__((always_inline)) {
    constexpr int L = lanes;
    for (int64_t p = 0; p < pixels; p++)
      for (int64_t k = 0; k < c; k += L) {
        Vec<T, L> masked = load<L>(x + p * x_step + k) <= 0 ? Vec<T, L>{} : load<L>(d + p * c + k);
        if constexpr (NonTemporal && L == kLanes<T>)
          stream<L>(to + p * to_step + k, masked);
        else
          store<L>(to + p * to_step + k, masked);
      }
  });
}

// dx dense, and too large to be in the caches when it is read; pw_t: of all convolutions, one below the other, with
// `reduce` all first halves before the second ones
template <class T>
void conv1x1_backward(ImageView<T> x, int64_t oh, int64_t ow, int64_t ci, bool reduce, int n,
                      const Conv1x1Backward<T>* convs, const T* pw_t, T* dx, T* scratch, Ahead& ahead) {
  int parts = reduce ? 2 : 1;
  int64_t widths[2] = {}, widest = ci;
  for (int part = 0; part < parts; part++) {
    for (int i = 0; i < n; i++) widths[part] += part_of(convs[i].co, part, parts).count;
    widest = most(widest, widths[part]);
  }
  int64_t rows = strip_rows<T>(oh, ow * widest);
  T* back = scratch + rows * ow * widest;
  for (int64_t r0 = 0; r0 < oh; r0 += rows) {
    int64_t count = least(rows, oh - r0);
    for (int part = 0; part < parts; part++) {
      int64_t width = widths[part];
      auto* to = operands(scratch);
      for (int i = 0; i < n; i++) {
        Channels some = part_of(convs[i].co, part, parts);
        norm_backward_pixels(convs[i].norm, convs[i].co, some, r0 * ow, count * ow, to, width);
        to += some.count;
      }
      const T* matrix = pw_t + part * widths[0] / kDepth<T> * ci;
      with_lanes<T>(ci, [&](auto lanes) {
        pointwise<T, lanes>(operands(scratch), count * ow, width, matrix, ci, ci, back, ahead);
      });
      for (int64_t r = r0; r < r0 + count; r++) {
        const T *d = back + (r - r0) * ow * ci, *in = x.data + (parts * r + part) * x.row + part * x.pixel;
        if (!reduce) {
          masked_pixels<T, true>(d, in, ow, x.pixel, ci, ci, dx + r * ow * ci);
          continue;
        }
        // a pixel of every two
        T* row = dx + (2 * r + part) * 2 * ow * ci;
        fill(row, 2 * ow * ci, T(0));
        masked_pixels(d, in, ow, 2 * x.pixel, ci, 2 * ci, row + part * ci);
      }
    }
  }
}

// out = scale y + shift, or its ReLU
template <class T>
void affine(const T* y, const T* scale, const T* shift, int64_t count, int64_t period, bool bypass_cache, bool relu,
            T* out) {
  auto run = [&](auto bypass, auto rectify) __attribute__((always_inline)) {
    sweep_channels<T>(count, period, [&](auto lanes, int64_t k) __attribute__((always_inline)) {
      constexpr int L = lanes;
      auto a = load<L>(scale + k), b = load<L>(shift + k);
      return [=](int64_t i) __attribute__((always_inline)) {
        Vec<T, L> v = a * load<L>(y + i) + b;
        if constexpr (rectify) v = relu_vec<T, L>(v);
        if constexpr (bypass && L == kLanes<T>)
          stream<L>(out + i, v);
        else
          store<L>(out + i, v);
      };
    });
  };
  // an image of few channels may begin amidst a vector
  bool bypass = bypass_cache && reinterpret_cast<uintptr_t>(out) % 64 == 0;
  using Yes = std::true_type;
  using No = std::false_type;
  if (relu)
    bypass ? run(Yes{}, Yes{}) : run(No{}, Yes{});
  else
    bypass ? run(Yes{}, No{}) : run(No{}, No{});
}

// dx = the gradient at a BatchNorm's input, of a dense image; may be where g is
template <class T>
void norm_backward(const NormBackward<T, T, T>& norm, int64_t count, int64_t c, T* dx) {
  norm_backward_dense(norm, 0, count, c, dx);
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
