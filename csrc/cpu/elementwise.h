// Passes over dense images whose coefficients depend on the channel alone. Coefficient arrays hold `period`
// values: C, or C repeated to fill a vector where C divides one, so that small C costs nothing.
template <class T>
int64_t period_of(int64_t c) {
  return c < kLanes<T> && kLanes<T> % c == 0 ? kLanes<T> : c;
}

// f(lanes, element, coefficient)
template <class T, class F>
RF_INLINE void sweep(int64_t count, int64_t period, F&& f) {
  with_lanes<T>(period, [&](auto lanes) __attribute__((always_inline)) {
    int64_t i = 0;
    for (; i + period <= count; i += period)
      for (int64_t k = 0; k < period; k += lanes) f(lanes, i + k, k);
    for (; i < count; i++) f(std::integral_constant<int, 1>{}, i, i % period);
  });
}

// f(lanes, coefficient) gives what each(element) does with a vector: coefficients are loaded once, for channels are the
// outer loop
template <class T, class F>
RF_INLINE void sweep_channels(int64_t count, int64_t period, F&& f) {
  int64_t whole = count / period * period;
  with_lanes<T>(period, [&](auto lanes) __attribute__((always_inline)) {
    for (int64_t k = 0; k < period; k += lanes) {
      auto each = f(lanes, k);
      for (int64_t i = k; i < whole; i += period) each(i);
    }
  });
  for (int64_t i = whole; i < count; i++) f(std::integral_constant<int, 1>{}, i - whole)(i);
}

// out[o][k] = sum over elements of what f(lanes, element, coefficient, acc) adds to acc[o]
template <class T, int Outs, class F>
RF_INLINE void reduce_sweep(int64_t count, int64_t period, T* out, F&& f) {
  with_lanes<T>(period, [&](auto lanes) __attribute__((always_inline)) {
    constexpr int L = lanes;
    int64_t pixels = count / period;
    auto group = [&](auto blocks, int64_t k) __attribute__((always_inline)) {
      constexpr int B = blocks, U = 4 / B;
      Vec<T, L> acc[U * B][Outs];
      unroll<U * B>(RF_LAMBDA(i) { unroll<Outs>(RF_LAMBDA(o) { acc[i][o] = Vec<T, L>{}; }); });
      int64_t p = 0;
      for (; p + U <= pixels; p += U)
        unroll<U * B>(RF_LAMBDA(i) {
          f(lanes, (p + i / B) * period + k + i % B * L, k + i % B * L, acc[i]);
        });
      for (; p < pixels; p++)
        unroll<B>(RF_LAMBDA(i) { f(lanes, p * period + k + i * L, k + i * L, acc[i]); });
      unroll<B>(RF_LAMBDA(b) {
        unroll<Outs>(RF_LAMBDA(o) {
          unroll<U - 1>(RF_LAMBDA(u) { acc[b][o] += acc[(u + 1) * B + b][o]; });
          store<L>(out + o * period + k + b * L, acc[b][o]);
        });
      });
    };
    int64_t k = 0;
    for (; k + 4 * L <= period; k += 4 * L) group(std::integral_constant<int, 4>{}, k);
    for (; k + 2 * L <= period; k += 2 * L) group(std::integral_constant<int, 2>{}, k);
    for (; k < period; k += L) group(std::integral_constant<int, 1>{}, k);
    for (int64_t i = pixels * period; i < count; i++) {
      Vec<T, 1> acc[Outs];
      unroll<Outs>(RF_LAMBDA(o) { acc[o] = Vec<T, 1>{}; });
      f(std::integral_constant<int, 1>{}, i, i % period, acc);
      unroll<Outs>(RF_LAMBDA(o) { out[o * period + i % period] += acc[o][0]; });
    }
  });
}

template <class T>
RF_INLINE void fold(const T* lanes, int64_t period, int64_t c, double* out) {
  for (int64_t k = 0; k < period; k += c)
    for (int64_t i = 0; i < c; i++) out[i] += lanes[k + i];
}

// floats add up to this many elements before they go to doubles; a whole number of periods
inline int64_t chunk_size(int64_t period) { return most<int64_t>(1, 2048 / period) * period; }

// what N streams are multiplied with, and what is taken off them before
template <class T, int L, int N>
struct Streams {
  Vec<T, L> scale[N], mean[N];
};

