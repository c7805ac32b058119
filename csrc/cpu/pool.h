// 3x3 pools with padding 1 of a dense image, windows clipped at the border (count_include_pad=False).
inline int64_t pooled(int64_t n, int stride) { return (n - 1) / stride + 1; }
inline int64_t window(int64_t center, int64_t n) { return 1 + (center > 0) + (center < n - 1); }

// A window's maximum as torch takes it: NaN where there is one, which maxima in one instruction each would lose.
template <class T>
T window_max(const T* x, Size size, int64_t y, int64_t q, int64_t k) {
  T top = -std::numeric_limits<T>::infinity();
  for (int64_t r = most<int64_t>(y - 1, 0); r <= least<int64_t>(y + 1, size.h - 1); r++)
    for (int64_t p = most<int64_t>(q - 1, 0); p <= least<int64_t>(q + 1, size.w - 1); p++) {
      T value = x[(r * size.w + p) * size.c + k];
      if (value > top || value != value) top = value;
    }
  return top;
}
template <class T>
bool all_finite(const T* values, int64_t count) {
  Vec<T, kLanes<T>> rest{};
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) rest += load<kLanes<T>>(values + i) * T(0);
  T sum = 0;
  for (; i < count; i++) sum += values[i] * 0;
  for (int l = 0; l < kLanes<T>; l++) sum += rest[l];
  return sum == 0;
}

template <bool Inner, class V>
RF_INLINE V column_sum(V up, V mid, V down, bool has_up, bool has_down) {
  if constexpr (Inner) return up + (down + mid);
  return (has_up ? up : V{}) + ((has_down ? down : V{}) + mid);
}

// One row at stride 1 where C fills vectors: columns pass through registers.
template <class T, bool Inner>
RF_INLINE void pool_row(const T* up, const T* mid, const T* down, bool has_up, bool has_down, int64_t w, int64_t c,
                        T* max, T* avg) {
  constexpr int L = kLanes<T>;
  using V = Vec<T, L>;
  T tall = 1 + has_up + has_down;
  V inner = splat<L>(1 / (3 * tall)), outer = splat<L>(1 / (2 * tall));
  for (int64_t k = 0; k < c; k += L) {
    auto column = [&](int64_t q, V& top, V& sum) __attribute__((always_inline)) {
      V a = load<L>(up + q * c + k), b = load<L>(mid + q * c + k), d = load<L>(down + q * c + k);
      top = max_or_second<T, L>(max_or_second<T, L>(a, b), d);
      sum = column_sum<Inner>(a, b, d, has_up, has_down);
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
      store<L>(max + q * c + k, most);
      store<L>(avg + q * c + k, all * (edge ? outer : inner));
      top[0] = top[1], sum[0] = sum[1];
      top[1] = top[2], sum[1] = sum[2];
    }
  }
}

// The same where C divides a vector, which holds several columns; share: one over the sizes of the row's windows.
template <class T, int C, bool Inner>
RF_INLINE void pool_row_flat(const T* up, const T* mid, const T* down, bool has_up, bool has_down, int64_t row,
                             const T* share, T* max, T* avg) {
  constexpr int L = kLanes<T>;
  using V = Vec<T, L>;
  V nothing = splat<L>(-std::numeric_limits<T>::infinity());
  auto lanes = std::make_integer_sequence<int, L>{};
  V top[3] = {nothing, nothing, nothing}, sum[3] = {V{}, V{}, V{}};
  auto columns = [&](int64_t i, V& top, V& sum) __attribute__((always_inline)) {
    V a = load<L>(up + i), b = load<L>(mid + i), d = load<L>(down + i);
    top = max_or_second<T, L>(max_or_second<T, L>(a, b), d);
    sum = column_sum<Inner>(a, b, d, has_up, has_down);
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
    store<L>(max + i, most);
    store<L>(avg + i, all * load<L>(share + i));
    top[0] = top[1], sum[0] = sum[1];
    top[1] = top[2], sum[1] = sum[2];
  }
}

