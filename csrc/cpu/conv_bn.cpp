#include "rfdarts/conv_bn.h"

#include <algorithm>

#include "cell_parts.h"

namespace rfdarts {
namespace {

// room for one thread's strips of rows
template <class T>
int64_t strip_room(const ConvNorm<T>& a) {
  int64_t room = 0;
  for (const auto& part : a.parts) room += 3 * part.co + a.wide() + 64;
  return room + (a.co() + 2 * a.wide()) * (a.ow() + 1) + 32768;
}

// offsets of the parts' channels among all of them
template <class T>
std::vector<int64_t> offsets(const ConvNorm<T>& a) {
  std::vector<int64_t> at;
  for (int64_t sum = 0; const auto& part : a.parts) at.push_back(sum), sum += part.co;
  return at;
}

}  // namespace

template <class T>
void conv_norm_forward(const ConvNorm<T>& a, const Parallel& parallel) {
  Timed timed(kPreprocess);
  const auto& k = kernels<T, T>();
  int64_t pixels = a.oh() * a.ow(), parts = a.parts.size();
  std::vector<Moments> moments;
  std::vector<double> room(Moments::size(a.images, 1, a.co()));
  auto at = offsets(a);
  for (int64_t i = 0; i < parts; i++)
    moments.push_back({1, a.parts[i].co, room.data() + Moments::size(a.images, 1, at[i])});
  parallel(a.images, [&](Images& images) {
    Scratch room;
    T* scratch = room.take<T>(strip_room(a));
    std::vector<Conv1x1<T>> convs(parts);
    Queue queue;
    images.each([&](int64_t n, int64_t next) {
      queue.clear();
      if (next >= 0) queue.add(a.x[next].data, a.image_bytes());
      Ahead ahead = queue.over(a.work());
      for (int64_t i = 0; i < parts; i++) {
        const auto& part = a.parts[i];
        convs[i] = {part.co, part.weights, part.y + n * pixels * part.co, moments[i].mean_of(n, 0),
                    moments[i].deviation_of(n, 0)};
      }
      k.conv1x1_forward(a.x[n], a.oh(), a.ow(), a.ci, a.reduce, parts, convs.data(), scratch, ahead);
    });
  });
  std::vector<Coefficients<T>> affine;
  for (int64_t i = 0; i < parts; i++) {
    const auto& part = a.parts[i];
    if (a.training) moments[i].merge(0, a.images, pixels, part.moments, part.moments + part.co);
    Coefficients<T>& to = affine.emplace_back(2, part.co, k.repeat(part.co));
    for (int64_t c = 0; c < part.co; c++) {
      double scale = part.gamma[c] / std::sqrt(part.moments[part.co + c] + a.eps);
      to.set(0, c, scale);
      to.set(1, c, part.beta[c] - part.moments[c] * scale);
    }
  }
  bool bypass_cache = a.images * pixels * a.co() * int64_t(sizeof(T)) > kBypassCache;
  parallel(a.images, [&](Images& images) {
    images.each([&](int64_t n, int64_t) {
      for (int64_t i = 0; i < parts; i++) {
        const auto& part = a.parts[i];
        int64_t size = pixels * part.co;
        k.affine(part.y + n * size, affine[i].row(0), affine[i].row(1), size, k.repeat(part.co), bypass_cache,
                 part.out + n * size);
      }
    });
  });
}

template <class T>
void conv_norm_backward(const ConvNorm<T>& a, const std::vector<ConvNormGradients<T>>& grads, T* dx,
                        const Parallel& parallel) {
  Timed timed(kPreprocessBackward);
  const auto& k = kernels<T, T>();
  int64_t pixels = a.oh() * a.ow(), parts = a.parts.size(), co = a.co();
  auto at = offsets(a);
  std::vector<Coefficients<T>> means, coefs;
  for (const auto& part : a.parts) {
    means.emplace_back(1, part.co, k.repeat(part.co));
    for (int64_t c = 0; c < part.co; c++) means.back().set(0, c, part.moments[c]);
  }
  // per image: sums of g, then of g (y - mean)
  std::vector<double> partials(a.images * 2 * co);
  parallel(a.images, [&](Images& images) {
    Scratch room;
    T* scratch = room.take<T>(4 * (co + 16));
    images.each([&](int64_t n, int64_t) {
      double* sums = partials.data() + n * 2 * co;
      for (int64_t i = 0; i < parts; i++) {
        int64_t size = pixels * a.parts[i].co;
        const T* y = a.parts[i].y + n * size;
        k.dot_states(grads[i].g + n * size, 1, &y, means[i].row(0), sums + co + at[i], sums + at[i], size,
                     a.parts[i].co, scratch);
      }
    });
  });
  double m = double(a.images * pixels);
  for (int64_t i = 0; i < parts; i++) {
    const auto& part = a.parts[i];
    Coefficients<T>& coef = coefs.emplace_back(4, part.co, k.repeat(part.co));
    for (int64_t c = 0; c < part.co; c++) {
      double sum = 0, dot = 0;
      for (int64_t n = 0; n < a.images; n++) {
        sum += partials[n * 2 * co + at[i] + c];
        dot += partials[(n * 2 + 1) * co + at[i] + c];
      }
      double rstd = 1 / std::sqrt(part.moments[part.co + c] + a.eps), slope = part.gamma[c] * rstd;
      grads[i].gamma[c] = T(dot * rstd);
      grads[i].beta[c] = T(sum);
      coef.set(0, c, slope);
      coef.set(1, c, a.training ? -slope * dot * rstd * rstd / m : 0);
      coef.set(2, c, part.moments[c]);
      coef.set(3, c, a.training ? -slope * sum / m : 0);
    }
  }
  if (!dx) return;
  // all parts in one product
  std::vector<T> transposed;
  for (const auto& part : a.parts) {
    const T* from = part.weights + a.wide() * part.co;
    transposed.insert(transposed.end(), from, from + a.wide() * part.co);
  }
  parallel(a.images, [&](Images& images) {
    Scratch room;
    T* scratch = room.take<T>(strip_room(a));
    std::vector<NormBackward<T>> norms(parts);
    Queue queue;
    images.each([&](int64_t n, int64_t next) {
      queue.clear();
      for (int64_t i = 0; i < parts; i++) {
        int64_t co = a.parts[i].co, size = pixels * co;
        const T *g = grads[i].g, *y = a.parts[i].y;
        norms[i] = {co, g + n * size, y + n * size, coefs[i].row(0)};
        if (next < 0) continue;
        queue.add(g + next * size, size * sizeof(T));
        queue.add(y + next * size, size * sizeof(T));
      }
      if (next >= 0) queue.add(a.x[next].data, a.image_bytes());
      Ahead ahead = queue.over(a.work());
      k.conv1x1_backward(a.x[n], a.oh(), a.ow(), a.ci, a.reduce, parts, norms.data(), transposed.data(),
                         dx + n * a.h * a.w * a.ci, scratch, ahead);
    });
  });
}

template void conv_norm_forward(const ConvNorm<float>&, const Parallel&);
template void conv_norm_forward(const ConvNorm<double>&, const Parallel&);
template void conv_norm_backward(const ConvNorm<float>&, const std::vector<ConvNormGradients<float>>&, float*,
                                 const Parallel&);
template void conv_norm_backward(const ConvNorm<double>&, const std::vector<ConvNormGradients<double>>&, double*,
                                 const Parallel&);
}  // namespace rfdarts
