// Whole images: the frozen convolutions of one branch, forward and backward.
template <class T>
RF_INLINE int64_t strip_rows(int64_t rows, int64_t row_size) {
  // the depthwise result of a strip stays in the first-level cache until the 1x1 convolution reads it
  return least(most<int64_t>(int64_t(12288 / sizeof(T)) / row_size, 1), rows);
}

template <class T>
void frame_relu(ImageView<T> x, int64_t h, int64_t w, int64_t c, Frame f, T* dst) {
  for (int64_t r = 0; r < h; r++) {
    const T* in = x.data + r * x.row;
    T* out = dst + f.origin + r * f.pitch;
    if (x.pixel == c)
      sweep<T>(w * c, repeated<T>(c), [&](auto lanes, int64_t i, int64_t) __attribute__((always_inline)) {
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
void frame_affine_relu(const S* y, const T* scale, const T* shift, int64_t h, int64_t w, int64_t c, Frame f,
                       T* dst) {
  for (int64_t r = 0; r < h; r++) {
    const S* in = y + r * w * c;
    T* out = dst + f.origin + r * f.pitch;
    sweep_channels<T>(w * c, repeated<T>(c), [&](auto lanes, int64_t k) __attribute__((always_inline)) {
      constexpr int L = lanes;
      auto a = load<L>(scale + k), b = load<L>(shift + k);
      return [=](int64_t i) __attribute__((always_inline)) {
        store<L>(out + i, relu_vec<T, L>(a * load<L>(in + i) + b));
      };
    });
  }
}

template <class T>
void pack(ImageView<T> x, int64_t h, int64_t w, int64_t c, T* dense) {
  for (int64_t r = 0; r < h; r++)
    with_lanes<T>(c, [&](auto lanes) __attribute__((always_inline)) {
      for (int64_t q = 0; q < w; q++)
        for (int64_t k = 0; k < c; k += lanes)
          store<lanes>(dense + (r * w + q) * c + k, load<lanes>(x.data + r * x.row + q * x.pixel + k));
    });
}

// Dense rows through the 1x1 convolution, kept, with their moments. ci may differ from the c outputs.
template <class T, class S, int L>
struct KeptRows {
  int64_t ci, c;
  const T* pw;
  S* y;
  bool bypass_cache;
  double *mean, *deviation;
  T *shift, *sum, *square, *few;
  Ahead& ahead;

  KeptRows(int64_t ci, int64_t c, const T* pw, S* y, bool bypass_cache, double* mean, double* deviation, T* scratch,
           Ahead& ahead)
      : ci(ci), c(c), pw(pw), y(y), bypass_cache(bypass_cache), mean(mean), deviation(deviation), shift(scratch),
        sum(scratch + c), square(scratch + 2 * c), few(scratch + 3 * c), ahead(ahead) {}
  // Moments are taken about the mean of a few pixels: no cancellation where the mean is far from zero. Not all of
  // them lie at a border, which differs. The 1x1 convolution of their mean is the mean of theirs.
  void begin(const T* d, int64_t pixels) {
    int64_t count = least<int64_t>(pixels, 16);
    T part = T(1) / count;
    fill(few, ci, T(0));
    with_lanes<T>(ci, [&](auto lanes) __attribute__((always_inline)) {
      for (int64_t j = 0; j < count; j++) {
        const T* from = d + (2 * j + 1) * pixels / (2 * count) * ci;
        for (int64_t k = 0; k < ci; k += lanes)
          store<lanes>(few + k, load<lanes>(few + k) + load<lanes>(from + k) * part);
      }
    });
    pointwise<T, L>(few, 1, ci, pw, c, shift, ahead);
    fill(mean, c, 0.0);
    fill(deviation, c, 0.0);
  }
  void strip(const T* d, int64_t first, int64_t pixels) {
    if (first == 0) begin(d, pixels);
    for_column_groups<L>(c, [&](auto blocks, int64_t o) {
      constexpr int P = kTilePixels<blocks>;
      auto run = [&](auto kernel) {
        kernel(d, pixels, ci, pw + o, c, y + first * c + o, shift + o, sum + o, square + o, ahead);
      };
      if (bypass_cache)
        run(pointwise_moments<T, S, L, P, blocks, true>);
      else
        run(pointwise_moments<T, S, L, P, blocks, false>);
    });
    for (int64_t i = 0; i < c; i++) {
      mean[i] += sum[i];
      deviation[i] += square[i];
    }
  }
};

template <class T, class S, int L>
void conv_forward_wide(const T* x, Frame f, int64_t h, int64_t w, int64_t c, Conv conv, const T* dw, const T* pw,
                       S* y, bool bypass_cache, double* mean, double* deviation, T* scratch, Ahead& ahead) {
  int64_t oh = pooled(h, conv.stride), ow = pooled(w, conv.stride), rows = strip_rows<T>(oh, ow * c);
  auto depthwise = depthwise_row_for<T, L, Pass::Forward>(conv);
  T* d = scratch + 4 * round_up(c, kLanes<T>);
  KeptRows<T, S, L> kept(c, c, pw, y, bypass_cache && L == kLanes<T>, mean, deviation, scratch, ahead);
  for (int64_t r0 = 0; r0 < oh; r0 += rows) {
    int64_t n = least(rows, oh - r0);
    for (int64_t r = 0; r < n; r++)
      depthwise(x + f.origin, f.pitch, dw, c, r0 + r, h, ow, false, d + r * ow * c, ahead);
    kept.strip(d, r0 * ow, n * ow);
  }
  finish_moments(kept.shift, oh * ow, c, mean, deviation);
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
void conv_forward_flat(const T* x, Frame f, int64_t h, int64_t w, const T* dw, const T* pw, S* y, bool bypass_cache,
                       double* mean, double* deviation, Ahead& ahead) {
  constexpr int L = kLanes<T>;
  int64_t row = w * C;
  alignas(64) T shift[L], sums[2 * L];
  fill(mean, C, 0.0);
  fill(deviation, C, 0.0);
  for (int64_t r0 = 0; r0 < h; r0 += kBlock) {
    Vec<T, L> s = Vec<T, L>{}, q = s, about = s;
    if (r0) about = load<L>(shift);
    for (int64_t i = 0; i < row; i += L) {
      Vec<T, L> acc[kBlock];
      unroll<kBlock>(RF_LAMBDA(o) { acc[o] = Vec<T, L>{}; });
      depthwise_flat_block<T, K, D, false>(x + f.origin + r0 * f.pitch + i, f.pitch, dw, C, acc, ahead);
      fetch<L>(ahead, kBlock * C);
      Vec<T, L> weights[C];
      unroll<C>(RF_LAMBDA(j) { weights[j] = load<L>(pw + j * L); });
      if (r0 == 0 && i == 0) {
        // the mean of the pixels at hand, as in KeptRows
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
      S* to = y + r0 * row + i;
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
    fold(sums, L, C, mean);
    fold(sums + L, L, C, deviation);
  }
  finish_moments(shift, h * w, C, mean, deviation);
}

template <class F>
RF_INLINE void with_kernel(Conv conv, F&& f) {
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
void conv_forward(const T* x, Frame f, int64_t h, int64_t w, int64_t c, Conv conv, const T* dw, const T* pw, S* y,
                  bool bypass_cache, double* mean, double* deviation, T* scratch, Ahead& ahead) {
  if (is_flat<T>(c, conv.stride))
    return with_flat_channels<T>(c, [&](auto channels) {
      with_kernel(conv, [&](auto k, auto d) {
        conv_forward_flat<T, S, channels, k, d>(x, f, h, w, dw, pw, y, bypass_cache && w * c % kLanes<T> == 0, mean,
                                                deviation, ahead);
      });
    });
  with_lanes<T>(c, [&](auto lanes) {
    conv_forward_wide<T, S, lanes>(x, f, h, w, c, conv, dw, pw, y, bypass_cache, mean, deviation, scratch,
                                   ahead);
  });
}

template <class T, class S>
void reduce_forward(const T* x, Frame f, int64_t h, int64_t w, int64_t c, const T* pw, S* y, double* mean,
                    double* deviation, T* scratch, Ahead& ahead) {
  with_lanes<T>(c, [&](auto lanes) {
    constexpr int L = lanes;
    T* d = scratch + 3 * round_up(c, kLanes<T>) + round_up(2 * c, kLanes<T>);
    KeptRows<T, S, L> kept(2 * c, c, pw, y, false, mean, deviation, scratch, ahead);
    for (int64_t r = 0; r < h / 2; r++) {
      const T *even = x + f.origin + 2 * r * f.pitch, *odd = even + f.pitch + c;
      for (int64_t q = 0; q < w / 2; q++) {
        copy(even + 2 * q * c, c, d + 2 * q * c);
        copy(odd + 2 * q * c, c, d + (2 * q + 1) * c);
      }
      kept.strip(d, r * (w / 2), w / 2);
    }
    finish_moments(kept.shift, h / 2 * (w / 2), c, mean, deviation);
  });
}
