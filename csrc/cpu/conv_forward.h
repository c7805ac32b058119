// Whole images: the frozen convolutions of one branch.
template <class T>
RF_INLINE int64_t strip_rows(int64_t rows, int64_t row_size) {
  return least(most<int64_t>(int64_t(kStripBytes / sizeof(T)) / row_size, 1), rows);
}

template <class T>
void frame_relu(ImageView<T> x, Size size, Frame f, T* dst) {
  auto [h, w, c] = size;
  for (int64_t r = 0; r < h; r++) {
    const T* in = x.data + r * x.row;
    T* out = dst + f.origin + r * f.pitch;
    if (x.pixel == c)
      sweep<T>(w * c, period_of<T>(c), [&](auto lanes, int64_t i, int64_t) __attribute__((always_inline)) {
        store<lanes>(out + i, relu_vec<T, lanes>(load<lanes>(in + i)));
      });
    else
      with_lanes<T>(c, [&](auto lanes) __attribute__((always_inline)) {
        for (int64_t q = 0; q < w; q++)
          for (int64_t k = 0; k < c; k += lanes)
            store<lanes>(out + q * c + k, relu_vec<T, lanes>(load<lanes>(in + q * x.pixel + k)));
      });
  }
}

template <class T, class S>
void frame_affine_relu(const S* y, const T* scale, const T* shift, Size size, Frame f, T* dst) {
  auto [h, w, c] = size;
  for (int64_t r = 0; r < h; r++) {
    const S* in = y + r * w * c;
    T* out = dst + f.origin + r * f.pitch;
    sweep_channels<T>(w * c, period_of<T>(c), [&](auto lanes, int64_t k) __attribute__((always_inline)) {
      constexpr int L = lanes;
      auto a = load<L>(scale + k), b = load<L>(shift + k);
      return [=](int64_t i) __attribute__((always_inline)) {
        store<L>(out + i, relu_vec<T, L>(a * load<L>(in + i) + b));
      };
    });
  }
}

template <class T>
void pack(ImageView<T> x, Size size, T* dense) {
  auto [h, w, c] = size;
  for (int64_t r = 0; r < h; r++)
    with_lanes<T>(c, [&](auto lanes) __attribute__((always_inline)) {
      for (int64_t q = 0; q < w; q++)
        for (int64_t k = 0; k < c; k += lanes)
          store<lanes>(dense + (r * w + q) * c + k, load<lanes>(x.data + r * x.row + q * x.pixel + k));
    });
}

// Dense rows through the 1x1 convolution, stored one after the other or, where `keep` is not set, in the place of the
// row before, with their moments. ci may differ from the c outputs, and these may
// be some of co.
template <class T, class S, int L>
struct OutputRows {
  int64_t ci, c, co;
  const T* pw;
  ConvOutput<S> out;
  T *shift, *sum, *square, *few;
  Ahead& ahead;
  bool keep = true;

  OutputRows(int64_t ci, int64_t c, int64_t co, const T* pw, const ConvOutput<S>& out, T* scratch, Ahead& ahead)
      : ci(ci), c(c), co(co), pw(pw), out(out), shift(scratch), sum(scratch + c), square(scratch + 2 * c),
        few(scratch + 3 * c), ahead(ahead) {}
  // Moments are taken about the mean of a few pixels: no cancellation where the mean is far from zero. Not all of
  // them lie at a border, which differs. The 1x1 convolution of their mean is the mean of theirs.
  void begin(const Operand<T>* d, int64_t pixels) {
    int64_t count = least<int64_t>(pixels, 16);
    T part = T(1) / count;
    fill(few, ci, T(0));
    with_lanes<T>(ci, [&](auto lanes) __attribute__((always_inline)) {
      for (int64_t j = 0; j < count; j++) {
        const Operand<T>* from = d + (2 * j + 1) * pixels / (2 * count) * ci;
        for (int64_t k = 0; k < ci; k += lanes)
          store<lanes>(few + k, load<lanes>(few + k) + load<lanes>(from + k) * part);
      }
    });
    to_operands(few, ci, operands(few));
    pointwise<T, L>(operands(few), 1, ci, pw, c, co, shift, ahead);
    fill(out.mean, c, 0.0);
    fill(out.deviation, c, 0.0);
  }
  void strip(const Operand<T>* d, int64_t first, int64_t pixels) {
    if (first == 0) begin(d, pixels);
    for_column_groups<L>(c, [&](auto blocks, int64_t o) {
      constexpr int P = kTilePixels<blocks>;
      auto run = [&](auto kernel) {
        kernel(d, pixels, ci, pw + o, co, out.y + keep * first * co + o, shift + o, sum + o, square + o, ahead);
      };
      if (out.bypass_cache && L == kLanes<T>)
        run(pointwise_moments<T, S, L, P, blocks, true>);
      else
        run(pointwise_moments<T, S, L, P, blocks, false>);
    });
    for (int64_t i = 0; i < c; i++) {
      out.mean[i] += sum[i];
      out.deviation[i] += square[i];
    }
  }
  void finish(int64_t pixels) { finish_moments(shift, pixels, c, out.mean, out.deviation); }
};

