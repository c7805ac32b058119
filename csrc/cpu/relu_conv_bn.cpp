// ReLU, frozen 1x1 convolutions, BatchNorms of layers that read one state.
#include "cpu/cell.h"
#include "cpu/fetch_queue.h"
#include "cpu/per_channel.h"
#include "cpu/scratch.h"

namespace rfdarts {
namespace {

template <class T>
struct Layers {
  struct Layer {
    int64_t co;
    const T *conv_weights, *gamma, *beta, *g;
    T *y, *output, *grad_gamma, *grad_beta;
    double* moments;
    int64_t first;          // of its channels among those of all layers
    Coefficients<T> rows;   // of the pass that comes next
    Norm<T> norm(double eps) const { return {co, gamma, beta, moments, eps}; }
  };
  const ReLUConvBN& a;
  const Parallel& parallel;
  const Kernels<T, T>& k = a.bfloat16_products ? kernels_of_products<T, T>() : kernels<T, T>();
  std::vector<Layer> layers;
  BatchView<T> x{a.x};
  int64_t pixels = a.oh() * a.ow(), co = 0;
  // values of a channel behind its statistics
  double count = double((a.processes.sum ? a.processes.images : a.images) * pixels);
  // bytes of an image of x, and multiply-adds of 16 lanes that it costs
  int64_t image_bytes = a.h * x.row * int64_t(sizeof(T)), work;

  Layers(const ReLUConvBN& a, const Parallel& parallel) : a(a), parallel(parallel) {
    auto in = [](const void* p) { return static_cast<const T*>(p); };
    auto out = [](void* p) { return static_cast<T*>(p); };
    for (const auto& l : a.layers) {
      layers.push_back({l.co, in(l.conv_weights), in(l.gamma), in(l.beta), in(l.g), out(l.y), out(l.output),
                        out(l.grad_gamma), out(l.grad_beta), l.moments, co, {}});
      co += l.co;
    }
    work = pixels * co / 16 * a.ci;
  }

  // y of all layers, and its statistics in training mode
  void convolve() {
    std::vector<double> room(ImageMoments::size(a.images, 1, co));
    auto moments = [&](const Layer& l) {
      return ImageMoments{1, l.co, room.data() + ImageMoments::size(a.images, 1, l.first)};
    };
    int64_t scratch_size = ScratchSize<T>::conv1x1_forward(a.ow(), a.ci, layers.size(), co);
    parallel(a.images, [&](ImageQueue& images) {
      Scratch room;
      T* scratch = room.take<T>(scratch_size);
      std::vector<Conv1x1<T, T>> convs;
      FetchQueue queue;
      images.each([&](int64_t n, int64_t next) {
        queue.clear(), convs.clear();
        if (next >= 0) queue.add(x[next].data, image_bytes);
        Ahead ahead = queue.over(work);
        for (const Layer& l : layers)
          convs.push_back({l.co, l.conv_weights,
                           {l.y + n * pixels * l.co, moments(l).mean_of(n, 0), moments(l).deviation_of(n, 0)}});
        k.conv1x1_forward(x[n], a.oh(), a.ow(), a.ci, a.reduce, convs.size(), convs.data(), scratch, ahead);
      });
    });
    if (!a.training) return;
    for (const Layer& l : layers) moments(l).merge(0, a.images, pixels, l.moments, l.moments + l.co);
    merge_over_processes();
  }

  void merge_over_processes() const {
    std::vector<Moments> own;
    for (const Layer& l : layers) own.push_back({l.moments, l.moments + l.co, l.co});
    rfdarts::merge_over_processes(a.processes.sum, double(a.images * pixels), count, own);
  }

  void normalize() {
    for (Layer& l : layers) l.rows = l.norm(a.eps).affine(k.period(l.co));
    bool bypass_cache = a.images * pixels * co * int64_t(sizeof(T)) > kBypassCache;
    parallel(a.images, [&](ImageQueue& images) {
      images.each([&](int64_t n, int64_t) {
        for (const Layer& l : layers) {
          int64_t count = pixels * l.co;
          k.affine(l.y + n * count, l.rows.row(0), l.rows.row(1), count, k.period(l.co), bypass_cache,
                   false, l.output + n * count);
        }
      });
    });
  }

