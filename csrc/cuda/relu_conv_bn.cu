// ReLU, frozen 1x1 convolution, BatchNorm as sequences of launches: forward three, backward three.
#include "cuda/relu_conv_bn.h"

#include "cuda/cell_context.h"
#include "cuda/relu_conv_bn_backward.h"

namespace rfdarts::cuda {
namespace {

// Blocks: enough to fill a device, few where their statistics or sums are merged.
constexpr int kMaxParts = 2048, kMaxSums = 512;
// Weights are loaded once for all of a block's tiles where they take no more than this.
constexpr int kWeightsGoal = 40 << 10;

template <class T>
struct ReLUConvBNPass {
  const ReLUConvBN& a;
  const Queue& queue;
  const Allocate& allocate;
  int pixels = int(a.images * a.oh() * a.ow()), co = int(a.co), ci = int(a.ci), passes = a.reduce ? 2 : 1;
  Norms<T> norms{static_cast<const Acc<T>*>(a.gamma), static_cast<const Acc<T>*>(a.beta), a.moments,
                 a.moments + a.co, Acc<T>(a.eps), co};

  template <class U>
  U* take(int64_t count) const {
    return static_cast<U*>(allocate(count * int64_t(sizeof(U))));
  }
  T* y() const { return static_cast<T*>(a.y); }
  // channels of y and of each convolution's part of it are whole vectors; fresh memory is aligned, gradients may not be
  bool wide_y(const T* g = nullptr) const {
    return co / passes % kWide<T> == 0 && reinterpret_cast<uintptr_t>(g) % 16 == 0;
  }
  // `columns` outputs from k inputs
  bool tensor_cores(int k, int columns) const { return sizeof(T) == 2 && k % 16 == 0 && columns % 8 == 0; }

  template <bool TensorCores, int Columns>
  ProductShape shape(int k, int columns, bool all_weights) const {
    using P = Product<T, TensorCores, Columns>;
    int most = round_up(std::min(columns, Columns), P::kGroup), ck = std::min(k, P::kChunk);
    ProductShape s{P::pixels(most), most, ck, ck};
    // whole chunks, or all
    if (all_weights && int64_t(k) * most * int(sizeof(typename P::Factor)) <= kWeightsGoal) s.wk = k;
    auto fits = [&] { return ProductShared<T, TensorCores>(s).bytes <= queue.limit; };
    if (!fits()) s.wk = ck;
    // a warp of tensor cores has its 16 pixels
    while (!TensorCores && !fits() && s.pixels > 16) s.pixels /= 2;
    return s;
  }
  void lay_out(ReLUConvBNLayout<T>& p) const {
    p.x = view<T>(a.x);
    p.oh = int(a.oh()), p.ow = int(a.ow()), p.pixels = pixels, p.ci = ci, p.co = co, p.passes = passes;
    p.wide = ci % kWide<T> == 0 && aligned(p.x, kWide<T>);
    p.conv_weights = static_cast<const Acc<T>*>(a.conv_weights);
  }
  dim3 channel_grid(int64_t blocks) const { return dim3(unsigned(blocks), ceil_div(co, kChannels)); }

  template <bool TensorCores, int Columns>
  void convolve() const {
    ReLUConvBNForward<T> p{};
    lay_out(p);
    int half = co / passes;
    p.shape = shape<TensorCores, Columns>(ci, half, true);
    int tiles = ceil_div(pixels, p.shape.pixels);
    p.rounds = ceil_div(tiles, kMaxParts);
    int blocks = ceil_div(tiles, p.rounds);
    p.wide_y = wide_y(), p.y = y();
    p.partial = a.training ? take<double>(int64_t(2) * blocks * co) : nullptr;
    dim3 grid(blocks, passes * ceil_div(half, Columns));
    int shared = ProductShared<T, TensorCores>(p.shape).bytes;
    launch(relu_conv_bn_forward_kernel<T, TensorCores, Columns>, grid, shared, queue, p);
    if (!a.training) return;
    // all pixels as one row, a block's as one tile
    MergeMoments m{Tiling(1, p.rounds * p.shape.pixels, 0, 1, 1, pixels), 1, 1, pixels, co, 1, p.partial, a.moments, 1,
                   {}};
    launch(merge_moments_kernel<kSumChannels>, dim3(1, ceil_div(co, kSumChannels)), room_for(3), queue, m);
  }
  template <int V>
  void normalize(T* out) const {
    ReLUConvBNAffine<T> p{norms, pixels, y(), out};
    int64_t items = ceil_div<int64_t>(int64_t(pixels) * std::min(co, kChannels), V * kThreads);
    int shared = 3 * kChannels * int(sizeof(Acc<T>));
    launch(relu_conv_bn_affine_kernel<T, V>, channel_grid(std::min<int64_t>(items, kMaxParts)), shared, queue, p);
  }
  void forward(T* out) const {
    int half = co / passes;
    if constexpr (sizeof(T) == 2) {
      if (tensor_cores(ci, half))
        half > kFewColumns ? convolve<true, kManyColumns>() : convolve<true, kFewColumns>();
      else
        convolve<false, kManyColumns>();
    } else {
      convolve<false, kManyColumns>();
    }
    wide_y() ? normalize<kWide<T>>(out) : normalize<1>(out);
  }

