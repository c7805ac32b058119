#include "cpu/relu_conv_bn.h"

#include <cmath>

#include "cpu/fetch_queue.h"
#include "cpu/per_channel.h"
#include "cpu/scratch.h"

namespace rfdarts {
namespace {

// What both directions share.
template <class T>
struct Context {
  const ReLUConvBN<T>& a;
  const Parallel& parallel;
  const Kernels<T, T>& k = kernels<T, T>();
  int64_t pixels = a.oh() * a.ow(), count = a.layers.size(), co = a.co();
  // multiply-adds of 16 lanes that an image costs; bytes of x
  int64_t work = pixels * co / 16 * a.inputs(), image_bytes = a.h * a.x.row * int64_t(sizeof(T));
  // of the layers' channels among all
  std::vector<int64_t> first;

  Context(const ReLUConvBN<T>& a, const Parallel& parallel) : a(a), parallel(parallel) {
    for (int64_t sum = 0; const auto& layer : a.layers) first.push_back(sum), sum += layer.co;
  }
};

// y of all layers, and its statistics in training mode
template <class T>
void convolve(const Context<T>& run) {
  const ReLUConvBN<T>& a = run.a;
  std::vector<double> room(ImageMoments::size(a.images, 1, run.co));
  std::vector<ImageMoments> moments;
  int64_t scratch_size = kMaxLanes + ScratchSize<T>::strip(a.ow() * a.inputs());
  for (int64_t i = 0; i < run.count; i++) {
    moments.push_back({1, a.layers[i].co, room.data() + ImageMoments::size(a.images, 1, run.first[i])});
    scratch_size += ScratchSize<T>::moments(a.inputs(), a.layers[i].co);
  }
  run.parallel(a.images, [&](ImageQueue& images) {
    Scratch room;
    T* scratch = room.take<T>(scratch_size);
    std::vector<Conv1x1<T>> convs(run.count);
    FetchQueue queue;
    images.each([&](int64_t n, int64_t next) {
      queue.clear();
      if (next >= 0) queue.add(a.x[next].data, run.image_bytes);
      Ahead ahead = queue.over(run.work);
      for (int64_t i = 0; i < run.count; i++) {
        const auto& layer = a.layers[i];
        convs[i] = {layer.co, layer.conv_weights,
                    {layer.y + n * run.pixels * layer.co, moments[i].mean_of(n, 0), moments[i].deviation_of(n, 0)}};
      }
      run.k.conv1x1_forward(a.x[n], a.oh(), a.ow(), a.ci, a.reduce, run.count, convs.data(), scratch, ahead);
    });
  });
  for (int64_t i = 0; a.training && i < run.count; i++) {
    double* to = a.layers[i].moments;
    moments[i].merge(0, a.images, run.pixels, to, to + a.layers[i].co);
  }
}

template <class T>
void normalize(const Context<T>& run) {
  const ReLUConvBN<T>& a = run.a;
  std::vector<Coefficients<T>> affine;
  for (const auto& layer : a.layers) {
    Coefficients<T>& rows = affine.emplace_back(2, layer.co, run.k.period(layer.co));
    for (int64_t c = 0; c < layer.co; c++) {
      double scale = layer.gamma[c] / std::sqrt(layer.moments[layer.co + c] + a.eps);
      rows.set(0, c, scale);
      rows.set(1, c, layer.beta[c] - layer.moments[c] * scale);
    }
  }
  bool bypass_cache = a.images * run.pixels * run.co * int64_t(sizeof(T)) > kBypassCache;
  run.parallel(a.images, [&](ImageQueue& images) {
    images.each([&](int64_t n, int64_t) {
      for (int64_t i = 0; i < run.count; i++) {
        const auto& layer = a.layers[i];
        int64_t size = run.pixels * layer.co;
        run.k.affine(layer.y + n * size, affine[i].row(0), affine[i].row(1), size, run.k.period(layer.co),
                     bypass_cache, layer.output + n * size);
      }
    });
  });
}

// the gradients of gamma and beta; returns NormBackward::coefficients of each layer
template <class T>
std::vector<Coefficients<T>> norm_gradients(const Context<T>& run,
                                            const std::vector<ReLUConvBNGradients<T>>& gradients) {
  const ReLUConvBN<T>& a = run.a;
  std::vector<Coefficients<T>> means, coefficients;
  int64_t widest = 0;
  for (const auto& layer : a.layers) {
    means.emplace_back(1, layer.co, run.k.period(layer.co));
    for (int64_t c = 0; c < layer.co; c++) means.back().set(0, c, layer.moments[c]);
    widest = std::max(widest, layer.co);
  }
  // per image: sums of g, then of g (y - mean)
  std::vector<double> partials(a.images * 2 * run.co);
  run.parallel(a.images, [&](ImageQueue& images) {
    Scratch room;
    T* scratch = room.take<T>(ScratchSize<T>::sums(widest));
    images.each([&](int64_t n, int64_t) {
      double* sums = partials.data() + n * 2 * run.co;
      for (int64_t i = 0; i < run.count; i++) {
        int64_t size = run.pixels * a.layers[i].co;
        const T* y = a.layers[i].y + n * size;
        run.k.dot_states(gradients[i].g + n * size, 1, &y, means[i].row(0), sums + run.co + run.first[i],
                         sums + run.first[i], size, a.layers[i].co, scratch);
      }
    });
  });
  double m = double(a.images * run.pixels);
  for (int64_t i = 0; i < run.count; i++) {
    const auto& layer = a.layers[i];
    Coefficients<T>& rows = coefficients.emplace_back(kNormRows, layer.co, run.k.period(layer.co));
    for (int64_t c = 0; c < layer.co; c++) {
      double g_sum = 0, dot = 0;
      for (int64_t n = 0; n < a.images; n++) {
        g_sum += partials[n * 2 * run.co + run.first[i] + c];
        dot += partials[(n * 2 + 1) * run.co + run.first[i] + c];
      }
      double rstd = 1 / std::sqrt(layer.moments[layer.co + c] + a.eps), scale = layer.gamma[c] * rstd;
      gradients[i].grad_gamma[c] = T(dot * rstd);
      gradients[i].grad_beta[c] = T(g_sum);
      rows.set(kScale, c, scale);
      rows.set(kSlope, c, a.training ? -scale * dot * rstd * rstd / m : 0);
      rows.set(kMean, c, layer.moments[c]);
      rows.set(kShift, c, a.training ? -scale * g_sum / m : 0);
    }
  }
  return coefficients;
}

// grad_x of all layers, in one product
template <class T>
void input_gradient(const Context<T>& run, const std::vector<ReLUConvBNGradients<T>>& gradients,
                    const std::vector<Coefficients<T>>& coefficients, T* grad_x) {
  const ReLUConvBN<T>& a = run.a;
  std::vector<T> transposed;
  for (const auto& layer : a.layers) {
    const T* from = layer.conv_weights + a.inputs() * layer.co;
    transposed.insert(transposed.end(), from, from + a.inputs() * layer.co);
  }
  run.parallel(a.images, [&](ImageQueue& images) {
    Scratch room;
    T* scratch = room.take<T>(ScratchSize<T>::conv1x1_backward(a.ow(), a.inputs(), run.co));
    std::vector<Conv1x1Backward<T>> convs(run.count);
    FetchQueue queue;
    images.each([&](int64_t n, int64_t next) {
      queue.clear();
      for (int64_t i = 0; i < run.count; i++) {
        int64_t co = a.layers[i].co, size = run.pixels * co;
        const T *g = gradients[i].g, *y = a.layers[i].y;
        convs[i] = {co, {g + n * size, y + n * size, coefficients[i].row(0)}};
        if (next < 0) continue;
        queue.add(g + next * size, size * sizeof(T));
        queue.add(y + next * size, size * sizeof(T));
      }
      if (next >= 0) queue.add(a.x[next].data, run.image_bytes);
      Ahead ahead = queue.over(run.work);
      run.k.conv1x1_backward(a.x[n], a.oh(), a.ow(), a.ci, a.reduce, run.count, convs.data(), transposed.data(),
                             grad_x + n * a.h * a.w * a.ci, scratch, ahead);
    });
  });
}
}  // namespace

template <class T>
void relu_conv_bn_forward(const ReLUConvBN<T>& a, const Parallel& parallel) {
  Context<T> run(a, parallel);
  convolve(run);
  normalize(run);
}

template <class T>
void relu_conv_bn_backward(const ReLUConvBN<T>& a, const std::vector<ReLUConvBNGradients<T>>& gradients, T* grad_x,
                           const Parallel& parallel) {
  Context<T> run(a, parallel);
  auto coefficients = norm_gradients(run, gradients);
  if (grad_x) input_gradient(run, gradients, coefficients, grad_x);
}

#define RF_RELU_CONV_BN(T)                                                                                        \
  template void relu_conv_bn_forward(const ReLUConvBN<T>&, const Parallel&);                                    \
  template void relu_conv_bn_backward(const ReLUConvBN<T>&, const std::vector<ReLUConvBNGradients<T>>&, T*,     \
                                      const Parallel&);
RF_RELU_CONV_BN(float)
RF_RELU_CONV_BN(double)
}  // namespace rfdarts
