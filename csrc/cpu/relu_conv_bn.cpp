#include "cpu/relu_conv_bn.h"

#include <algorithm>

#include "cpu/cell_context.h"

namespace rfdarts {
namespace {

// room for one thread's strips of rows
template <class T>
int64_t strip_room(const ReLUConvBN<T>& a) {
  int64_t room = 0;
  for (const auto& layer : a.layers) room += 3 * layer.co + a.wide() + 64;
  return room + (a.co() + 2 * a.wide()) * (a.ow() + 1) + 32768;
}

// offsets of the layers' channels among all of them
template <class T>
std::vector<int64_t> offsets(const ReLUConvBN<T>& a) {
  std::vector<int64_t> at;
  for (int64_t sum = 0; const auto& layer : a.layers) at.push_back(sum), sum += layer.co;
  return at;
}

}  // namespace

template <class T>
void relu_conv_bn_forward(const ReLUConvBN<T>& a, const Parallel& parallel) {
  const auto& k = kernels<T, T>();
  int64_t pixels = a.oh() * a.ow(), layers = a.layers.size();
  std::vector<Moments> moments;
  std::vector<double> room(Moments::size(a.images, 1, a.co()));
  auto at = offsets(a);
  for (int64_t i = 0; i < layers; i++)
    moments.push_back({1, a.layers[i].co, room.data() + Moments::size(a.images, 1, at[i])});
  parallel(a.images, [&](ImageQueue& images) {
    Scratch room;
    T* scratch = room.take<T>(strip_room(a));
    std::vector<Conv1x1<T>> convs(layers);
    Queue queue;
    images.each([&](int64_t n, int64_t next) {
      queue.clear();
      if (next >= 0) queue.add(a.x[next].data, a.image_bytes());
      Ahead ahead = queue.over(a.work());
      for (int64_t i = 0; i < layers; i++) {
        const auto& layer = a.layers[i];
        convs[i] = {layer.co, layer.conv_weights, layer.y + n * pixels * layer.co, moments[i].mean_of(n, 0),
                    moments[i].deviation_of(n, 0)};
      }
      k.conv1x1_forward(a.x[n], a.oh(), a.ow(), a.ci, a.reduce, layers, convs.data(), scratch, ahead);
    });
  });
  std::vector<Coefficients<T>> affine;
  for (int64_t i = 0; i < layers; i++) {
    const auto& layer = a.layers[i];
    if (a.training) moments[i].merge(0, a.images, pixels, layer.moments, layer.moments + layer.co);
    Coefficients<T>& to = affine.emplace_back(2, layer.co, k.repeat(layer.co));
    for (int64_t c = 0; c < layer.co; c++) {
      double scale = layer.gamma[c] / std::sqrt(layer.moments[layer.co + c] + a.eps);
      to.set(0, c, scale);
      to.set(1, c, layer.beta[c] - layer.moments[c] * scale);
    }
  }
  bool bypass_cache = a.images * pixels * a.co() * int64_t(sizeof(T)) > kBypassCache;
  parallel(a.images, [&](ImageQueue& images) {
    images.each([&](int64_t n, int64_t) {
      for (int64_t i = 0; i < layers; i++) {
        const auto& layer = a.layers[i];
        int64_t size = pixels * layer.co;
        k.affine(layer.y + n * size, affine[i].row(0), affine[i].row(1), size, k.repeat(layer.co), bypass_cache,
                 layer.output + n * size);
      }
    });
  });
}

template <class T>
void relu_conv_bn_backward(const ReLUConvBN<T>& a, const std::vector<ReLUConvBNGradients<T>>& grads, T* grad_x,
                        const Parallel& parallel) {
  const auto& k = kernels<T, T>();
  int64_t pixels = a.oh() * a.ow(), layers = a.layers.size(), co = a.co();
  auto at = offsets(a);
  std::vector<Coefficients<T>> means, coefs;
  for (const auto& layer : a.layers) {
    means.emplace_back(1, layer.co, k.repeat(layer.co));
    for (int64_t c = 0; c < layer.co; c++) means.back().set(0, c, layer.moments[c]);
  }
  // per image: sums of g, then of g (y - mean)
  std::vector<double> partials(a.images * 2 * co);
  parallel(a.images, [&](ImageQueue& images) {
    Scratch room;
    T* scratch = room.take<T>(4 * (co + 16));
    images.each([&](int64_t n, int64_t) {
      double* sums = partials.data() + n * 2 * co;
      for (int64_t i = 0; i < layers; i++) {
        int64_t size = pixels * a.layers[i].co;
        const T* y = a.layers[i].y + n * size;
        k.dot_states(grads[i].g + n * size, 1, &y, means[i].row(0), sums + co + at[i], sums + at[i], size,
                     a.layers[i].co, scratch);
      }
    });
  });
  double m = double(a.images * pixels);
  for (int64_t i = 0; i < layers; i++) {
    const auto& layer = a.layers[i];
    Coefficients<T>& coef = coefs.emplace_back(4, layer.co, k.repeat(layer.co));
    for (int64_t c = 0; c < layer.co; c++) {
      double sum = 0, dot = 0;
      for (int64_t n = 0; n < a.images; n++) {
        sum += partials[n * 2 * co + at[i] + c];
        dot += partials[(n * 2 + 1) * co + at[i] + c];
      }
      double rstd = 1 / std::sqrt(layer.moments[layer.co + c] + a.eps), slope = layer.gamma[c] * rstd;
      grads[i].gamma[c] = T(dot * rstd);
      grads[i].beta[c] = T(sum);
      coef.set(0, c, slope);
      coef.set(1, c, a.training ? -slope * dot * rstd * rstd / m : 0);
      coef.set(2, c, layer.moments[c]);
      coef.set(3, c, a.training ? -slope * sum / m : 0);
    }
  }
  if (!grad_x) return;
  // all layers in one product
  std::vector<T> transposed;
  for (const auto& layer : a.layers) {
    const T* from = layer.conv_weights + a.wide() * layer.co;
    transposed.insert(transposed.end(), from, from + a.wide() * layer.co);
  }
  parallel(a.images, [&](ImageQueue& images) {
    Scratch room;
    T* scratch = room.take<T>(strip_room(a));
    std::vector<NormBackward<T>> norms(layers);
    Queue queue;
    images.each([&](int64_t n, int64_t next) {
      queue.clear();
      for (int64_t i = 0; i < layers; i++) {
        int64_t co = a.layers[i].co, size = pixels * co;
        const T *g = grads[i].g, *y = a.layers[i].y;
        norms[i] = {co, g + n * size, y + n * size, coefs[i].row(0)};
        if (next < 0) continue;
        queue.add(g + next * size, size * sizeof(T));
        queue.add(y + next * size, size * sizeof(T));
      }
      if (next >= 0) queue.add(a.x[next].data, a.image_bytes());
      Ahead ahead = queue.over(a.work());
      k.conv1x1_backward(a.x[n], a.oh(), a.ow(), a.ci, a.reduce, layers, norms.data(), transposed.data(),
                         grad_x + n * a.h * a.w * a.ci, scratch, ahead);
    });
  });
}

template void relu_conv_bn_forward(const ReLUConvBN<float>&, const Parallel&);
template void relu_conv_bn_forward(const ReLUConvBN<double>&, const Parallel&);
template void relu_conv_bn_backward(const ReLUConvBN<float>&, const std::vector<ReLUConvBNGradients<float>>&, float*,
                                 const Parallel&);
template void relu_conv_bn_backward(const ReLUConvBN<double>&, const std::vector<ReLUConvBNGradients<double>>&, double*,
                                 const Parallel&);
}  // namespace rfdarts