  // per image [2][co]: sums of g, then of g (y - mean)
  std::vector<double> norm_sums() {
    int64_t widest = 0;
    for (Layer& l : layers) {
      widest = std::max(widest, l.co);
      l.rows = l.norm(a.eps).affine(k.period(l.co));
    }
    std::vector<double> partials(a.images * 2 * co);
    parallel(a.images, [&](ImageQueue& images) {
      Scratch room;
      T* scratch = room.take<T>(ScratchSize<T>::sums(widest));
      images.each([&](int64_t n, int64_t) {
        for (const Layer& l : layers) {
          int64_t count = pixels * l.co;
          const T* y = l.y + n * count;
          double* g_sum = partials.data() + n * 2 * co + l.first;
          k.dot_states(l.g + n * count, 1, &y, l.rows.row(2), g_sum + co, g_sum, count, l.co, scratch);
        }
      });
    });
    return partials;
  }

  // the gradients of gamma and beta, and NormBackward::coefficients
  void norm_backward() {
    std::vector<double> partials = norm_sums(), own(2 * co, 0.0);
    for (int64_t n = 0; n < a.images; n++)
      for (int64_t v = 0; v < 2 * co; v++) own[v] += partials[n * 2 * co + v];
    std::vector<double> all = own;
    if (a.training && a.processes.sum) a.processes.sum(all.data(), all.size());
    for (Layer& l : layers) {
      Norm<T> norm = l.norm(a.eps);
      norm.gradients(own.data() + l.first, own.data() + co + l.first, l.grad_gamma, l.grad_beta);
      const double* sums = a.training ? all.data() + l.first : nullptr;
      l.rows = norm.backward(k.period(l.co), sums, sums ? sums + co : nullptr, count);
    }
  }

  // of all layers, in one product
  void input_backward() {
    std::vector<T> transposed;
    // a row of pairs has two inputs
    int parts = a.reduce ? 2 : 1, depth = a.bfloat16_products ? 2 : 1;
    for (int part = 0; part < parts; part++)
      for (const Layer& l : layers) {
        Channels some = part_of(l.co, part, parts);
        const T* from = l.conv_weights + (l.co + some.first / depth) * a.ci;
        transposed.insert(transposed.end(), from, from + some.count / depth * a.ci);
      }
    T* grad_x = static_cast<T*>(a.grad_x);
    parallel(a.images, [&](ImageQueue& images) {
      Scratch room;
      T* scratch = room.take<T>(ScratchSize<T>::conv1x1_backward(a.ow(), a.ci, co));
      std::vector<Conv1x1Backward<T>> convs;
      FetchQueue queue;
      images.each([&](int64_t n, int64_t next) {
        queue.clear(), convs.clear();
        for (const Layer& l : layers) {
          int64_t count = pixels * l.co;
          convs.push_back({l.co, {l.g + n * count, l.y + n * count, l.rows.row(0)}});
          if (next < 0) continue;
          queue.add(l.g + next * count, count * sizeof(T));
          queue.add(l.y + next * count, count * sizeof(T));
        }
        if (next >= 0) queue.add(x[next].data, image_bytes);
        Ahead ahead = queue.over(work);
        k.conv1x1_backward(x[n], a.oh(), a.ow(), a.ci, a.reduce, convs.size(), convs.data(), transposed.data(),
                           grad_x + n * a.h * a.w * a.ci, scratch, ahead);
      });
    });
  }
};
}  // namespace

void cpu::relu_conv_bn_forward(Storage storage, const ReLUConvBN& a, const Parallel& parallel) {
  with_types(storage, [&]<class T, class>() {
    Layers<T> layers(a, parallel);
    layers.convolve();
    layers.normalize();
  });
}
void cpu::relu_conv_bn_backward(Storage storage, const ReLUConvBN& a, const Parallel& parallel) {
  with_types(storage, [&]<class T, class>() {
    Layers<T> layers(a, parallel);
    layers.norm_backward();
    if (a.grad_x) layers.input_backward();
  });
}
}  // namespace rfdarts
