// Backward of stages 2 and 1: the gradient at a BatchNorm's input is formed as a tile is loaded, goes back through
// the 1x1 convolution, and from shared memory through the depthwise one.
#pragma once
#include "cuda/tile.h"

namespace rfdarts::cuda {

// Items of 4 pixels x 4 channels of the 1x1 product that a thread may hold.
constexpr int kItems = 2;

// Columns (rows) of [oh][ow] that n neighbours in [h][w] depend on, for a kernel of reach R.
__host__ __device__ inline int region_size(int n, int reach, int stride) {
  return stride == 1 ? n + 2 * reach : (n - 1 + reach) / 2 + (reach + 1) / 2 + 1;
}

template <class T>
struct BackwardShared {
  int lanes, ld;  // channels of a chunk; row of dys
  int es, where, sums, bytes;

  // pools: room for what they need; ck: at most kStrip tiles
  __host__ __device__ BackwardShared(const Tiling& t, int region, bool pools) {
    int item = sizeof(Acc<T>), around = (t.th + 4) * (t.tw + 4), pooled = (t.th + 2) * (t.tw + 2);
    lanes = round_up(t.ck, 4);
    ld = lanes + 4;
    // an image row of es is padded by at most 128 bytes and one pixel
    int edge = region * lanes + (t.th + 8) * (128 / item + lanes), dys = round_up(region, 16) * ld;
    if (pools) {
      dys = dys > around * t.ck ? dys : around * t.ck;
      edge = edge > 2 * pooled * t.ck ? edge : 2 * pooled * t.ck;
    }
    es = round_up(dys * item, 16);
    where = es + round_up(edge * item, 16);
    sums = where + round_up(pools ? pooled * t.ck : 0, 16);
    bytes = sums + 2 * kThreads * item;
  }
};

// dys [pixels][ld] = A g + B (y - mean) + D for `count` channels from c0 on, 0 outside the image
template <class T, int V>
__device__ void load_gradient(const BackBranch<T>& b, const Back<T>& a, int n, int y0, int x0, int rows, int columns,
                              int c0, int count, int ld, Acc<T>* dys) {
  Lanes<V> lane(count);
  Acc<T> k[4][V];
#pragma unroll
  for (int j = 0; j < 4; j++)
#pragma unroll
    for (int i = 0; i < V; i++) k[j][i] = b.coef[j * a.c + c0 + lane.channel + i];
  for (int p = lane.pixel; p < rows * columns; p += lane.step) {
    int y = y0 + p / columns, x = x0 + p % columns;
    Acc<T> v[V] = {};
    if (unsigned(y) < unsigned(a.oh) && unsigned(x) < unsigned(a.ow)) {
      Acc<T> g[V], kept[V];
      load<V>(b.g.at(n, y, x) + c0 + lane.channel, g);
      load<V>(b.y + n * a.image + (int64_t(y) * a.ow + x) * a.c + c0 + lane.channel, kept);
#pragma unroll
      for (int i = 0; i < V; i++) v[i] = k[0][i] * g[i] + (k[1][i] * (kept[i] - k[2][i]) + k[3][i]);
    }
#pragma unroll
    for (int i = 0; i < V; i++) dys[p * ld + lane.channel + i] = v[i];
  }
}

// One thread's share of a tile: kStrip neighbours of one channel.
template <class A>
struct Strip {
  int channel, y, x;
  bool valid;
  A acc[kStrip];

