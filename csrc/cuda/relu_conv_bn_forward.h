// ReLU, 1x1 convolutions and their statistics from one pass over x; then the BatchNorms. FactorizedReduce: two
// convolutions ("passes"), one for each half of the outputs, of every other pixel, the second one pixel further on.
// Layers that read one x share all launches; neighbouring blocks are theirs, so that x comes from memory once.
#pragma once
#include "cuda/batch_norm.h"
#include "cuda/cell.h"
#include "cuda/moments.h"
#include "cuda/product.h"

namespace rfdarts::cuda {

// What all kernels know. Pixels are those of y, of all images; all but x is dense.
template <class T>
struct ReLUConvBNLayers {
  ImageView<T> x;
  int oh, ow, pixels, ci, passes, layers;
  bool wide, wide_y;  // 16-byte accesses are aligned: of x, of all that has a layer's channels
  struct Layer {
    const Acc<T>* conv_weights;
    Norms<T> norms;
    T *y, *out;
    const T* g;
    double* partial;             // [2][blocks][co] mean and squared deviations, or null; sum g, sum g (y - mean)
    const Acc<T>* coefficients;  // [4][co] of NormBackward

    // columns: of y's channels, those of one convolution
    __device__ int columns(int passes) const { return norms.c / passes; }
    __device__ const Acc<T>* transposed(int ci) const { return conv_weights + int64_t(ci) * norms.c; }
  } layer[kMaxLayers];

  // where the pixel of x that a convolution reads for pixel p lies
  __device__ int64_t place(int p, int pass) const {
    int row = p / ow, n = row / oh;
    return n * x.image + int64_t((row - n * oh) * passes + pass) * x.row +
           int64_t((p - row * ow) * passes + pass) * x.pixel;
  }
};

template <class T>
struct ReLUConvBNForward : ReLUConvBNLayers<T> {
  ProductShape shape;
  int rounds;  // tiles of a block, next to each other
};

// ds [pixels][ld] = relu of `count` channels of x from c0 on; 0 where there is no place. A thread waits for Ahead loads
// together.
template <class T, int V, int Ahead, class F>
__device__ void load_relu(const T* x, const int64_t* places, int pixels, int c0, int count, F* ds, int ld) {
  Lanes<V> lane(count);
  for (int p = lane.pixel; p < pixels; p += Ahead * lane.step) {
    Pack<T, V> loaded[Ahead];
#pragma unroll
    for (int j = 0; j < Ahead; j++) {
      int64_t place = p + j * lane.step < pixels ? places[p + j * lane.step] : -1;
      loaded[j] = place < 0 ? Pack<T, V>{} : *reinterpret_cast<const Pack<T, V>*>(x + place + c0 + lane.channel);
    }
#pragma unroll
    for (int j = 0; j < Ahead; j++) {
      if (p + j * lane.step >= pixels) break;
      Acc<T> v[V];
#pragma unroll
      for (int i = 0; i < V; i++) v[i] = relu(widen(loaded[j].v[i]));
      store<V>(ds + (p + j * lane.step) * ld + lane.channel, v);
    }
  }
}

// `valid` pixels of y [pixels][co] = ys [pixels][ld] for `count` channels
template <class T>
__device__ void store_outputs(T* y, int co, int valid, int count, bool wide, const T* ys, int ld) {
  with_width<T>(wide, [&]<int V>() {
    int vectors = count / V;
    for (int i = threadIdx.x; i < valid * vectors; i += kThreads)
      *reinterpret_cast<Pack<T, V>*>(y + int64_t(i / vectors) * co + i % vectors * V) =
          *reinterpret_cast<const Pack<T, V>*>(ys + i / vectors * ld + i % vectors * V);
  });
}

// One thread's share of a block's moments: some pixels of one channel, about a value amidst the first tile.
template <class T>
struct MomentShare {
  int parts, ch, part;
  Acc<T> about = 0, sum = 0, square = 0;

