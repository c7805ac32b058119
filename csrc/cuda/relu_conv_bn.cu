// ReLU, frozen 1x1 convolutions, BatchNorms of layers that read one state as sequences of launches: forward three,
// backward three.
#include <numeric>

#include "cuda/cell_context.h"
#include "cuda/relu_conv_bn_backward.h"

namespace rfdarts::cuda {
namespace {

// Blocks of a layer: enough to fill a device, few where their statistics or sums are merged.
constexpr int kMaxParts = 2048, kMaxSums = 512;
// Weights are loaded once for all of a block's tiles where they take no more than this.
constexpr int kWeightsGoal = 40 << 10;

template <class T>
struct ReLUConvBNPass {
  const ReLUConvBN& a;
  const Queue& queue;
  const Allocate& allocate;
  ReLUConvBNLayers<T> p{};
  // channels of the widest layer; columns of the widest, of all, and what divides those of each
  int co = 0, columns = 0, all = 0, unit = 0;

  ReLUConvBNPass(const ReLUConvBN& a, const Queue& queue, const Allocate& allocate)
      : a(a), queue(queue), allocate(allocate) {
    // threads without a pixel have the number 2^30
    if (a.images * a.oh() * a.ow() >= 1 << 30)
      throw std::invalid_argument("x: more pixels than the CUDA kernels have numbers for");
    p.x = view<T>(a.x);
    p.oh = int(a.oh()), p.ow = int(a.ow()), p.pixels = int(a.images) * p.oh * p.ow;
    p.ci = int(a.ci), p.passes = a.reduce ? 2 : 1;
    auto params = [](const void* q) { return static_cast<const Acc<T>*>(q); };
    bool aligned_y = true;
    for (const auto& l : a.layers) {
      int c = int(l.co), of_pass = c / p.passes;
      Norms<T> norms{params(l.gamma), params(l.beta), l.moments, l.moments + c, Acc<T>(a.eps), c};
      p.layer[p.layers++] = {params(l.conv_weights), norms, static_cast<T*>(l.y), static_cast<T*>(l.output),
                             static_cast<const T*>(l.g)};
      co = std::max(co, c), columns = std::max(columns, of_pass), unit = std::gcd(unit, of_pass);
      // as they lie in shared memory
      all += round_up(of_pass, 4);
      // fresh memory is aligned, gradients may not be
      aligned_y = aligned_y && reinterpret_cast<uintptr_t>(l.g) % 16 == 0;
    }
    p.wide = p.ci % kWide<T> == 0 && aligned(p.x, kWide<T>), p.wide_y = unit % kWide<T> == 0 && aligned_y;
  }

  template <class U>
  U* take(int64_t count) const {
    return static_cast<U*>(allocate(count * int64_t(sizeof(U))));
  }
  void take_partial(int blocks) {
    for (int i = 0; i < p.layers; i++) p.layer[i].partial = take<double>(int64_t(2) * blocks * p.layer[i].norms.c);
  }
  template <bool Moments, class U>
  void over_processes(const std::vector<Means<U>>& means) const {
    merge_over_processes<Moments>(a.processes, a.images, a.oh() * a.ow(), means, queue, allocate);
  }
  dim3 grid(int64_t blocks, int groups) const { return dim3(p.layers, unsigned(blocks), groups); }
  // k inputs, columns in multiples of n
  bool tensor_cores(int k, int n) const { return sizeof(T) == 2 && k % 16 == 0 && n % 8 == 0; }
  template <bool TensorCores>
  static int bytes(const ProductShape& s) {
    return ProductShared<T, TensorCores>(s).bytes;
  }

  // `most` columns from k inputs
  template <bool TensorCores, int Columns>
  ProductShape shape(int k, int most, bool all_weights) const {
    using P = Product<T, TensorCores, Columns>;
    most = round_up(std::min(most, Columns), P::kGroup);
    int ck = std::min(k, P::kChunk);
    ProductShape s{P::pixels(most), most, ck, ck};
    // whole chunks, or all
    if (all_weights && int64_t(k) * most * int(sizeof(typename P::Factor)) <= kWeightsGoal) s.wk = k;
    auto fits = [&] { return bytes<TensorCores>(s) <= queue.limit; };
    if (!fits()) s.wk = ck;
    // a warp of tensor cores has its 16 pixels
    while (!TensorCores && !fits() && s.pixels > 16) s.pixels /= 2;
    return s;
  }

