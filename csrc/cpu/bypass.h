// Partial channels: what bypasses the mixed op, and the shuffle with K groups. Planar order: channel g C/K + i;
// shuffled: i K + g. Group 0 is the mixed op's.

// A vector of L shuffled channels is L / K consecutive ones of each group.
template <class T, int K>
constexpr bool kShuffles = K <= kLanes<T> && kLanes<T> % K == 0;

template <class T, int S, int K>
RF_INLINE auto concat(const Vec<T, S>* parts) {
  if constexpr (K == 1)
    return parts[0];
  else
    return consecutive_lanes<0>(concat<T, S, K / 2>(parts), concat<T, S, K / 2>(parts + K / 2),
                                std::make_integer_sequence<int, S * K>{});
}
// lane l comes from lane l % Inner * Outer + l / Inner
template <int Inner, int Outer, class V, int... l>
RF_INLINE V transpose_lanes(V v, std::integer_sequence<int, l...>) {
  return __builtin_shufflevector(v, v, (l % Inner * Outer + l / Inner)...);
}
template <class T, int Inner, int Outer>
RF_INLINE Vec<T, Inner * Outer> transpose_lanes(Vec<T, Inner * Outer> v) {
  return transpose_lanes<Inner, Outer>(v, std::make_integer_sequence<int, Inner * Outer>{});
}

// f(K) with the K for which there are vectors, or 0
template <class T, class F>
RF_INLINE void with_groups(int64_t K, int64_t cm, F&& f) {
  if constexpr (kShuffles<T, 2>)
    if (K == 2 && cm % (kLanes<T> / 2) == 0) return f(std::integral_constant<int, 2>{});
  if constexpr (kShuffles<T, 4>)
    if (K == 4 && cm % (kLanes<T> / 4) == 0) return f(std::integral_constant<int, 4>{});
  if constexpr (kShuffles<T, 8>)
    if (K == 8 && cm % (kLanes<T> / 8) == 0) return f(std::integral_constant<int, 8>{});
  f(std::integral_constant<int, 0>{});
}

template <class T, int K>
RF_INLINE void shuffle_pixel(const T* mixed, const T* planar, int64_t cm, int64_t groups, T* to) {
  if constexpr (K == 0) {
    for (int64_t i = 0; i < cm; i++) {
      to[i * groups] = mixed[i];
      for (int64_t g = 1; g < groups; g++) to[i * groups + g] = planar[g * cm + i];
    }
  } else {
    constexpr int L = kLanes<T>, S = L / K;
    for (int64_t i = 0; i < cm; i += S) {
      Vec<T, S> parts[K];
      unroll<K>(RF_LAMBDA(g) { parts[g] = load<S>(g == 0 ? mixed + i : planar + g * cm + i); });
      store<L>(to + i * K, transpose_lanes<T, K, S>(concat<T, S, K>(parts)));
    }
  }
}

// adds all groups but the mixed op's to planar
template <class T, int K>
RF_INLINE void add_unshuffled_pixel(const T* from, int64_t cm, int64_t groups, T* planar) {
  if constexpr (K == 0) {
    for (int64_t i = 0; i < cm; i++)
      for (int64_t g = 1; g < groups; g++) planar[g * cm + i] += from[i * groups + g];
  } else {
    constexpr int L = kLanes<T>, S = L / K;
    for (int64_t i = 0; i < cm; i += S) {
      Vec<T, L> v = transpose_lanes<T, S, K>(load<L>(from + i * K));
      unroll<K - 1>(RF_LAMBDA(g) {
        T* to = planar + (g + 1) * cm + i;
        store<S>(to, load<S>(to) + consecutive_lanes<(g + 1) * S>(v, v, std::make_integer_sequence<int, S>{}));
      });
    }
  }
}

