// Backward of a BatchNorm, the 1x1 convolution before it and its ReLU: the sums of the gradient, then that of x.
#pragma once
#include "cuda/relu_conv_bn_forward.h"

namespace rfdarts::cuda {

template <class T>
struct ReLUConvBNSums {
  Norms<T> norms;
  int pixels, chunk;  // chunk: of a block
  const T *g, *y;
  double* partial;  // [2][blocks][c]: sum g, sum g (y - mean)
};

// Blocks: chunks of pixels x groups of kChannels channels. Shared memory: [2][kThreads][V].
template <class T, int V>
__global__ void __launch_bounds__(kThreads) relu_conv_bn_sums_kernel(const __grid_constant__ ReLUConvBNSums<T> a) {
  RFDARTS_SHARED(shared);
  using A = Acc<T>;
  A *sums = reinterpret_cast<A*>(shared), *dots = sums + kThreads * V;
  int c = a.norms.c, c0 = int(blockIdx.y) * kChannels, count = min(kChannels, c - c0);
  Lanes<V> lane(count);
  int ch = c0 + lane.channel;
  A sum[V] = {}, dot[V] = {}, mean[V];
#pragma unroll
  for (int i = 0; i < V; i++) mean[i] = a.norms.mean(0, ch + i);
  int64_t begin = int64_t(blockIdx.x) * a.chunk;
  int pixels = int(min(int64_t(a.chunk), a.pixels - begin));
  for (int p = lane.pixel; p < pixels; p += lane.step) {
    A g[V], y[V];
    load<V>(a.g + (begin + p) * c + ch, g);
    load<V>(a.y + (begin + p) * c + ch, y);
#pragma unroll
    for (int i = 0; i < V; i++) sum[i] += g[i], dot[i] += g[i] * (y[i] - mean[i]);
  }
  if (lane.pixel < lane.step) {
#pragma unroll
    for (int i = 0; i < V; i++) {
      sums[lane.pixel * count + lane.channel + i] = sum[i];
      dots[lane.pixel * count + lane.channel + i] = dot[i];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 2 * count; i += kThreads) {
    const A* from = i < count ? sums + i : dots + i - count;
    double total = 0;
    for (int s = 0; s < lane.step; s++) total += double(from[s * count]);
    a.partial[(int64_t(i / count) * gridDim.x + blockIdx.x) * c + c0 + i % count] = total;
  }
}

template <class T>
struct ReLUConvBNBackward : ReLUConvBNLayout<T> {
  bool wide_y;
  const T *g, *y;
  const Acc<T>* coefficients;  // [4][co] of NormBackward
  T* grad_x;                   // [images][h][w][ci]
};

// grad_ys [pixels][ld] = the gradient at y, for `count` channels from c0 on, of pixels from `begin` on; 0 beyond `valid`
template <class T, int V, class F>
__device__ void load_norm_gradient(const ReLUConvBNBackward<T>& a, int begin, int valid, int c0, int count,
                                   F* grad_ys, int ld) {
  Lanes<V> lane(count);
  NormBackward<Acc<T>, V> backward(a.coefficients + c0 + lane.channel, a.co);
#pragma unroll 2
  for (int p = lane.pixel; p < a.shape.pixels; p += lane.step) {
    Acc<T> v[V] = {};
    if (p < valid) {
      Acc<T> g[V], y[V];
      int64_t from = int64_t(begin + p) * a.co + c0 + lane.channel;
      load<V>(a.g + from, g);
      load<V>(a.y + from, y);
#pragma unroll
      for (int i = 0; i < V; i++) v[i] = backward(i, g[i], y[i]);
    }
    store<V>(grad_ys + p * ld + lane.channel, v);
  }
}

// grad_x = grad_xs where x > 0, for `count` channels from d0 on of the tile's pixels; and the zeros between these, which
// no convolution has read
template <class T, int V>
__device__ void store_masked(const ReLUConvBNBackward<T>& a, const int64_t* places, int begin, int valid, int pass,
                             int d0, int count, const T* grad_xs, int ld) {
  constexpr int ahead = 2;
  Lanes<V> lane(count);
  int w = a.ow * a.passes, ch = d0 + lane.channel;
  for (int p = lane.pixel; p < valid; p += ahead * lane.step) {
    Pack<T, V> x[ahead];
#pragma unroll
    for (int j = 0; j < ahead; j++)
      if (p + j * lane.step < valid)
        x[j] = *reinterpret_cast<const Pack<T, V>*>(a.x.data + places[p + j * lane.step] + ch);
#pragma unroll
    for (int j = 0; j < ahead; j++) {
      int q = p + j * lane.step;
      if (q >= valid) break;
      Pack<T, V> value = *reinterpret_cast<const Pack<T, V>*>(grad_xs + q * ld + lane.channel);
#pragma unroll
      for (int i = 0; i < V; i++)
        if (widen(x[j].v[i]) <= Acc<T>(0)) value.v[i] = narrow<T>(0);
      int64_t pixel = begin + q;
      // of 2x2 pixels the first convolution has read the first, the second the last
      if (a.passes == 2) pixel = 2 * (pixel + (begin + q) / a.ow * a.ow) + pass * (w + 1);
      T* to = a.grad_x + pixel * a.ci + ch;
      *reinterpret_cast<Pack<T, V>*>(to) = value;
      if (a.passes == 2) *reinterpret_cast<Pack<T, V>*>(to + (pass ? -a.ci : a.ci)) = Pack<T, V>{};
    }
  }
}

// One block per tile: all columns, a group of them after the other.
template <class T, bool TensorCores>
__global__ void __launch_bounds__(kThreads, kProductBlocks<T>)
    relu_conv_bn_backward_kernel(const __grid_constant__ ReLUConvBNBackward<T> a) {
  RFDARTS_SHARED(shared);
  using F = typename ProductShared<T, TensorCores>::Factor;
  const ProductShape& s = a.shape;
  ProductShared<T, TensorCores> at(s);
  F *grad_ys = reinterpret_cast<F*>(shared), *ws = reinterpret_cast<F*>(shared + at.ws);
  T* grad_xs = reinterpret_cast<T*>(shared + at.ys);
  int64_t* places = reinterpret_cast<int64_t*>(shared + at.places);
  int begin = int(blockIdx.x) * s.pixels, valid = min(s.pixels, a.pixels - begin), half = a.half();
  for (int pass = 0; pass < a.passes; pass++) {
    for (int d0 = 0; d0 < a.ci; d0 += kFewColumns) {
      int count = min(kFewColumns, a.ci - d0);
      Product<T, TensorCores, kFewColumns> product(s);
      for (int c0 = 0; c0 < half; c0 += s.ck) {
        int k = min(s.ck, half - c0), o0 = pass * half + c0;
        // nobody needs what this overwrites, nor what the product will
        __syncthreads();
        if (c0 == 0 && d0 == 0)
          for (int p = threadIdx.x; p < valid; p += kThreads) places[p] = a.place(begin + p, pass);
        // a gradient of few channels stays for all columns
        if (s.ck < half || d0 == 0) {
          // more would take registers for their coefficients
          constexpr int V = kWide<T> < 4 ? kWide<T> : 4;
          if (a.wide_y)
            load_norm_gradient<T, V>(a, begin, valid, o0, k, grad_ys, at.ldd);
          else
            load_norm_gradient<T, 1>(a, begin, valid, o0, k, grad_ys, at.ldd);
        }
        stage_weights<TensorCores>(a.transposed() + int64_t(o0) * a.ci + d0, a.ci,
                                   a.conv_weights + int64_t(d0) * a.co + o0, a.co, k, count, s.columns, ws, at.ldw);
        __syncthreads();
        product.add(grad_ys, at.ldd, ws, at.ldw, k, count);
      }
      product.put(grad_xs, at.ldy, count);
      __syncthreads();
      with_width<T>(a.wide, [&]<int V>() {
        store_masked<T, V>(a, places, begin, valid, pass, d0, count, grad_xs, at.ldy);
      });
    }
  }
}

}  // namespace rfdarts::cuda
