// Partial channels: what bypasses the mixed op, and the shuffle with K groups. Planar order: channel g C/K + i;
// shuffled: i K + g. Group 0 is the mixed op's.
template <class T>
RF_INLINE void unshuffle_pixel(const T* from, int64_t cm, int64_t K, T* to) {
  for (int64_t g = 0; g < K; g++)
    for (int64_t i = 0; i < cm; i++) to[g * cm + i] = from[i * K + g];
}
template <class T>
RF_INLINE void shuffle_pixel(const T* mixed, const T* from, int64_t cm, int64_t K, T* to) {
  for (int64_t i = 0; i < cm; i++) {
    to[i * K] = mixed[i];
    for (int64_t g = 1; g < K; g++) to[i * K + g] = from[g * cm + i];
  }
}
// f(K, C/K), constants where they are common
template <class F>
RF_INLINE void with_groups(int64_t K, int64_t cm, F&& f) {
  using k4 = std::integral_constant<int64_t, 4>;
  if (K == 4 && cm == 4) return f(k4{}, std::integral_constant<int64_t, 4>{});
  if (K == 4 && cm == 8) return f(k4{}, std::integral_constant<int64_t, 8>{});
  if (K == 4 && cm == 16) return f(k4{}, std::integral_constant<int64_t, 16>{});
  f(K, cm);
}

template <class T>
void unshuffle(View<T> x, int64_t h, int64_t w, int64_t c, int64_t K, T* planar, T* mixed) {
  with_groups(K, c / K, [&](auto groups, auto cm) {
    for (int64_t r = 0; r < h; r++)
      for (int64_t q = 0; q < w; q++) {
        T* to = planar + (r * w + q) * c;
        unshuffle_pixel<T>(x.data + r * x.row + q * x.pixel, cm, groups, to);
        for (int64_t i = 0; i < cm; i++) mixed[(r * w + q) * cm + i] = to[i];
      }
  });
}

template <class T>
void shuffle(const T* mixed, const T* planar, int64_t pixels, int64_t c, int64_t K, T* out) {
  with_groups(K, c / K, [&](auto groups, auto cm) {
    for (int64_t p = 0; p < pixels; p++) shuffle_pixel<T>(mixed + p * cm, planar + p * c, cm, groups, out + p * c);
  });
}

// dst [pixels][C] = [mixed | planar bypass] + outer, outer strided or null
template <class T>
void join(const T* mixed, const T* planar, View<T> outer, int64_t h, int64_t w, int64_t c, int64_t cm, T* dst) {
  with_lanes<T>(cm, [&](auto lanes) __attribute__((always_inline)) {
    for (int64_t r = 0; r < h; r++)
      for (int64_t q = 0; q < w; q++) {
        int64_t p = r * w + q;
        T* to = dst + p * c;
        const T* add = outer.data ? outer.data + r * outer.row + q * outer.pixel : nullptr;
        auto put = [&](const T* from, int64_t k) __attribute__((always_inline)) {
          auto v = load<lanes>(from);
          store<lanes>(to + k, add ? v + load<lanes>(add + k) : v);
        };
        for (int64_t k = 0; k < cm; k += lanes) put(mixed + p * cm + k, k);
        for (int64_t k = cm; k < c; k += lanes) put(planar + p * c + k, k);
      }
  });
}

// 2x2 max pool with stride 2
template <class T>
void half_pool_forward(View<T> x, int64_t h, int64_t w, int64_t c, T* out) {
  with_lanes<T>(c, [&](auto lanes) __attribute__((always_inline)) {
    constexpr int L = lanes;
    for (int64_t r = 0; r < h / 2; r++)
      for (int64_t q = 0; q < w / 2; q++) {
        const T* in = x.data + 2 * r * x.row + 2 * q * x.pixel;
        for (int64_t k = 0; k < c; k += L) {
          Vec<T, L> top = max_vec<T, L>(load<L>(in + k), load<L>(in + x.pixel + k));
          Vec<T, L> low = max_vec<T, L>(load<L>(in + x.row + k), load<L>(in + x.row + x.pixel + k));
          store<L>(out + (r * (w / 2) + q) * c + k, max_vec<T, L>(top, low));
        }
      }
  });
}

// dx [h][w][C] gets d where x is its window's first maximum, 0 elsewhere
template <class T>
void half_pool_backward(View<T> x, const T* d, int64_t h, int64_t w, int64_t c, T* dx) {
  with_lanes<T>(c, [&](auto lanes) __attribute__((always_inline)) {
    constexpr int L = lanes;
    for (int64_t r = 0; r < h / 2; r++)
      for (int64_t q = 0; q < w / 2; q++)
        for (int64_t k = 0; k < c; k += L) {
          const T* in = x.data + 2 * r * x.row + 2 * q * x.pixel + k;
          T* to = dx + (2 * r * w + 2 * q) * c + k;
          Vec<T, L> v[4] = {load<L>(in), load<L>(in + x.pixel), load<L>(in + x.row), load<L>(in + x.row + x.pixel)};
          Vec<T, L> top = max_vec<T, L>(max_vec<T, L>(v[0], v[1]), max_vec<T, L>(v[2], v[3]));
          Vec<T, L> left = load<L>(d + (r * (w / 2) + q) * c + k);
          unroll<4>(RF_LAMBDA(i) {
            auto miss = v[i] < top;
            store<L>(to + (i / 2 * w + i % 2) * c, miss ? Vec<T, L>{} : left);
            left = miss ? left : Vec<T, L>{};
          });
        }
  });
}

// rest += dx where x > 0
template <class T>
void relu_backward_add(const T* dx, const T* x, T* rest, int64_t size, int64_t c) {
  sweep<T>(size, repeated<T>(c), [&](auto lanes, int64_t i, int64_t) __attribute__((always_inline)) {
    constexpr int L = lanes;
    Vec<T, L> d = load<L>(x + i) <= 0 ? Vec<T, L>{} : load<L>(dx + i);
    store<L>(rest + i, load<L>(rest + i) + d);
  });
}
// d /= size of its window in a 3x3 average pool
template <class T>
void divide_by_window(T* d, int64_t h, int64_t w, int64_t c, int stride) {
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