// the mixed op's channels of a shuffled image, dense
template <class T>
void take_mixed(ImageView<T> x, Size size, int64_t K, T* mixed) {
  auto [h, w, c] = size;
  int64_t cm = c / K;
  with_groups<T>(K, cm, [&](auto groups) {
    for (int64_t r = 0; r < h; r++)
      for (int64_t q = 0; q < w; q++) {
        const T* from = x.data + r * x.row + q * x.pixel;
        T* to = mixed + (r * w + q) * cm;
        if constexpr (groups == 0) {
          for (int64_t i = 0; i < cm; i++) to[i] = from[i * K];
        } else {
          constexpr int L = kLanes<T>, S = L / groups;
          for (int64_t i = 0; i < cm; i += S) {
            Vec<T, L> v = transpose_lanes<T, S, groups>(load<L>(from + i * groups));
            store<S>(to + i, consecutive_lanes<0>(v, v, std::make_integer_sequence<int, S>{}));
          }
        }
      }
  });
}

// One row of the sum over n edges of edge_weights[e] x[e], dense.
template <class T>
RF_INLINE void sum_row(int n, const ImageView<T>* x, const T* edge_weights, int64_t row, int64_t w, int64_t c, T* to) {
  with_lanes<T>(c, [&](auto lanes) __attribute__((always_inline)) {
    constexpr int L = lanes;
    for (int64_t q = 0; q < w; q++)
      for (int64_t k = 0; k < c; k += L) {
        Vec<T, L> acc = Vec<T, L>{};
        for (int e = 0; e < n; e++)
          acc += load<L>(x[e].data + row * x[e].row + q * x[e].pixel + k) * edge_weights[e];
        store<L>(to + q * c + k, acc);
      }
  });
}

template <class T>
void bypass_forward(int n, const ImageView<T>* x, const T* edge_weights, const T* mixed, Size size, int64_t K, T* out,
                    T* scratch) {
  auto [h, w, c] = size;
  int64_t cm = c / K;
  for (int64_t r = 0; r < h; r++) {
    sum_row<T>(n, x, edge_weights, r, w, c, scratch);
    with_groups<T>(K, cm, [&](auto groups) {
      for (int64_t q = 0; q < w; q++)
        shuffle_pixel<T, groups>(mixed + (r * w + q) * cm, scratch + q * c, cm, K, out + (r * w + q) * c);
    });
  }
}

// dx = outer + [mixed | 0], a row
template <class T>
RF_INLINE void start_row(const BypassBackward<T>& a, int64_t row, int64_t w, int64_t c, int64_t cm, T* dx) {
  if (a.outer.data)
    with_lanes<T>(c, [&](auto lanes) __attribute__((always_inline)) {
      for (int64_t q = 0; q < w; q++)
        for (int64_t k = 0; k < c; k += lanes)
          store<lanes>(dx + q * c + k, load<lanes>(a.outer.data + row * a.outer.row + q * a.outer.pixel + k));
    });
  else
    fill(dx, w * c, T(0));
  if (!a.mixed) return;
  with_lanes<T>(cm, [&](auto lanes) __attribute__((always_inline)) {
    for (int64_t q = 0; q < w; q++)
      for (int64_t k = 0; k < cm; k += lanes)
        store<lanes>(dx + q * c + k, load<lanes>(dx + q * c + k) + load<lanes>(a.mixed + (row * w + q) * cm + k));
  });
}

// sum = (first ? 0 : sum) + sum over N edges from e on of edge_weights[e] g[e], and dots[e] += sum g[e] x, for `count`
// elements from `at` on; x may be null
template <class T, int N>
RF_INLINE void add_edges(const BypassBackward<T>& a, int e, int64_t at, int64_t count, const T* x, T* sum) {
  with_lanes<T>(count, [&](auto lanes) __attribute__((always_inline)) {
    constexpr int L = lanes;
    Vec<T, L> dot[N];
    const T* g[N];
    T weights[N];
    unroll<N>(RF_LAMBDA(j) {
      dot[j] = Vec<T, L>{};
      g[j] = a.g[e + j] + at;
      weights[j] = a.edge_weights[e + j];
    });
    for (int64_t i = 0; i < count; i += L) {
      Vec<T, L> acc = e == 0 ? Vec<T, L>{} : load<L>(sum + i), here = x ? load<L>(x + i) : Vec<T, L>{};
      unroll<N>(RF_LAMBDA(j) {
        Vec<T, L> v = load<L>(g[j] + i);
        acc += v * weights[j];
        dot[j] += v * here;
      });
      store<L>(sum + i, acc);
    }
    if (!x) return;
    unroll<N>(RF_LAMBDA(j) {
      T sums[L];
      store<L>(sums, dot[j]);
      for (int l = 0; l < L; l++) a.dots[e + j] += sums[l];
    });
  });
}