  template <int V>
  void sum(const T* g, const NormOutputs<T>& outputs) const {
    ReLUConvBNSums<T> p{norms, pixels, std::max(128, ceil_div(pixels, kMaxSums)), g, y(), nullptr};
    int blocks = ceil_div(pixels, p.chunk);
    p.partial = take<double>(int64_t(2) * blocks * co);
    launch(relu_conv_bn_sums_kernel<T, V>, channel_grid(blocks), 2 * kThreads * V * int(sizeof(Acc<T>)), queue, p);
    NormGradients<T> f{outputs, p.partial, blocks, {}};
    launch(norm_gradients_kernel<T>, dim3(1, ceil_div(co, kSumChannels)), room_for(2), queue, f);
  }
  template <bool TensorCores>
  void spread(const T* g, const Acc<T>* coefficients, T* grad_x) const {
    ReLUConvBNBackward<T> p{};
    lay_out(p);
    p.shape = shape<TensorCores, kFewColumns>(co / passes, ci, false);
    p.wide_y = wide_y(g), p.g = g, p.y = y(), p.coefficients = coefficients, p.grad_x = grad_x;
    launch(relu_conv_bn_backward_kernel<T, TensorCores>, dim3(ceil_div(pixels, p.shape.pixels)),
           ProductShared<T, TensorCores>(p.shape).bytes, queue, p);
  }
  void backward(const T* g, T* grad_x, Acc<T>* grad_gamma, Acc<T>* grad_beta) const {
    Acc<T>* coefficients = take<Acc<T>>(int64_t(4) * co);
    NormOutputs<T> outputs{norms, double(pixels), a.training, grad_gamma, grad_beta, coefficients};
    wide_y(g) ? sum<kWide<T>>(g, outputs) : sum<1>(g, outputs);
    if (!grad_x) return;
    if constexpr (sizeof(T) == 2)
      tensor_cores(co / passes, ci) ? spread<true>(g, coefficients, grad_x) : spread<false>(g, coefficients, grad_x);
    else
      spread<false>(g, coefficients, grad_x);
  }
};

void check_size(const ReLUConvBN& a) {
  // threads without a pixel have the number 2^30
  if (a.images * a.oh() * a.ow() >= 1 << 30)
    throw std::invalid_argument("x: more pixels than the CUDA kernels have numbers for");
}
}  // namespace

void relu_conv_bn_forward(Storage storage, const ReLUConvBN& a, void* out, void* stream, const Allocate& allocate) {
  check_size(a);
  Queue queue(stream);
  with_storage(storage, [&]<class T>() {
    ReLUConvBNPass<T>{a, queue, allocate}.forward(static_cast<T*>(out));
  });
}
void relu_conv_bn_backward(Storage storage, const ReLUConvBN& a, const void* g, void* grad_x, void* grad_gamma,
                        void* grad_beta, void* stream, const Allocate& allocate) {
  check_size(a);
  Queue queue(stream);
  with_storage(storage, [&]<class T>() {
    auto parameters = [](void* p) { return static_cast<Acc<T>*>(p); };
    ReLUConvBNPass<T>{a, queue, allocate}.backward(static_cast<const T*>(g), static_cast<T*>(grad_x),
                                                   parameters(grad_gamma), parameters(grad_beta));
  });
}

}  // namespace rfdarts::cuda