template <class T>
void pool_forward(const T* x, Size size, int stride, int64_t first, int64_t rows, T* max, T* avg, T* scratch) {
  auto [h, w, c] = size;
  int64_t ow = pooled(w, stride), row = w * c;
  // one row's maxima and sums over its three rows, with one pixel of border; one over the sizes of its windows
  T *tall_max = scratch + c, *tall_sum = tall_max + row + 2 * c, *share = tall_sum + row + c, shared = 0;
  constexpr T lowest = -std::numeric_limits<T>::infinity();
  for (int64_t i = 0; i < c; i++) {
    tall_max[i - c] = tall_max[row + i] = lowest;
    tall_sum[i - c] = tall_sum[row + i] = 0;
  }
  auto pool_both = [&](int64_t y, T* to_max, T* to_avg) {
    const T *mid = x + y * row, *up = y > 0 ? mid - row : mid, *down = y < h - 1 ? mid + row : mid;
    bool has_up = y > 0, has_down = y < h - 1;
    auto by_place = [&](auto&& run) { has_up && has_down ? run(std::true_type{}) : run(std::false_type{}); };
    if (stride == 1 && c % kLanes<T> == 0 && w > 1) {
      return by_place([&](auto inner) { pool_row<T, inner>(up, mid, down, has_up, has_down, w, c, to_max, to_avg); });
    }
    T tall = window(y, h);
    if (stride == 1 && tall != shared) {
      shared = tall;
      fill(share, row, 1 / (tall * window(1, least<int64_t>(w, 3))));
      for (int64_t q : {int64_t(0), w - 1}) fill(share + q * c, c, 1 / (tall * window(q, w)));
    }
    if (is_flat<T>(c, stride) && row % kLanes<T> == 0) {
      with_flat_channels<T>(c, [&](auto channels) {
        by_place([&](auto inner) {
          pool_row_flat<T, channels, inner>(up, mid, down, has_up, has_down, row, share, to_max, to_avg);
        });
      });
      return;
    }
    sweep<T>(row, period_of<T>(c), [&](auto lanes, int64_t i, int64_t) __attribute__((always_inline)) {
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
      store<L>(to_max + at, most);
      store<L>(to_avg + at, sum * scale);
    };
    if (stride == 1) {
      sweep<T>(row, period_of<T>(c), [&](auto lanes, int64_t i, int64_t) __attribute__((always_inline)) {
        pixel(lanes, i, i, load<lanes>(share + i));
      });
      return;
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
  };
  for (int64_t r = first; r < first + rows; r++) {
    T *to_max = max + (r - first) * ow * c, *to_avg = avg + (r - first) * ow * c;
    pool_both(r * stride, to_max, to_avg);
    // a window with a NaN, or an infinity, has such an average too
    if (all_finite(to_avg, ow * c)) continue;
    for (int64_t q = 0; q < ow; q++)
      for (int64_t k = 0; k < c; k++) to_max[q * c + k] = window_max(x, size, r * stride, q * stride, k);
  }
}

// Neighbours along a row of vectors. C: channels that divide a vector, or 0 where each pixel has one of its own.
template <class T, int L, int C>
struct Neighbours {
  using V = Vec<T, L>;
  static constexpr auto lanes = std::make_integer_sequence<int, L>{};
  static RF_INLINE V left(V before, V here) {
    if constexpr (C == 0)
      return before;
    else
      return consecutive_lanes<L - C>(before, here, lanes);
  }
  static RF_INLINE V right(V here, V after) {
    if constexpr (C == 0)
      return after;
    else
      return consecutive_lanes<C>(here, after, lanes);
  }
  static RF_INLINE V second_left(V second_before, V before, V here) {
    if constexpr (C == 0)
      return second_before;
    else
      return consecutive_lanes<L - 2 * C>(before, here, lanes);
  }
};

// Rows around the windows of row y. Missing ones are lowest for x and maxima, zero for gradients.
template <class T>
struct PoolRows {
  const T *above, *below;     // x at y - 1 and y + 1
  const T *up, *mid;          // maxima of three columns at y - 1 and y
  T* down;                    // and at y + 1, made here
  const T *d_max, *d_avg[3];  // d_max at y; d_avg at y - 2, y - 1 and y
  const T* d_up;              // gradients of the maxima, so far
  T *d_mid, *d_down;
  T* dx;  // at y - 1
  bool has_down;
};

// The first maximum in row-major order takes its window's gradient, as in torch: of the first row that has it, the
// first column. So a window's gradient goes to the maximum of three in one of its rows, and from there to a pixel. All
// pools are finite.
// Columns pass through registers. Here, Up: whether rows y and y - 1 exist; after the windows of row y nothing more
// reaches row y - 1.
template <class T, int L, int C, bool Here, bool Up>
__attribute__((noinline)) void pool_backward_row(const PoolRows<T>& rows, int64_t first, int64_t count, int64_t step) {
  using V = Vec<T, L>;
  using At = Neighbours<T, L, C>;
  V none = V{}, lowest = none - std::numeric_limits<T>::infinity();
  V below[3] = {lowest, load<L>(rows.below + first), lowest};
  V x[4] = {lowest, lowest, lowest, lowest};
  V top[3] = {none, none, none}, d[3] = {none, none, none}, avg[3] = {none, none, none};
  auto enter = [&](V next_x, V next_top, V next_d, V next_avg) __attribute__((always_inline)) {
    x[0] = x[1], x[1] = x[2], x[2] = x[3], x[3] = next_x;
    top[0] = top[1], top[1] = top[2], top[2] = next_top;
    d[0] = d[1], d[1] = d[2], d[2] = next_d;
    avg[0] = avg[1], avg[1] = avg[2], avg[2] = next_avg;
  };
  // the vector before the one that entered last
  auto leave = [&](T* dx) __attribute__((always_inline)) {
    V here = x[2], left = At::left(x[1], here), second = At::second_left(x[0], x[1], here);
    V before = At::left(top[0], top[1]), after = At::right(top[1], top[2]);
    V sum = load<L>(dx) + (At::left(avg[0], avg[1]) + avg[1] + At::right(avg[1], avg[2]));
    sum += here < after ? none : At::right(d[1], d[2]);
    sum += ((left < top[1]) & ~(here < top[1])) ? d[1] : none;
    sum += ((second < before) & (left < before)) ? At::left(d[0], d[1]) : none;
    store<L>(dx, sum);
  };
  for (int64_t j = 0; j < count; j++) {
    int64_t i = first + j * step;
    V up = lowest, d_up = none;
    if constexpr (Up) up = load<L>(rows.up + i), d_up = load<L>(rows.d_up + i);
    if constexpr (Here) {
      below[2] = j + 1 < count ? load<L>(rows.below + i + step) : lowest;
      V left = At::left(below[0], below[1]), right = At::right(below[1], below[2]);
      V down = max_or_second<T, L>(max_or_second<T, L>(left, below[1]), right), mid = load<L>(rows.mid + i);
      V most = max_or_second<T, L>(max_or_second<T, L>(up, mid), down);
      store<L>(rows.down + i, down);
      below[0] = below[1], below[1] = below[2];
      V rest = load<L>(rows.d_max + i), d_down = none;
      if constexpr (Up) {
        auto miss = up < most;
        d_up += miss ? none : rest;
        rest = miss ? rest : none;
      }
      if (rows.has_down) {
        auto miss = mid < most;
        d_down = miss ? rest : none;
        rest = miss ? none : rest;
      }
      store<L>(rows.d_mid + i, load<L>(rows.d_mid + i) + rest);
      store<L>(rows.d_down + i, d_down);
    }
    if constexpr (Up) {
      const auto& d_avg = rows.d_avg;
      enter(load<L>(rows.above + i), up, d_up, load<L>(d_avg[0] + i) + load<L>(d_avg[1] + i) + load<L>(d_avg[2] + i));
      if (j > 0) leave(rows.dx + i - step);
    }
  }
  if constexpr (Up) {
    enter(lowest, none, none, none);
    leave(rows.dx + first + (count - 1) * step);
  }
}

template <class T>
void pool_backward_dense(const T* x, const T* d_max, const T* d_avg, Size size, T* dx, T* scratch) {
  auto [h, w, c] = size;
  int64_t row = w * c, pitch = row + kPoolSkewBytes / sizeof(T);
  T *lowest = scratch, *zero = lowest + pitch, *top = zero + pitch, *d_top = top + 3 * pitch;
  fill(lowest, pitch, -std::numeric_limits<T>::infinity());
  fill(zero, 7 * pitch, T(0));
  // the first step makes row 0's maxima, the last ends the last row
  for (int64_t y = -1; y <= h; y++) {
    auto of = [&](const T* image, int64_t y, const T* missing) {
      return y >= 0 && y < h ? image + y * row : missing;
    };
    auto ring = [&](T* from, int64_t y) { return from + (y + 3) % 3 * pitch; };
    PoolRows<T> rows{of(x, y - 1, lowest),
                     of(x, y + 1, lowest),
                     ring(top, y - 1),
                     ring(top, y),
                     ring(top, y + 1),
                     of(d_max, y, zero),
                     {of(d_avg, y - 2, zero), of(d_avg, y - 1, zero), of(d_avg, y, zero)},
                     ring(d_top, y - 1),
                     ring(d_top, y),
                     ring(d_top, y + 1),
                     dx + (y - 1) * row,
                     y + 1 < h};
    auto run = [&](auto lanes, auto channels, int64_t first, int64_t count, int64_t step) {
      if (y == h)
        pool_backward_row<T, lanes, channels, false, true>(rows, first, count, step);
      else if (y > 0)
        pool_backward_row<T, lanes, channels, true, true>(rows, first, count, step);
      else
        pool_backward_row<T, lanes, channels, true, false>(rows, first, count, step);
    };
    auto full = std::integral_constant<int, kLanes<T>>{};
    if (is_flat<T>(c, 1) && row % full == 0)
      with_flat_channels<T>(c, [&](auto channels) { run(full, channels, 0, row / full, full); });
    else
      with_lanes<T>(c, [&](auto lanes) {
        for (int64_t k = 0; k < c; k += lanes) run(lanes, std::integral_constant<int, 0>{}, k, w, c);
      });
  }
}

// The last NaN of a window takes its gradient, else the first maximum, as in torch.
template <class T>
void pool_backward(const T* x, const T* d_max, const T* d_avg, Size size, int stride, bool finite, T* dx,
                   T* scratch) {
  if (stride == 1 && finite) return pool_backward_dense(x, d_max, d_avg, size, dx, scratch);
  auto [h, w, c] = size;
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
          Mask where = {};
          int place = 0;
          for (int64_t y = y0; y <= y1; y++)
            for (int64_t p = x0; p <= x1; p++) take_larger<T, L>(load<L>(x + (y * w + p) * c + k), place++, top, where);
          place = 0;
          for (int64_t y = y0; y <= y1; y++)
            for (int64_t p = x0; p <= x1; p++) {
              int64_t i = (y * w + p) * c + k;
              store<L>(dx + i, load<L>(dx + i) + da + (where == place++ ? dm : Vec<T, L>{}));
            }
        }
      }
  });
}

