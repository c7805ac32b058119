// 3x3 pools with padding 1 of a dense image, windows clipped at the border (count_include_pad=False).
inline int64_t pooled(int64_t n, int stride) { return (n - 1) / stride + 1; }
inline int64_t window(int64_t center, int64_t n) { return 1 + (center > 0) + (center < n - 1); }

// A window with a NaN has a NaN sum, which maxima in one instruction each would lose. (So has one with both
// infinities; BatchNorm makes NaN of those anyway.)
template <class T, int L>
RF_INLINE Vec<T, L> keep_nan(Vec<T, L> max, Vec<T, L> sum) {
  return sum != sum ? sum : max;
}

// One row at stride 1 where C fills vectors: columns pass through registers.
template <class T>
RF_INLINE void pool_row(const T* up, const T* mid, const T* down, bool has_up, bool has_down, int64_t w, int64_t c,
                        T* max, T* avg) {
  constexpr int L = kLanes<T>;
  using V = Vec<T, L>;
  T tall = 1 + has_up + has_down;
  V inner = splat<L>(1 / (3 * tall)), outer = splat<L>(1 / (2 * tall));
  V upper = splat<L>(T(has_up)), lower = splat<L>(T(has_down));
  for (int64_t k = 0; k < c; k += L) {
    auto column = [&](int64_t q, V& top, V& sum) __attribute__((always_inline)) {
      V a = load<L>(up + q * c + k), b = load<L>(mid + q * c + k), d = load<L>(down + q * c + k);
      top = max_or_second<T, L>(max_or_second<T, L>(a, b), d);
      sum = a * upper + (d * lower + b);
    };
    V top[3], sum[3];
    column(0, top[1], sum[1]);
    top[0] = top[1], sum[0] = V{};
    for (int64_t q = 0; q < w; q++) {
      bool edge = q == 0 || q == w - 1;
      if (q < w - 1)
        column(q + 1, top[2], sum[2]);
      else
        top[2] = top[1], sum[2] = V{};
      V all = sum[0] + sum[1] + sum[2];
      V most = max_or_second<T, L>(max_or_second<T, L>(top[0], top[1]), top[2]);
      store<L>(max + q * c + k, keep_nan<T, L>(most, all));
      store<L>(avg + q * c + k, all * (edge ? outer : inner));
      top[0] = top[1], sum[0] = sum[1];
      top[1] = top[2], sum[1] = sum[2];
    }
  }
}

// The same where C divides a vector, which holds several columns; share: one over the sizes of the row's windows.
template <class T, int C>
RF_INLINE void pool_row_flat(const T* up, const T* mid, const T* down, bool has_up, bool has_down, int64_t row,
                             const T* share, T* max, T* avg) {
  constexpr int L = kLanes<T>;
  using V = Vec<T, L>;
  V upper = splat<L>(T(has_up)), lower = splat<L>(T(has_down));
  V nothing = splat<L>(-std::numeric_limits<T>::infinity());
  auto lanes = std::make_integer_sequence<int, L>{};
  V top[3] = {nothing, nothing, nothing}, sum[3] = {V{}, V{}, V{}};
  auto columns = [&](int64_t i, V& top, V& sum) __attribute__((always_inline)) {
    V a = load<L>(up + i), b = load<L>(mid + i), d = load<L>(down + i);
    top = max_or_second<T, L>(max_or_second<T, L>(a, b), d);
    sum = a * upper + (d * lower + b);
  };
  columns(0, top[1], sum[1]);
  for (int64_t i = 0; i < row; i += L) {
    if (i + L < row)
      columns(i + L, top[2], sum[2]);
    else
      top[2] = nothing, sum[2] = V{};
    V left = consecutive_lanes<L - C>(top[0], top[1], lanes), right = consecutive_lanes<C>(top[1], top[2], lanes);
    V all = consecutive_lanes<L - C>(sum[0], sum[1], lanes) + sum[1] + consecutive_lanes<C>(sum[1], sum[2], lanes);
    V most = max_or_second<T, L>(max_or_second<T, L>(left, top[1]), right);
    store<L>(max + i, keep_nan<T, L>(most, all));
    store<L>(avg + i, all * load<L>(share + i));
    top[0] = top[1], sum[0] = sum[1];
    top[1] = top[2], sum[1] = sum[2];
  }
}

