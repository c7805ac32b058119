// Backward of BatchNorms, the 1x1 convolutions before them and their ReLU: the sums of the gradients, then that of x,
// from all layers in one product.
#pragma once
#include "cuda/relu_conv_bn_forward.h"

namespace rfdarts::cuda {

template <class T>
struct ReLUConvBNSums : ReLUConvBNLayers<T> {
  int chunk;  // pixels of a block
};

// Blocks: layers x chunks of pixels x groups of kChannels channels. Shared memory: [2][kThreads][V].
template <class T, int V>
__global__ void __launch_bounds__(kThreads) relu_conv_bn_sums_kernel(const __grid_constant__ ReLUConvBNSums<T> a) {
  RFDARTS_SHARED(shared);
  using A = Acc<T>;
  A *sums = reinterpret_cast<A*>(shared), *dots = sums + kThreads * V;
  const auto& layer = a.layer[blockIdx.x];
  int c = layer.norms.c, c0 = int(blockIdx.z) * kChannels, count = min(kChannels, c - c0);
  if (count <= 0) return;
  Lanes<V> lane(count);
  int ch = c0 + lane.channel;
  A sum[V] = {}, dot[V] = {}, mean[V];
#pragma unroll
  for (int i = 0; i < V; i++) mean[i] = layer.norms.mean(0, ch + i);
  int64_t begin = int64_t(blockIdx.y) * a.chunk;
  int pixels = int(min(int64_t(a.chunk), a.pixels - begin));
  for (int p = lane.pixel; p < pixels; p += lane.step) {
    A g[V], y[V];
    load<V>(layer.g + (begin + p) * c + ch, g);
    load<V>(layer.y + (begin + p) * c + ch, y);
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
    layer.partial[(int64_t(i / count) * gridDim.y + blockIdx.y) * c + c0 + i % count] = total;
  }
}

template <class T>
struct ReLUConvBNBackward : ReLUConvBNLayers<T> {
  ProductShape shape;  // ck: of all layers' gradients where these stay, else of a chunk
  bool stay;           // in shared memory, for all columns
  T* grad_x;           // [images][h][w][ci]
};

// grad_ys [pixels][ld] = the gradient at a layer's y, for `count` channels from c0 on, of pixels from `begin` on; 0
// beyond `valid`
template <class T, int V, class F>
__device__ void load_norm_gradient(const typename ReLUConvBNLayers<T>::Layer& layer, int begin, int valid, int pixels,
                                   int c0, int count, F* grad_ys, int ld) {
  Lanes<V> lane(count);
  NormBackward<Acc<T>, V> backward(layer.coefficients + c0 + lane.channel, layer.norms.c);
#pragma unroll 2
  for (int p = lane.pixel; p < pixels; p += lane.step) {
    Acc<T> v[V] = {};
    if (p < valid) {
      Acc<T> g[V], y[V];
      int64_t from = int64_t(begin + p) * layer.norms.c + c0 + lane.channel;
      load<V>(layer.g + from, g);
      load<V>(layer.y + from, y);
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
  int begin = int(blockIdx.x) * s.pixels, valid = min(s.pixels, a.pixels - begin);
  for (int pass = 0; pass < a.passes; pass++) {
    // all have read the places of the last pass
    if (pass) __syncthreads();
    for (int p = threadIdx.x; p < valid; p += kThreads) places[p] = a.place(begin + p, pass);
    for (int d0 = 0; d0 < a.ci; d0 += kFewColumns) {
      int count = min(kFewColumns, a.ci - d0);
      Product<T, TensorCores, kFewColumns> product(s);
      F* chunk = grad_ys;
      for (int i = 0; i < a.layers; i++) {
        const auto& layer = a.layer[i];
        int co = layer.norms.c, columns = layer.columns(a.passes);
        for (int c0 = 0; c0 < columns; c0 += s.wk) {
          int k = min(s.wk, columns - c0), o0 = pass * columns + c0;
          // nobody needs what this overwrites, nor what the product will
          __syncthreads();
          if (!a.stay || d0 == 0) {
            // more would take registers for their coefficients
            constexpr int V = kWide<T> < 4 ? kWide<T> : 4;
            if (a.wide_y)
              load_norm_gradient<T, V>(layer, begin, valid, s.pixels, o0, k, chunk, at.ldd);
            else
              load_norm_gradient<T, 1>(layer, begin, valid, s.pixels, o0, k, chunk, at.ldd);
          }
          stage_weights<TensorCores>(layer.transposed(a.ci) + int64_t(o0) * a.ci + d0, a.ci,
                                     layer.conv_weights + int64_t(d0) * co + o0, co, k, count, s.columns, ws, at.ldw);
          __syncthreads();
          product.add(chunk, at.ldd, ws, at.ldw, k, count);
          // products load four channels at once
          if (a.stay) chunk += round_up(k, 4);
        }
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