// d /= size of its window in a 3x3 average pool
template <class T>
void divide_by_window(T* d, Size size, int stride) {
  auto [h, w, c] = size;
  int64_t oh = pooled(h, stride), ow = pooled(w, stride);
  for (int64_t r = 0; r < oh; r++) {
    T tall = window(r * stride, h);
    T* row = d + r * ow * c;
    T inner = 1 / (3 * tall), edges[2] = {1 / (tall * window(0, w)), 1 / (tall * window((ow - 1) * stride, w))};
    for (int64_t i = 0; i < c; i++) row[i] *= edges[0];
    for (int64_t i = c; i < (ow - 1) * c; i++) row[i] *= inner;
    if (ow > 1)
      for (int64_t i = (ow - 1) * c; i < ow * c; i++) row[i] *= edges[1];
  }
}

// Sums over 3x3 windows at stride 1, zero around the image. Divided by the windows' sizes they are the average pool, of
// what was divided its transpose.
template <class T>
void window_sums(const T* x, Size size, bool average, bool add, T* dst) {
  auto [h, w, c] = size;
  int64_t row = w * c;
  with_lanes<T>(c, [&](auto lanes) {
    constexpr int L = lanes;
    using V = Vec<T, L>;
    for (int64_t r = 0; r < h; r++) {
      bool has_up = r > 0, has_down = r + 1 < h;
      T inner = average ? 1 / T(window(r, h) * 3) : 1, outer = average ? 1 / T(window(r, h) * window(0, w)) : 1;
      for (int64_t k = 0; k < c; k += L) {
        const T* mid = x + r * row + k;
        T* to = dst + r * row + k;
        auto column = [&](int64_t q) __attribute__((always_inline)) {
          V sum = load<L>(mid + q * c);
          if (has_up) sum += load<L>(mid - row + q * c);
          if (has_down) sum += load<L>(mid + row + q * c);
          return sum;
        };
        V left{}, here = column(0);
        for (int64_t q = 0; q < w; q++) {
          V right = q + 1 < w ? column(q + 1) : V{};
          V sum = (left + here + right) * (q == 0 || q == w - 1 ? outer : inner);
          store<L>(to + q * c, add ? load<L>(to + q * c) + sum : sum);
          left = here, here = right;
        }
      }
    }
  });
}