template <class T>
void pool_forward(const T* x, int64_t h, int64_t w, int64_t c, int stride, int64_t first, int64_t rows, T* max, T* avg,
                  T* scratch) {
  int64_t ow = pooled(w, stride), row = w * c;
  // one row's maxima and sums over its three rows, with one pixel of border; one over the sizes of its windows
  T *tall_max = scratch + c, *tall_sum = tall_max + row + 2 * c, *share = tall_sum + row + c, shared = 0;
  constexpr T lowest = -std::numeric_limits<T>::infinity();
  for (int64_t i = 0; i < c; i++) {
    tall_max[i - c] = tall_max[row + i] = lowest;
    tall_sum[i - c] = tall_sum[row + i] = 0;
  }
  for (int64_t r = first; r < first + rows; r++) {
    int64_t y = r * stride;
    const T *mid = x + y * row, *up = y > 0 ? mid - row : mid, *down = y < h - 1 ? mid + row : mid;
    T *to_max = max + (r - first) * ow * c, *to_avg = avg + (r - first) * ow * c;
    bool has_up = y > 0, has_down = y < h - 1;
    if (stride == 1 && c % kLanes<T> == 0 && w > 1) {
      pool_row(up, mid, down, has_up, has_down, w, c, to_max, to_avg);
      continue;
    }
    T tall = window(y, h);
    if (stride == 1 && tall != shared) {
      shared = tall;
      fill(share, row, 1 / (tall * window(1, least<int64_t>(w, 3))));
      for (int64_t q : {int64_t(0), w - 1}) fill(share + q * c, c, 1 / (tall * window(q, w)));
    }
    if (is_flat<T>(c, stride) && row % kLanes<T> == 0) {
      with_flat_channels<T>(c, [&](auto channels) {
        pool_row_flat<T, channels>(up, mid, down, has_up, has_down, row, share, to_max, to_avg);
      });
      continue;
    }
    sweep<T>(row, repeated<T>(c), [&](auto lanes, int64_t i, int64_t) __attribute__((always_inline)) {
      constexpr int L = lanes;
      Vec<T, L> a = load<L>(up + i), b = load<L>(mid + i), d = load<L>(down + i);
      store<L>(tall_max + i, max_or_second<T, L>(max_or_second<T, L>(a, b), d));
      // a clamped row repeats the middle one, which must not count twice
      Vec<T, L> zero = Vec<T, L>{};
      store<L>(tall_sum + i, b + (has_up ? a : zero) + (has_down ? d : zero));
    });
    auto pixel = [&](auto lanes, int64_t at, int64_t i, auto scale) __attribute__((always_inline)) {
      constexpr int L = lanes;
      Vec<T, L> left = load<L>(tall_max + i - c), mid = load<L>(tall_max + i), right = load<L>(tall_max + i + c);
      Vec<T, L> sum = load<L>(tall_sum + i - c) + load<L>(tall_sum + i) + load<L>(tall_sum + i + c);
      Vec<T, L> most = max_or_second<T, L>(max_or_second<T, L>(left, mid), right);
      store<L>(to_max + at, keep_nan<T, L>(most, sum));
      store<L>(to_avg + at, sum * scale);
    };
    if (stride == 1) {
      sweep<T>(row, repeated<T>(c), [&](auto lanes, int64_t i, int64_t) __attribute__((always_inline)) {
        pixel(lanes, i, i, load<lanes>(share + i));
      });
      continue;
    }
    T inner = 1 / (3 * tall);
    with_lanes<T>(c, [&](auto lanes) __attribute__((always_inline)) {
      for (int64_t q = 0; q < ow; q++)
        for (int64_t k = 0; k < c; k += lanes) pixel(lanes, q * c + k, q * stride * c + k, inner);
    });
    for (int64_t q : {int64_t(0), ow - 1}) {
      T scale = 1 / (tall * window(q * stride, w));
      for (int64_t k = 0; k < c; k++)
        pixel(std::integral_constant<int, 1>{}, q * c + k, q * stride * c + k, scale);
    }
  }
}