// The same for all edges and a row of `count` elements. They stay shuffled until they are summed, so that each gradient
// is read once and nothing is stored in between.
template <class T>
RF_INLINE void add_all_edges(const BypassBackward<T>& a, int64_t at, int64_t count, const T* x, T* sum) {
  int e = 0;
  auto some = [&](auto edges) {
    // as many at a time as floats may add up
    int64_t chunk = chunk_size(kLanes<T>);
    for (int64_t i = 0; i < count; i += chunk)
      add_edges<T, edges>(a, e, at + i, least(chunk, count - i), x ? x + i : nullptr, sum + i);
    e += edges;
  };
  while (e + 4 <= a.edges) some(std::integral_constant<int, 4>{});
  if (a.edges - e == 3) some(std::integral_constant<int, 3>{});
  if (a.edges - e == 2) some(std::integral_constant<int, 2>{});
  if (a.edges - e == 1) some(std::integral_constant<int, 1>{});
}

template <class T>
void bypass_backward(const BypassBackward<T>& a, Size size, int64_t K, T* scratch) {
  auto [h, w, c] = size;
  int64_t cm = c / K, row = w * c;
  T *sum = scratch, *x = a.x.data ? scratch + row : nullptr, *zeros = scratch + 2 * row;
  if (x) fill(a.dots, a.edges, 0.0);
  fill(zeros, cm, T(0));
  for (int64_t r = 0; r < h; r++) {
    T* dx = a.dx + r * row;
    start_row(a, r, w, c, cm, dx);
    if (a.edges == 0) continue;
    with_groups<T>(K, cm, [&](auto groups) {
      if (!x) return;
      for (int64_t q = 0; q < w; q++)
        shuffle_pixel<T, groups>(zeros, a.x.data + r * a.x.row + q * a.x.pixel, cm, K, x + q * c);
    });
    add_all_edges(a, r * row, row, x, sum);
    with_groups<T>(K, cm, [&](auto groups) {
      for (int64_t q = 0; q < w; q++) add_unshuffled_pixel<T, groups>(sum + q * c, cm, K, dx + q * c);
    });
  }
}

// 2x2 max pool with stride 2
template <class T>
void half_pool_forward(ImageView<T> x, Size size, T* out) {
  auto [h, w, c] = size;
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

template <class T>
void half_pool_backward(ImageView<T> x, const T* d, Size size, T* dx) {
  auto [h, w, c] = size;
  with_lanes<T>(c, [&](auto lanes) __attribute__((always_inline)) {
    constexpr int L = lanes;
    for (int64_t r = 0; r < h / 2; r++)
      for (int64_t q = 0; q < w / 2; q++)
        for (int64_t k = 0; k < c; k += L) {
          const T* in = x.data + 2 * r * x.row + 2 * q * x.pixel + k;
          T* to = dx + (2 * r * w + 2 * q) * c + k;
          Vec<T, L> v[4] = {load<L>(in), load<L>(in + x.pixel), load<L>(in + x.row), load<L>(in + x.row + x.pixel)};
          Vec<T, L> top = v[0], left = load<L>(d + (r * (w / 2) + q) * c + k);
          decltype(top < top) where = {};
          unroll<4>(RF_LAMBDA(i) { take_larger<T, L>(v[i], i, top, where); });
          unroll<4>(RF_LAMBDA(i) {
            T* at = to + (i / 2 * w + i % 2) * c;
            store<L>(at, load<L>(at) + (where == int(i) ? left : Vec<T, L>{}));
          });
        }
  });
}