  __device__ explicit MomentShare(int count)
      : parts(kThreads / count), ch(threadIdx.x % count), part(threadIdx.x / count) {}
  __device__ void add(const T* ys, int ld, int pixels, int valid, bool first) {
    if (part >= parts) return;
    // where other tiles lie far from the first, so does their mean, and squares cancel by no more than `rounds`
    if (first) about = middle(ys + ch, ld, pixels, 1, valid);
    for (int p = part; p < valid; p += parts) {
      Acc<T> off = widen(ys[p * ld + ch]) - about;
      sum += off;
      square += off * off;
    }
  }
  // partial [2][blocks][co] = the block's mean and squared deviations. All threads meet once.
  __device__ void write(Acc<T>* sums, int count, int pixels, int co, int o0, double* partial) const {
    sums[2 * threadIdx.x] = sum;
    sums[2 * threadIdx.x + 1] = square;
    __syncthreads();
    if (int(threadIdx.x) >= count) return;
    double total = 0, squares = 0;
    for (int i = 0; i < parts; i++) {
      total += double(sums[2 * (i * count + ch)]);
      squares += double(sums[2 * (i * count + ch) + 1]);
    }
    double mean = total / pixels;
    partial[int64_t(blockIdx.y) * co + o0 + ch] = double(about) + mean;
    partial[(int64_t(gridDim.y) + blockIdx.y) * co + o0 + ch] = squares - total * mean;
  }
};

// Blocks: layers x groups of tiles x groups of columns, those of the second convolution after those of the first.
template <class T, bool TensorCores, int Columns>
__global__ void __launch_bounds__(kThreads, kProductBlocks<T>)
    relu_conv_bn_forward_kernel(const __grid_constant__ ReLUConvBNForward<T> a) {
  RFDARTS_SHARED(shared);
  using A = Acc<T>;
  using F = typename ProductShared<T, TensorCores>::Factor;
  // more columns leave fewer registers
  constexpr int kAhead = TensorCores && Columns == kManyColumns ? 2 : 4;
  const auto& layer = a.layer[blockIdx.x];
  int groups = int(gridDim.z) / a.passes, pass = int(blockIdx.z) / groups, within = int(blockIdx.z) % groups * Columns;
  int co = layer.norms.c, columns = layer.columns(a.passes), count = min(Columns, columns - within);
  // another layer has more
  if (count <= 0) return;
  ProductShape s = a.shape;
  // of a narrower layer, or of the last of its groups; tensor cores leave the others out anyway
  if constexpr (!TensorCores) s.columns = min(s.columns, round_up(count, 4));
  ProductShared<T, TensorCores> at(s);
  F *ds = reinterpret_cast<F*>(shared), *ws = reinterpret_cast<F*>(shared + at.ws);
  T* ys = reinterpret_cast<T*>(shared + at.ys);
  int64_t* places = reinterpret_cast<int64_t*>(shared + at.places);
  int o0 = pass * columns + within;
  MomentShare<T> moments(count);
  int first = int(blockIdx.y) * a.rounds * s.pixels, total = min(a.rounds * s.pixels, a.pixels - first);

  for (int done = 0; done < total; done += s.pixels) {
    int begin = first + done, valid = min(s.pixels, total - done);
    for (int p = threadIdx.x; p < s.pixels; p += kThreads) places[p] = p < valid ? a.place(begin + p, pass) : -1;
    Product<T, TensorCores, Columns> product(s);
    for (int c0 = 0; c0 < a.ci; c0 += s.ck) {
      int k = min(s.ck, a.ci - c0);
      // the places are known, and nobody needs what this overwrites
      __syncthreads();
      with_width<T>(a.wide,
                    [&]<int V>() { load_relu<T, V, kAhead>(a.x.data, places, s.pixels, c0, k, ds, at.ldd); });
      // weights that all fit stay
      if (c0 % s.wk == 0 && (done == 0 || s.wk < a.ci))
        stage_weights<TensorCores>(layer.conv_weights + int64_t(c0) * co + o0, co,
                                   layer.transposed(a.ci) + int64_t(o0) * a.ci + c0, a.ci, min(s.wk, a.ci - c0), count,
                                   s.columns, ws, at.ldw);
      // ds and ws are complete
      __syncthreads();
      int skipped = c0 % s.wk * (TensorCores ? 1 : at.ldw);
      product.add(ds, at.ldd, ws + skipped, at.ldw, k, count);
    }
    product.put(ys, at.ldy, count);
    // ys is complete; the next tile's first barrier keeps it until all have read it
    __syncthreads();
    store_outputs(layer.y + int64_t(begin) * co + o0, co, valid, count, a.wide_y, ys, at.ldy);
    if (layer.partial) moments.add(ys, at.ldy, s.pixels, valid, done == 0);
  }
  if (layer.partial) moments.write(reinterpret_cast<A*>(shared + at.sums), count, total, co, o0, layer.partial);
}

template <class T>
struct ReLUConvBNAffine : ReLUConvBNLayers<T> {};

// channels of a block that takes them as they come
constexpr int kChannels = 64;

// Blocks: layers x pixels x groups of kChannels. Shared memory: [3][kChannels].
template <class T, int V>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    relu_conv_bn_affine_kernel(const __grid_constant__ ReLUConvBNAffine<T> a) {
  RFDARTS_SHARED(shared);
  using A = Acc<T>;
  A *scales = reinterpret_cast<A*>(shared), *means = scales + kChannels, *betas = means + kChannels;
  const auto& layer = a.layer[blockIdx.x];
  const Norms<T>& norms = layer.norms;
  int c = norms.c, c0 = int(blockIdx.z) * kChannels, count = min(kChannels, c - c0);
  if (count <= 0) return;
  // roots are slow: one thread each
  for (int i = threadIdx.x; i < count; i += kThreads) {
    scales[i] = norms.scale(0, c0 + i);
    means[i] = norms.mean(0, c0 + i);
    betas[i] = norms.beta[c0 + i];
  }
  __syncthreads();
  Lanes<V> lane(count);
  A scale[V], mean[V], beta[V];
  load<V>(scales + lane.channel, scale);
  load<V>(means + lane.channel, mean);
  load<V>(betas + lane.channel, beta);
  int apart = int(gridDim.y) * lane.step;
  for (int64_t p = int64_t(blockIdx.y) * lane.step + lane.pixel; p < a.pixels; p += apart) {
    int64_t at = p * c + c0 + lane.channel;
    A value[V];
    load<V>(layer.y + at, value);
#pragma unroll
    for (int i = 0; i < V; i++) value[i] = scale[i] * (value[i] - mean[i]) + beta[i];
    store<V>(layer.out + at, value);
  }
}

}  // namespace rfdarts::cuda