// The first maximum in row-major order takes its window's gradient, as in torch: of the first row that has it, the
// first column. So a window's gradient goes to the maximum of three in one of its rows, and from there to a pixel.
template <class T>
struct PoolRows {
  int64_t c, row, step;
  T *x, *top, *d_top;
  static constexpr T lowest = -std::numeric_limits<T>::infinity();

  PoolRows(int64_t w, int64_t c, T* scratch) : c(c), row(w * c), step(w * c + 4 * c + kLanes<T>) {
    x = scratch + 2 * c, top = x + 3 * step, d_top = top + 3 * step;
    fill(scratch, 9 * step, T(0));
    for (int64_t y = 0; y < 3; y++) {
      fill(x + y * step - 2 * c, 2 * c, lowest);
      fill(x + y * step + row, c, lowest);
    }
  }
  int64_t at(int64_t y) const { return y % 3 * step; }
  template <class F>
  RF_INLINE void each(F&& f) {
    sweep<T>(row, repeated<T>(c), f);
  }

  void begin(const T* from, int64_t y) {
    T *to = x + at(y), *most = top + at(y), *d = d_top + at(y);
    each([&](auto lanes, int64_t i, int64_t) __attribute__((always_inline)) {
      store<lanes>(to + i, load<lanes>(from + i));
      store<lanes>(d + i, Vec<T, lanes>{});
    });
    each([&](auto lanes, int64_t i, int64_t) __attribute__((always_inline)) {
      constexpr int L = lanes;
      Vec<T, L> left = load<L>(to + i - c), mid = load<L>(to + i), right = load<L>(to + i + c);
      store<L>(most + i, max_or_second<T, L>(max_or_second<T, L>(left, mid), right));
    });
  }
  // the windows around row y; has_up, has_down: whether they have all three rows
  void windows(const T* d_max, int64_t y, bool has_up, bool has_down) {
    int64_t above = at(y + 2), here = at(y), below = at(y + 1);
    each([&](auto lanes, int64_t i, int64_t) __attribute__((always_inline)) {
      constexpr int L = lanes;
      Vec<T, L> none = Vec<T, L>{}, least = none + lowest, d = load<L>(d_max + i), mid = load<L>(top + here + i);
      Vec<T, L> up = has_up ? load<L>(top + above + i) : least, down = has_down ? load<L>(top + below + i) : least;
      Vec<T, L> most = max_or_second<T, L>(max_or_second<T, L>(up, mid), down);
      // what no row claims goes to the last, so that no gradient is lost
      Vec<T, L> rest = d;
      if (has_up) {
        auto miss = up < most;
        store<L>(d_top + above + i, load<L>(d_top + above + i) + (miss ? none : rest));
        rest = miss ? rest : none;
      }
      if (has_down) {
        auto miss = mid < most;
        store<L>(d_top + below + i, load<L>(d_top + below + i) + (miss ? rest : none));
        rest = miss ? none : rest;
      }
      store<L>(d_top + here + i, load<L>(d_top + here + i) + rest);
    });
  }
  void end(int64_t y, T* dx) {
    const T *from = x + at(y), *most = top + at(y), *d = d_top + at(y);
    each([&](auto lanes, int64_t i, int64_t) __attribute__((always_inline)) {
      constexpr int L = lanes;
      Vec<T, L> none = Vec<T, L>{}, here = load<L>(from + i), left = load<L>(from + i - c);
      Vec<T, L> before = load<L>(most + i - c), mid = load<L>(most + i), after = load<L>(most + i + c);
      Vec<T, L> sum = load<L>(dx + i);
      sum += here < after ? none : load<L>(d + i + c);
      sum += ((left < mid) & ~(here < mid)) ? load<L>(d + i) : none;
      sum += ((load<L>(from + i - 2 * c) < before) & (left < before)) ? load<L>(d + i - c) : none;
      store<L>(dx + i, sum);
    });
  }
};

