#include "rfdarts/conv_bn.h"

#include <algorithm>

#include "cell_parts.h"

namespace rfdarts {

template <class T>
void conv_norm_forward(const ConvNorm<T>& a, const Parallel& parallel) {
  Timed timed(kPreprocess);
  const auto& k = kernels<T, T>();
  int64_t pixels = a.oh() * a.ow(), size = pixels * a.co, period = k.repeat(a.co);
  std::vector<double> room(Moments::size(a.images, 1, a.co));
  Moments moments{1, a.co, room.data()};
  parallel(a.images, [&](Images& images) {
    Scratch room;
    T* scratch = room.take<T>(3 * a.co + 64 + 2 * a.ci * (a.ow() + 1) + 16384);
    Queue queue;
    images.each([&](int64_t n, int64_t next) {
      queue.clear();
      if (next >= 0) queue.add(a.x[next].data, a.image_bytes());
      Ahead ahead = queue.over(a.work());
      k.conv1x1_forward(a.x[n], a.oh(), a.ow(), a.ci, a.co, a.reduce, a.weights, a.y + n * size,
                        moments.mean_of(n, 0), moments.deviation_of(n, 0), scratch, ahead);
    });
  });
  if (a.training) moments.merge(0, a.images, pixels, a.moments, a.moments + a.co);
  Coefficients<T> affine(2, a.co, period);
  for (int64_t i = 0; i < a.co; i++) {
    double scale = a.gamma[i] / std::sqrt(a.moments[a.co + i] + a.eps);
    affine.set(0, i, scale);
    affine.set(1, i, a.beta[i] - a.moments[i] * scale);
  }
  parallel(a.images, [&](Images& images) {
    images.each([&](int64_t n, int64_t) {
      k.affine(a.y + n * size, affine.row(0), affine.row(1), size, period, a.out + n * size);
    });
  });
}

template <class T>
void conv_norm_backward(const ConvNorm<T>& a, const T* g, T* dx, T* grad_gamma, T* grad_beta,
                        const Parallel& parallel) {
  Timed timed(kPreprocessBackward);
  const auto& k = kernels<T, T>();
  int64_t pixels = a.oh() * a.ow(), size = pixels * a.co, period = k.repeat(a.co);
  Coefficients<T> mean(1, a.co, period), coef(4, a.co, period);
  for (int64_t i = 0; i < a.co; i++) mean.set(0, i, a.moments[i]);
  std::vector<double> partials(a.images * 2 * a.co);
  parallel(a.images, [&](Images& images) {
    Scratch room;
    T* scratch = room.take<T>(4 * period);
    images.each([&](int64_t n, int64_t) {
      const T* y = a.y + n * size;
      double* sums = partials.data() + n * 2 * a.co;
      k.dot_states(g + n * size, 1, &y, mean.row(0), sums + a.co, sums, size, a.co, scratch);
    });
  });
  double m = double(a.images * pixels);
  for (int64_t i = 0; i < a.co; i++) {
    double sum = 0, dot = 0;
    for (int64_t n = 0; n < a.images; n++) {
      sum += partials[n * 2 * a.co + i];
      dot += partials[(n * 2 + 1) * a.co + i];
    }
    double rstd = 1 / std::sqrt(a.moments[a.co + i] + a.eps), slope = a.gamma[i] * rstd;
    grad_gamma[i] = T(dot * rstd);
    grad_beta[i] = T(sum);
    coef.set(0, i, slope);
    coef.set(1, i, a.training ? -slope * dot * rstd * rstd / m : 0);
    coef.set(2, i, a.moments[i]);
    coef.set(3, i, a.training ? -slope * sum / m : 0);
  }
  if (!dx) return;
  parallel(a.images, [&](Images& images) {
    Scratch room;
    T* scratch = room.take<T>((2 * a.ci + a.co) * (a.ow() + 1) + 32768);
    Queue queue;
    images.each([&](int64_t n, int64_t next) {
      queue.clear();
      if (next >= 0) {
        queue.add(g + next * size, size * sizeof(T));
        queue.add(a.y + next * size, size * sizeof(T));
        queue.add(a.x[next].data, a.image_bytes());
      }
      Ahead ahead = queue.over(a.work());
      k.conv1x1_backward(g + n * size, a.y + n * size, coef.row(0), a.x[n], a.oh(), a.ow(), a.ci, a.co, a.reduce,
                         a.weights + (a.reduce ? 2 : 1) * a.ci * a.co, dx + n * a.h * a.w * a.ci, scratch, ahead);
    });
  });
}

template void conv_norm_forward(const ConvNorm<float>&, const Parallel&);
template void conv_norm_forward(const ConvNorm<double>&, const Parallel&);
template void conv_norm_backward(const ConvNorm<float>&, const float*, float*, float*, float*, const Parallel&);
template void conv_norm_backward(const ConvNorm<double>&, const double*, double*, double*, double*, const Parallel&);
}  // namespace rfdarts
