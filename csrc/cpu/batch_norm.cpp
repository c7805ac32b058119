// A BatchNorm by itself, with or without the ReLU behind it: what a stem has beside its convolutions.
#include "cpu/cell.h"
#include "cpu/fetch_queue.h"
#include "cpu/per_channel.h"
#include "cpu/scratch.h"

namespace rfdarts {
namespace {

template <class T>
struct Layer {
  const BatchNorm& a;
  const Parallel& parallel;
  const Kernels<T, T>& k = kernels<T, T>();
  const T *x = static_cast<const T*>(a.x), *g = static_cast<const T*>(a.g);
  Norm<T> norm{a.c, static_cast<const T*>(a.gamma), static_cast<const T*>(a.beta), a.moments, a.eps};
  int64_t size = a.pixels * a.c, period = k.period(a.c);

  void forward() const {
    if (a.training) take_moments();
    Coefficients<T> rows = norm.affine(period);
    bool bypass_cache = a.images * size * int64_t(sizeof(T)) > kBypassCache;
    T* output = static_cast<T*>(a.output);
    parallel(a.images, [&](ImageQueue& images) {
      images.each([&](int64_t n, int64_t) {
        k.affine(x + n * size, rows.row(0), rows.row(1), size, period, bypass_cache, a.relu, output + n * size);
      });
    });
  }

  void take_moments() const {
    std::vector<double> of_images(ImageMoments::size(a.images, 1, a.c));
    ImageMoments moments{1, a.c, of_images.data()};
    parallel(a.images, [&](ImageQueue& images) {
      Scratch room;
      T *shift = room.take<T>(period), *sums = room.take<T>(ScratchSize<T>::sums(a.c));
      images.each([&](int64_t n, int64_t) {
        double *mean = moments.mean_of(n, 0), *deviation = moments.deviation_of(n, 0);
        k.add_moments(x + n * size, a.pixels, a.c, true, shift, mean, deviation, sums);
        k.finish_moments(shift, a.pixels, a.c, mean, deviation);
      });
    });
    moments.merge(0, a.images, a.pixels, a.moments, a.moments + a.c);
  }

  void backward() const {
    // per image [2][c]: sums of g, then of g (x - mean); g is 0 where the ReLU gave 0
    std::vector<double> partials(a.images * 2 * a.c), sums(2 * a.c);
    Coefficients<T> rows = norm.affine(period);
    T* grad_x = static_cast<T*>(a.grad_x);
    parallel(a.images, [&](ImageQueue& images) {
      Scratch room;
      T* scratch = room.take<T>(ScratchSize<T>::sums(a.c));
      T* rectified = a.relu && !grad_x ? room.take<T>(size) : nullptr;
      images.each([&](int64_t n, int64_t) {
        const T *from = g + n * size, *value = x + n * size;
        double* g_sum = partials.data() + n * 2 * a.c;
        if (a.relu)
          k.relu_backward_inner(from, value, rows.row(0), rows.row(1), rows.row(2),
                                grad_x ? grad_x + n * size : rectified, g_sum, g_sum + a.c, size, a.c, scratch);
        else
          k.dot_states(from, 1, &value, rows.row(2), g_sum + a.c, g_sum, size, a.c, scratch);
      });
    });
    for (int64_t n = 0; n < a.images; n++)
      for (int64_t v = 0; v < 2 * a.c; v++) sums[v] += partials[n * 2 * a.c + v];
    norm.gradients(sums.data(), sums.data() + a.c, static_cast<T*>(a.grad_gamma), static_cast<T*>(a.grad_beta));
    if (!grad_x) return;
    const double* all = a.training ? sums.data() : nullptr;
    rows = norm.backward(period, all, all ? all + a.c : nullptr, double(a.images * a.pixels));
    parallel(a.images, [&](ImageQueue& images) {
      images.each([&](int64_t n, int64_t) {
        T* to = grad_x + n * size;
        k.norm_backward({a.relu ? to : g + n * size, x + n * size, rows.row(0)}, size, a.c, to);
      });
    });
  }
};
}  // namespace

void cpu::batch_norm_forward(Storage storage, const BatchNorm& a, const Parallel& parallel) {
  with_types(storage, [&]<class T, class>() { Layer<T>{a, parallel}.forward(); });
}
void cpu::batch_norm_backward(Storage storage, const BatchNorm& a, const Parallel& parallel) {
  with_types(storage, [&]<class T, class>() { Layer<T>{a, parallel}.backward(); });
}
}  // namespace rfdarts