template <class T, class Src>
void sum_streams(T* dst, bool first, int n, const Src* const* src, const T* scale, const T* mean, const T* shift,
                 int64_t count, int64_t period) {
  int64_t chunk = chunk_size(period);
  for (int64_t at = 0; at < count; at += chunk) {
    int64_t len = least(chunk, count - at);
    T* to = dst + at;
    if (first)
      sweep<T>(len, period, [&](auto lanes, int64_t i, int64_t k) __attribute__((always_inline)) {
        store<lanes>(to + i, shift ? load<lanes>(shift + k) : Vec<T, lanes>{});
      });
    auto add = [&](auto streams, int k0) __attribute__((always_inline)) {
      constexpr int N = streams;
      const Src* from[N];
      unroll<N>(RF_LAMBDA(j) { from[j] = src[k0 + j] + at; });
      sweep_channels<T>(len, period, [&](auto lanes, int64_t k) __attribute__((always_inline)) {
        constexpr int L = lanes;
        Streams<T, L, N> stream;
        unroll<N>(RF_LAMBDA(j) {
          stream.scale[j] = load<L>(scale + (k0 + j) * period + k);
          stream.mean[j] = load<L>(mean + (k0 + j) * period + k);
        });
        return [=, &from](int64_t i) __attribute__((always_inline)) {
          auto acc = load<L>(to + i);
          unroll<N>(RF_LAMBDA(j) { acc += stream.scale[j] * (load<L>(from[j] + i) - stream.mean[j]); });
          store<L>(to + i, acc);
        };
      });
    };
    int j = 0;
    for (; j + 4 <= n; j += 4) add(std::integral_constant<int, 4>{}, j);
    for (; j + 2 <= n; j += 2) add(std::integral_constant<int, 2>{}, j);
    for (; j < n; j++) add(std::integral_constant<int, 1>{}, j);
  }
}

template <class T, class Src>
void dot_streams(const T* g, int n, const Src* const* src, const T* mean, double* out, double* g_sum, int64_t count,
                 int64_t c, T* scratch) {
  int64_t period = period_of<T>(c), chunk = chunk_size(period);
  for (int64_t at = 0; at < count; at += chunk) {
    int64_t len = least(chunk, count - at);
    if (g_sum) {
      reduce_sweep<T, 1>(len, period, scratch,
                         [&](auto lanes, int64_t i, int64_t, auto* acc) __attribute__((always_inline)) {
                           acc[0] += load<lanes>(g + at + i);
                         });
      fold(scratch, period, c, g_sum);
    }
    for (int j = 0; j < n; j++) {
      const Src* from = src[j] + at;
      const T* center = mean + j * period;
      reduce_sweep<T, 1>(len, period, scratch,
                         [&](auto lanes, int64_t i, int64_t k, auto* acc) __attribute__((always_inline)) {
                           acc[0] += load<lanes>(g + at + i) * (load<lanes>(from + i) - load<lanes>(center + k));
                         });
      fold(scratch, period, c, out + j * c);
    }
  }
}

template <class T, class S>
void relu_backward_inner(const T* dx, const S* y, const T* scale, const T* shift, const T* mean, S* du, double* sum,
                         double* dot, int64_t count, int64_t c, T* scratch) {
  int64_t period = period_of<T>(c), chunk = chunk_size(period);
  for (int64_t at = 0; at < count; at += chunk) {
    reduce_sweep<T, 2>(least(chunk, count - at), period, scratch,
                       [&](auto lanes, int64_t i, int64_t k, auto* acc) __attribute__((always_inline)) {
                         constexpr int L = lanes;
                         Vec<T, L> value = load<L>(y + at + i);
                         Vec<T, L> u = load<L>(scale + k) * value + load<L>(shift + k);
                         Vec<T, L> d = u <= 0 ? Vec<T, L>{} : load<L>(dx + at + i);
                         store<L>(du + at + i, d);
                         acc[0] += d;
                         acc[1] += d * (value - load<L>(mean + k));
                       });
    fold(scratch, period, c, sum);
    fold(scratch + period, period, c, dot);
  }
}

template <class T>
void relu_backward_add(const T* dx, const T* x, T* sum, int64_t count, int64_t c) {
  sweep<T>(count, period_of<T>(c), [&](auto lanes, int64_t i, int64_t) __attribute__((always_inline)) {
    constexpr int L = lanes;
    Vec<T, L> d = load<L>(x + i) <= 0 ? Vec<T, L>{} : load<L>(dx + i);
    store<L>(sum + i, load<L>(sum + i) + d);
  });
}

// mean and sum of squared deviations from sums about a shift
template <class T>
void finish_moments(const T* shift, int64_t pixels, int64_t c, double* mean, double* deviation) {
  for (int64_t i = 0; i < c; i++) {
    double m = mean[i] / pixels;
    deviation[i] -= m * mean[i];
    mean[i] = shift[i] + m;
  }
}

template <class T>
void add_moments(const T* y, int64_t pixels, int64_t c, bool first, T* shift, double* mean, double* deviation,
                 T* scratch) {
  int64_t period = period_of<T>(c), chunk = chunk_size(period), count = pixels * c;
  if (first) {
    // about a few pixels' mean: one alone, or a border, may lie far from the others, and the squares would cancel
    int64_t few = least<int64_t>(pixels, 8);
    for (int64_t k = 0; k < period; k++) {
      shift[k] = 0;
      for (int64_t j = 0; j < few; j++) shift[k] += y[(2 * j + 1) * pixels / (2 * few) * c + k % c] / few;
    }
    fill(mean, c, 0.0);
    fill(deviation, c, 0.0);
  }
  for (int64_t at = 0; at < count; at += chunk) {
    reduce_sweep<T, 2>(least(chunk, count - at), period, scratch,
                       [&](auto lanes, int64_t i, int64_t k, auto* acc) __attribute__((always_inline)) {
                         auto off = load<lanes>(y + at + i) - load<lanes>(shift + k);
                         acc[0] += off;
                         acc[1] += off * off;
                       });
    fold(scratch, period, c, mean);
    fold(scratch + period, period, c, deviation);
  }
}