  __device__ Strip(const Tiling& t, int count) : acc{} {
    int id = threadIdx.x;
    channel = id % count;
    y = id / count % t.th;
    x = id / (count * t.th) * kStrip;
    valid = x < t.tw;
  }
};

// strip += the gradient that one branch sends back to channels [d0, d0 + count)
template <class T, int S>
__device__ void branch_backward(const Back<T>& a, const BackBranch<T>& b, int n, int y0, int x0, int d0, int count,
                                const BackwardShared<T>& at, Acc<T>* dys, Acc<T>* es, Strip<Acc<T>>& strip) {
  using A = Acc<T>;
  const Tiling& t = a.tiling;
  bool reduces = b.op == int(Op::Reduce);
  int c = a.c, reach = reduces ? 0 : (b.kernel - 1) * b.dilation / 2;
  // the transposed 1x1 convolution lies behind the forward one
  const A* w = a.weights + b.weight + (reduces ? 2 * c * c : b.kernel * b.kernel * c + c * c);
  int ldw = reduces ? 2 * c : c;
  int rows = region_size(t.th, reach, S), columns = region_size(t.tw, reach, S), pixels = rows * columns;
  int ey = y0 / S - (reach + S - 1) / S, ex = x0 / S - (reach + S - 1) / S;
  int pitch = tile_pitch(columns, at.lanes, sizeof(A)), apart = ceil_div(pixels, 4), groups = ceil_div(count, 4);
  for (int pass = 0; pass < (reduces ? 2 : 1); pass++) {
    // f is left with dys loaded for channels [c0, c0 + part)
    auto with_chunks = [&](auto&& f) {
      for (int c0 = 0; c0 < c; c0 += t.ck) {
        int part = min(t.ck, c - c0);
        __syncthreads();
        if (a.wide)
          load_gradient<T, kWide<T>>(b, a, n, ey, ex, rows, columns, c0, part, at.ld, dys);
        else
          load_gradient<T, 1>(b, a, n, ey, ex, rows, columns, c0, part, at.ld, dys);
        __syncthreads();
        f(c0, part, w + int64_t(c0) * ldw + pass * c + d0);
      }
    };
    auto place = [&](int p, int o) { return p / columns * pitch + p % columns * at.lanes + o; };
    bool tensor_cores = false;
    if constexpr (sizeof(T) == 2) {
      tensor_cores = on_tensor_cores<T>(c, count);
      if (tensor_cores)
        with_chunks([&](int c0, int part, const A* wc) {
          int across = count / 8, tiles = ceil_div(pixels, 16) * across, g = threadIdx.x % 32 / 4;
          for (int tile = threadIdx.x / 32; tile < tiles; tile += kWarps) {
            int p0 = tile / across * 16, o0 = tile % across * 8, o = o0 + threadIdx.x % 4 * 2;
            // es itself holds the sums: a warp comes back to the same tiles
            A* low = es + place(p0 + g, o);
            A* high = es + place(p0 + g + 8, o);
            bool has_low = p0 + g < pixels, has_high = p0 + g + 8 < pixels;
            float acc[4] = {};
            if (c0 && has_low) acc[0] = low[0], acc[1] = low[1];
            if (c0 && has_high) acc[2] = high[0], acc[3] = high[1];
            multiply_warp<T>(dys, at.ld, p0, part, wc, ldw, o0, acc);
            if (has_low) low[0] = acc[0], low[1] = acc[1];
            if (has_high) high[0] = acc[2], high[1] = acc[3];
          }
        });
    }
    if (!tensor_cores) {
      A acc[kItems][4][4] = {};
      with_chunks([&](int, int part, const A* wc) {
#pragma unroll
        for (int k = 0; k < kItems; k++) {
          int i = threadIdx.x + k * kThreads, o = i % groups * 4, p = i / groups;
          if (p < apart) multiply(dys + p * at.ld, apart * at.ld, part, wc + o, ldw, count - o, acc[k]);
        }
      });
#pragma unroll
      for (int k = 0; k < kItems; k++) {
        int i = threadIdx.x + k * kThreads, o = i % groups * 4, first = i / groups;
        if (first >= apart) continue;
#pragma unroll
        for (int j = 0; j < 4; j++) {
          int p = first + j * apart;
          if (p >= pixels) continue;
#pragma unroll
          for (int m = 0; m < 4; m++) es[place(p, o) + m] = acc[k][j][m];
        }
      }
    }
    __syncthreads();
    if (!strip.valid) continue;
    if (reduces) {
      // the second half of the outputs belongs to odd rows and columns
      if (strip.y % S != pass) continue;
#pragma unroll
      for (int o = 0; o < kStrip; o++)
        if (o % S == pass)
          strip.acc[o] += es[strip.y / S * pitch + (strip.x + o) / S * at.lanes + strip.channel];
    } else {
      with_kernel(b.kernel, b.dilation, [&]<int K, int D>() {
        depthwise_transposed<K, D, S, A>(es + strip.channel, pitch, at.lanes, ey - y0 / S, ex - x0 / S,
                                         a.weights + b.weight, c, d0 + strip.channel, strip.y, strip.x, strip.acc);
      });
    }
  }
}

// B2: du behind the inner ReLU, and its sums for the inner BatchNorm. One block per tile and branch.
template <class T>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    inner_backward_kernel(const __grid_constant__ InnerBackward<T> a) {
  RFDARTS_SHARED(shared);
  using A = Acc<T>;
  const Tiling& t = a.tiling;
  BackwardShared<T> at(t, a.region, false);
  A *dys = reinterpret_cast<A*>(shared), *es = reinterpret_cast<A*>(shared + at.es),
    *sums = reinterpret_cast<A*>(shared + at.sums);
  int n, y0, x0;
  t.place(blockIdx.x, n, y0, x0);
  const auto& b = a.branch[blockIdx.y];
  double* out = a.partial + int64_t(blockIdx.y) * 2 * t.count * a.c;
  for (int d0 = 0; d0 < a.c; d0 += t.ck) {
    int count = min(t.ck, a.c - d0);
    Strip<A> strip(t, count);
    branch_backward<T, 1>(a, b, n, y0, x0, d0, count, at, dys, es, strip);
    A sum = 0, dot = 0;
    int ch = d0 + strip.channel, y = y0 + strip.y;
    if (strip.valid && y < a.oh) {
      A scale = a.norms.scale(b.norm, ch), centre = a.norms.centre(b.norm, ch);
      A shift = a.norms.beta[b.norm * a.c + ch] - centre * scale;
#pragma unroll
      for (int o = 0; o < kStrip; o++) {
        int x = x0 + strip.x + o;
        if (x >= a.ow) break;
        int64_t i = n * a.image + (int64_t(y) * a.ow + x) * a.c + ch;
        A inner = widen(b.inner[i]);
        T du = narrow<T>(scale * inner + shift <= A(0) ? A(0) : strip.acc[o]);
        b.du[i] = du;
        sum += widen(du);
        dot += widen(du) * (inner - centre);
      }
    }
    sums[2 * threadIdx.x] = sum;
    sums[2 * threadIdx.x + 1] = dot;
    __syncthreads();
    if (int(threadIdx.x) < count) {
      A total[2] = {};
      int strips = t.th * (t.tw / kStrip);
      for (int i = 0; i < strips; i++) {
        total[0] += sums[2 * (i * count + threadIdx.x)];
        total[1] += sums[2 * (i * count + threadIdx.x) + 1];
      }
      out[int64_t(blockIdx.x) * a.c + ch] = double(total[0]);
      out[(int64_t(t.count) + blockIdx.x) * a.c + ch] = double(total[1]);
    }
  }
}

template <class T>
__device__ Acc<T> norm_backward(const StateBackward<T>& a, int norm, int ch, Acc<T> g, Acc<T> y) {
  const Acc<T>* k = a.coef + int64_t(norm) * 4 * a.c + ch;
  return k[0] * g + (k[a.c] * (y - k[2 * a.c]) + k[3 * a.c]);
}

// strip += what the pools of all leaving edges send back. They share their input's statistics, so their gradients
// add up before the pool's backward.
template <class T, int S>
__device__ void pools_backward(const StateBackward<T>& a, int n, int y0, int x0, int d0, int count,
                               Acc<T>* xs, Acc<T>* ds, uint8_t* where,
                               Strip<Acc<T>>& strip) {
  using A = Acc<T>;
  const Tiling& t = a.tiling;
  int rows = t.th + 4, columns = t.tw + 4;
  __syncthreads();
  for (int i = threadIdx.x; i < rows * columns * count; i += kThreads) {
    int ch = i % count, p = i / count, y = y0 - 2 + p / columns, x = x0 - 2 + p % columns;
    bool inside = unsigned(y) < unsigned(a.h) && unsigned(x) < unsigned(a.w);
    xs[i] = inside ? widen(a.x.at(n, y, x)[d0 + ch]) : A(0);
  }
  __syncthreads();
  // outputs whose windows reach the tile
  int oy = S == 1 ? y0 - 1 : y0 / 2, ox = S == 1 ? x0 - 1 : x0 / 2;
  int high = S == 1 ? t.th + 2 : t.th / 2 + 1, wide = S == 1 ? t.tw + 2 : t.tw / 2 + 1, size = high * wide * count;
  for (int i = threadIdx.x; i < size; i += kThreads) {
    int ch = i % count, p = i / count, y = oy + p / wide, x = ox + p % wide, c = d0 + ch;
    A d_max = 0, d_avg = 0;
    Pooled<T, 1> pooled;
    pooled.where[0] = 255;
    if (unsigned(y) < unsigned(a.oh) && unsigned(x) < unsigned(a.ow)) {
      pooled.compute(y * S, x * S, a.h, a.w, [&](int v, int u, A(&value)[1]) {
        value[0] = xs[((v - y0 + 2) * columns + u - x0 + 2) * count + ch];
      });
      for (int e = 0; e < a.leaving; e++) {
        const auto& edge = a.edge[e];
        A g = widen(edge.g.at(n, y, x)[c]);
        if (edge.max_norm >= 0) d_max += norm_backward(a, edge.max_norm, c, g, pooled.max[0]);
        if (edge.avg_norm >= 0) d_avg += norm_backward(a, edge.avg_norm, c, g, pooled.avg[0]);
      }
      d_avg /= A(window(y * S, a.h) * window(x * S, a.w));
    }
    ds[2 * i] = d_max;
    ds[2 * i + 1] = d_avg;
    where[i] = uint8_t(pooled.where[0]);
  }
  __syncthreads();
  if (!strip.valid) return;
#pragma unroll
  for (int o = 0; o < kStrip; o++) {
    int y = y0 + strip.y, x = x0 + strip.x + o;
    for (int u = -1; u <= 1; u++)
      for (int v = -1; v <= 1; v++) {
        // the window around (y - u, x - v) holds this pixel in place (u, v)
        if (S == 2 && (((y - u) & 1) || ((x - v) & 1))) continue;
        int q = (y - u) / S - oy, p = (x - v) / S - ox;
        if (y - u < 0 || x - v < 0 || q >= high || p >= wide) continue;
        int i = (q * wide + p) * count + strip.channel;
        // pixels beyond the output have no window
        if (where[i] == 255) continue;
        strip.acc[o] += ds[2 * i + 1] + (where[i] == (u + 1) * 3 + v + 1 ? ds[2 * i] : A(0));
      }
  }
}

// B3: one block per tile of the state. Channels beyond c are bypass_backward_kernel's.
template <class T, int S>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    state_backward_kernel(const __grid_constant__ StateBackward<T> a) {
  RFDARTS_SHARED(shared);
  using A = Acc<T>;
  const Tiling& t = a.tiling;
  BackwardShared<T> at(t, a.region, a.pools);
  A *dys = reinterpret_cast<A*>(shared), *es = reinterpret_cast<A*>(shared + at.es);
  int n, y0, x0;
  t.place(blockIdx.x, n, y0, x0);
  for (int d0 = 0; d0 < a.c; d0 += t.ck) {
    int count = min(t.ck, a.c - d0), y;
    Strip<A> strip(t, count);
    for (int b = 0; b < a.branches; b++)
      branch_backward<T, S>(a, a.branch[b], n, y0, x0, d0, count, at, dys, es, strip);
    int ch = d0 + strip.channel;
    y = y0 + strip.y;
    bool inside = strip.valid && y < a.h;
    if (inside)
#pragma unroll
      for (int o = 0; o < kStrip; o++)
        if (x0 + strip.x + o < a.w && widen(a.x.at(n, y, x0 + strip.x + o)[ch]) <= A(0)) strip.acc[o] = 0;
    if (a.pools) pools_backward<T, S>(a, n, y0, x0, d0, count, dys, es, shared + at.where, strip);
    if (!inside) continue;
    for (int e = 0; e < a.leaving; e++) {
      const auto& edge = a.edge[e];
      if (edge.identity_mix < 0) continue;
      A strength = a.mix[edge.identity_mix];
      if (a.edge_weights) strength *= a.edge_weights[edge.edge];
#pragma unroll
      for (int o = 0; o < kStrip; o++)
        if (x0 + strip.x + o < a.w) strip.acc[o] += strength * widen(edge.g.at(n, y, x0 + strip.x + o)[ch]);
    }
#pragma unroll
    for (int o = 0; o < kStrip; o++) {
      int x = x0 + strip.x + o;
      if (x >= a.w) break;
      if (a.outer.data) strip.acc[o] += widen(a.outer.at(n, y, x)[ch]);
      a.dx[((int64_t(n) * a.h + y) * a.w + x) * a.full + ch] = narrow<T>(strip.acc[o]);
    }
  }
}

}  // namespace rfdarts::cuda