  template <bool TensorCores, int Columns>
  void convolve() {
    ProductShape s = shape<TensorCores, Columns>(p.ci, columns, true);
    int tiles = ceil_div(p.pixels, s.pixels), rounds = ceil_div(tiles, kMaxParts), blocks = ceil_div(tiles, rounds);
    if (a.training) take_partial(blocks);
    launch(relu_conv_bn_forward_kernel<T, TensorCores, Columns>, grid(blocks, p.passes * ceil_div(columns, Columns)),
           bytes<TensorCores>(s), queue, ReLUConvBNForward<T>{p, s, rounds});
    if (!a.training) return;
    // all pixels as one row, a block's as one tile
    MergeMoments m{Tiling(1, rounds * s.pixels, 0, 1, 1, p.pixels), 1, 1, p.pixels, p.layers, {}};
    for (int i = 0; i < p.layers; i++)
      m.target[i] = {p.layer[i].partial, a.layers[i].moments, p.layer[i].norms.c, 1};
    launch(merge_moments_kernel<kSumChannels>, dim3(p.layers, ceil_div(co, kSumChannels)), room_for(3), queue, m);
    std::vector<Means<double>> own;
    for (const auto& l : a.layers) own.push_back({l.moments, l.moments + l.co, int(l.co)});
    over_processes<true>(own);
  }
  template <int V>
  void normalize() const {
    int64_t items = ceil_div<int64_t>(int64_t(p.pixels) * std::min(co, kChannels), V * kThreads);
    int shared = 3 * kChannels * int(sizeof(Acc<T>));
    launch(relu_conv_bn_affine_kernel<T, V>, grid(std::min<int64_t>(items, kMaxParts), ceil_div(co, kChannels)),
           shared, queue, ReLUConvBNAffine<T>{p});
  }
  void forward() {
    if constexpr (sizeof(T) == 2) {
      if (tensor_cores(p.ci, unit))
        columns > kFewColumns ? convolve<true, kManyColumns>() : convolve<true, kFewColumns>();
      else
        convolve<false, kManyColumns>();
    } else {
      convolve<false, kManyColumns>();
    }
    p.wide_y ? normalize<kWide<T>>() : normalize<1>();
  }

  template <int V>
  void sum() {
    int chunk = std::max(128, ceil_div(p.pixels, kMaxSums)), blocks = ceil_div(p.pixels, chunk);
    take_partial(blocks);
    NormGradients<T> f{blocks, {}};
    std::vector<Means<Acc<T>>> slopes_and_shifts;
    auto params = [](void* q) { return static_cast<Acc<T>*>(q); };
    for (int i = 0; i < p.layers; i++) {
      auto& layer = p.layer[i];
      Acc<T>* coefficients = take<Acc<T>>(int64_t(4) * layer.norms.c);
      layer.coefficients = coefficients;
      int c = layer.norms.c;
      slopes_and_shifts.push_back({coefficients + c, coefficients + 3 * c, c});
      f.of[i] = {{layer.norms, double(p.pixels), a.training, params(a.layers[i].grad_gamma),
                  params(a.layers[i].grad_beta), coefficients}, 0, layer.partial};
    }
    launch(relu_conv_bn_sums_kernel<T, V>, grid(blocks, ceil_div(co, kChannels)),
           2 * kThreads * V * int(sizeof(Acc<T>)), queue, ReLUConvBNSums<T>{p, chunk});
    launch(norm_gradients_kernel<T>, dim3(p.layers, ceil_div(co, kSumChannels)), room_for(2), queue, f);
    if (a.training) over_processes<false>(slopes_and_shifts);
  }
  template <bool TensorCores>
  void spread() const {
    ProductShape s = shape<TensorCores, kFewColumns>(columns, p.ci, false), whole{s.pixels, s.columns, all, s.wk};
    // where that leaves room for as many blocks as there are registers for
    int goal = std::min(queue.limit, 2 * queue.goal / kProductBlocks<T>);
    bool stay = bytes<TensorCores>(whole) <= std::max(bytes<TensorCores>(s), goal);
    if (stay) s = whole;
    launch(relu_conv_bn_backward_kernel<T, TensorCores>, dim3(ceil_div(p.pixels, s.pixels)), bytes<TensorCores>(s),
           queue, ReLUConvBNBackward<T>{p, s, stay, static_cast<T*>(a.grad_x)});
  }
  void backward() {
    p.wide_y ? sum<kWide<T>>() : sum<1>();
    if (!a.grad_x) return;
    if constexpr (sizeof(T) == 2)
      tensor_cores(unit, p.ci) ? spread<true>() : spread<false>();
    else
      spread<false>();
  }
};
}  // namespace

void relu_conv_bn_forward(Storage storage, const ReLUConvBN& a, void* stream, const Allocate& allocate) {
  Queue queue(stream);
  with_storage(storage, [&]<class T>() { ReLUConvBNPass<T>(a, queue, allocate).forward(); });
}
void relu_conv_bn_backward(Storage storage, const ReLUConvBN& a, void* stream, const Allocate& allocate) {
  Queue queue(stream);
  with_storage(storage, [&]<class T>() { ReLUConvBNPass<T>(a, queue, allocate).backward(); });
}

}  // namespace rfdarts::cuda