template <class T, class S, int L>
void conv_forward_wide(const T* x, Frame f, Size size, const Conv<T>& conv, const ConvOutput<S>& out, T* scratch,
                       Ahead& ahead) {
  auto [h, w, c] = size;
  int64_t oh = pooled(h, conv.stride), ow = pooled(w, conv.stride), rows = strip_rows<T>(oh, ow * c);
  auto depthwise = depthwise_row_for<T, L, Pass::Forward>(conv);
  auto* d = operands(scratch + 4 * round_up(c, kLanes<T>));
  OutputRows<T, S, L> output(c, c, c, conv.pw, out, scratch, ahead);
  for (int64_t r0 = 0; r0 < oh; r0 += rows) {
    int64_t n = least(rows, oh - r0);
    for (int64_t r = 0; r < n; r++)
      depthwise(x + f.origin, f.pitch, conv.dw, c, r0 + r, h, ow, false, d + r * ow * c, ahead);
    output.strip(d, r0 * ow, n * ow);
  }
  output.finish(oh * ow);
}

// `count` < a vector's lanes at the end of a row
template <class T, class S>
RF_INLINE void store_some(S* p, Vec<T, kLanes<T>> v, int64_t count) {
  alignas(64) S lanes[kLanes<T>];
  store<kLanes<T>>(lanes, v);
  copy(lanes, count, p);
}
template <class T, class S>
RF_INLINE Vec<T, kLanes<T>> load_some(const S* p, int64_t count) {
  alignas(64) S lanes[kLanes<T>] = {};
  copy(p, count, lanes);
  return load<kLanes<T>>(lanes);
}

template <class T, class S, int C, int K, int D>
void conv_forward_flat(const T* x, Frame f, int64_t h, int64_t w, const Conv<T>& conv, const ConvOutput<S>& out,
                       Ahead& ahead) {
  constexpr int L = kLanes<T>;
  int64_t row = w * C;
  bool bypass_cache = out.bypass_cache && row % L == 0;
  alignas(64) T shift[L], sums[2 * L];
  fill(out.mean, C, 0.0);
  fill(out.deviation, C, 0.0);
  for (int64_t r0 = 0; r0 < h; r0 += kBlock) {
    Vec<T, L> s = Vec<T, L>{}, q = s, about = s;
    if (r0) about = load<L>(shift);
    for (int64_t i = 0; i < row; i += L) {
      Vec<T, L> acc[kBlock];
      unroll<kBlock>(RF_LAMBDA(o) { acc[o] = Vec<T, L>{}; });
      depthwise_flat_block<T, K, D, false>(x + f.origin + r0 * f.pitch + i, f.pitch, conv.dw, C, acc, ahead);
      fetch<L>(ahead, kBlock * C);
      Vec<T, L> weights[C];
      unroll<C / kDepth<T>>(RF_LAMBDA(j) { weights[j] = load<L>(conv.pw + j * L); });
      if (r0 == 0 && i == 0) {
        // the mean of the pixels at hand, as in OutputRows
        int64_t rows = least<int64_t>(kBlock, h), columns = least<int64_t>(L, row) / C;
        Vec<T, L> few = Vec<T, L>{};
        unroll<kBlock>(RF_LAMBDA(o) {
          if (o < rows) few += acc[o];
        });
        alignas(64) T sum[L];
        store<L>(sum, pointwise_flat<T, C>(few, weights));
        for (int l = 0; l < L; l++) {
          shift[l] = 0;
          for (int64_t q = 0; q < columns; q++) shift[l] += sum[q * C + l % C] / (rows * columns);
        }
        about = load<L>(shift);
      }
      int64_t rows = least<int64_t>(kBlock, h - r0), count = least<int64_t>(L, row - i);
      S* to = out.y + r0 * row + i;
      auto put = [&](Vec<T, L> d, int64_t at, bool some) __attribute__((always_inline)) {
        Vec<T, L> v = pointwise_flat<T, C>(d, weights), off = v - about;
        if (some) {
          store_some<T>(to + at, v, count);
          alignas(64) T lanes[L];
          store<L>(lanes, off);
          fill(lanes + count, L - count, T(0));
          off = load<L>(lanes);
        } else if (bypass_cache) {
          stream<L>(to + at, v);
        } else {
          store<L>(to + at, v);
        }
        s += off;
        q += off * off;
      };
      if (rows == kBlock && count == L)
        unroll<kBlock>(RF_LAMBDA(o) { put(acc[o], o * row, false); });
      else
        unroll<kBlock>(RF_LAMBDA(o) {
          if (o < rows) put(acc[o], o * row, count < L);
        });
    }
    store<L>(sums, s);
    store<L>(sums + L, q);
    fold(sums, L, C, out.mean);
    fold(sums + L, L, C, out.deviation);
  }
  finish_moments(shift, h * w, C, out.mean, out.deviation);
}

template <class T, class F>
RF_INLINE void with_kernel(const Conv<T>& conv, F&& f) {
  auto k3 = std::integral_constant<int, 3>{};
  auto k5 = std::integral_constant<int, 5>{};
  auto d1 = std::integral_constant<int, 1>{};
  auto d2 = std::integral_constant<int, 2>{};
  if (conv.kernel == 3)
    conv.dilation == 1 ? f(k3, d1) : f(k3, d2);
  else
    conv.dilation == 1 ? f(k5, d1) : f(k5, d2);
}

template <class T, class S>
void conv_forward(const T* x, Frame f, Size size, const Conv<T>& conv, const ConvOutput<S>& out, T* scratch,
                  Ahead& ahead) {
  if (is_flat<T>(size.c, conv.stride))
    return with_flat_channels<T>(size.c, [&](auto channels) {
      with_kernel(conv, [&](auto k, auto d) {
        conv_forward_flat<T, S, channels, k, d>(x, f, size.h, size.w, conv, out, ahead);
      });
    });
  with_lanes<T>(size.c,
                [&](auto lanes) { conv_forward_wide<T, S, lanes>(x, f, size, conv, out, scratch, ahead); });
}