template <class T>
void pool_backward_dense(const T* x, const T* d_max, const T* d_avg, int64_t h, int64_t w, int64_t c, T* dx,
                         T* scratch) {
  PoolRows<T> rows(w, c, scratch);
  int64_t row = w * c;
  // sums of three rows of d_avg, with one pixel of border
  T* tall = rows.d_top + 3 * rows.step;
  fill(tall - c, row + 2 * c, T(0));
  rows.begin(x, 0);
  for (int64_t y = 0; y <= h; y++) {
    if (y + 1 < h) rows.begin(x + (y + 1) * row, y + 1);
    if (y < h) rows.windows(d_max + y * row, y, y > 0, y + 1 < h);
    if (y == 0) continue;
    T* to = dx + (y - 1) * row;
    rows.end(y - 1, to);
    const T* d = d_avg + (y - 1) * row;
    bool has_up = y > 1, has_down = y < h;
    rows.each([&](auto lanes, int64_t i, int64_t) __attribute__((always_inline)) {
      constexpr int L = lanes;
      Vec<T, L> sum = load<L>(d + i);
      if (has_up) sum += load<L>(d + i - row);
      if (has_down) sum += load<L>(d + i + row);
      store<L>(tall + i, sum);
    });
    rows.each([&](auto lanes, int64_t i, int64_t) __attribute__((always_inline)) {
      constexpr int L = lanes;
      store<L>(to + i, load<L>(to + i) + (load<L>(tall + i - c) + load<L>(tall + i) + load<L>(tall + i + c)));
    });
  }
}

template <class T>
void pool_backward(const T* x, const T* d_max, const T* d_avg, int64_t h, int64_t w, int64_t c, int stride, T* dx,
                   T* scratch) {
  if (stride == 1) return pool_backward_dense(x, d_max, d_avg, h, w, c, dx, scratch);
  int64_t oh = pooled(h, stride), ow = pooled(w, stride);
  with_lanes<T>(c, [&](auto lanes) __attribute__((always_inline)) {
    constexpr int L = lanes;
    using Mask = decltype(Vec<T, L>{} < Vec<T, L>{});
    for (int64_t r = 0; r < oh; r++)
      for (int64_t q = 0; q < ow; q++) {
        int64_t y0 = most<int64_t>(r * stride - 1, 0), y1 = least<int64_t>(r * stride + 1, h - 1);
        int64_t x0 = most<int64_t>(q * stride - 1, 0), x1 = least<int64_t>(q * stride + 1, w - 1);
        for (int64_t k = 0; k < c; k += L) {
          int64_t o = (r * ow + q) * c + k;
          Vec<T, L> top = load<L>(x + (y0 * w + x0) * c + k), dm = load<L>(d_max + o), da = load<L>(d_avg + o);
          for (int64_t y = y0; y <= y1; y++)
            for (int64_t p = x0; p <= x1; p++) top = max_vec<T, L>(top, load<L>(x + (y * w + p) * c + k));
          Mask open = ~Mask{};
          for (int64_t y = y0; y <= y1; y++)
            for (int64_t p = x0; p <= x1; p++) {
              int64_t i = (y * w + p) * c + k;
              // true for a NaN maximum too, so that its gradient is not lost
              Mask hit = ~(load<L>(x + i) < top) & open;
              open &= ~hit;
              store<L>(dx + i, load<L>(dx + i) + da + (hit ? dm : Vec<T, L>{}));
            }
        }
      }
  });
}
