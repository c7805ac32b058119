// What one image needs: the kernels that a cell is made of, on raw pointers, one table per instruction set.
#pragma once
#include <cstdint>

namespace rfdarts {

struct bf16 {
  uint16_t bits;
};

// One image, NHWC: consecutive channels, any pixel and row stride (in elements).
template <class T>
struct ImageView {
  const T* data;
  int64_t row;
  int64_t pixel;
};

struct Conv {
  int kernel;
  int dilation;
  int stride;
};

// Scratch image with room around it: `origin` is where pixel (0, 0) lies, `rows` is how far apart rows are.
struct Frame {
  int64_t origin;
  int64_t pitch;
  int64_t size;
};

// What will be read soon, fetched into the second-level cache while the convolutions compute: memory and arithmetic
// would otherwise take turns.
struct Ahead {
  // cache lines, `step` bytes apart
  struct Range {
    const char* at;
    int64_t lines, step;
  };
  Range *next = nullptr, *end = nullptr;
  // cache lines per 2^16 multiply-adds of 16 lanes, and what is due: a few at a time, for a burst would hold up the
  // loads that the arithmetic waits for
  int64_t rate = 0, due = 0;
};

// One of several 1x1 convolutions of an image: pw [ci][co], y [oh][ow][co] with its moments.
template <class T>
struct Conv1x1 {
  int64_t co;
  const T* pw;
  T* y;
  double *mean, *deviation;
};
// Its gradient, coef0 g + coef1 (y - coef2) + coef3, coef [4][repeat].
template <class T>
struct NormBackward {
  int64_t co;
  const T *g, *y, *coef;
};

// Per-channel coefficients, repeated until they fill whole vectors: see `repeat`.
// T: arithmetic and states. S: how branch outputs are kept (T, or bf16 beside float).
template <class T, class S>
struct Kernels {
  const char* name;
  // Channels that a coefficient array must hold for C channels.
  int64_t (*repeat)(int64_t c);
  Frame (*frame)(int64_t h, int64_t w, int64_t c, int stride);

  // dst frame = relu(x)
  void (*frame_relu)(ImageView<T> x, int64_t h, int64_t w, int64_t c, Frame f, T* dst);
  // dst frame = relu(scale y + shift); scale, shift repeated
  void (*frame_affine_relu)(const S* y, const T* scale, const T* shift, int64_t h, int64_t w, int64_t c, Frame f,
                            T* dst);

  // y = pointwise(depthwise(x frame)); mean and sum of squared deviations of y per channel.
  void (*conv_forward)(const T* x, Frame f, int64_t h, int64_t w, int64_t c, Conv conv, const T* dw, const T* pw,
                       S* y, bool bypass_cache, double* mean, double* deviation, T* scratch, Ahead& ahead);
  // FactorizedReduce: y = [w1 x(2r, 2q) | w2 x(2r+1, 2q+1)], both as one [2C, C] matrix.
  void (*reduce_forward)(const T* x, Frame f, int64_t h, int64_t w, int64_t c, const T* pw, S* y, double* mean,
                         double* deviation, T* scratch, Ahead& ahead);
  // dense = x without its strides
  void (*pack)(ImageView<T> x, int64_t h, int64_t w, int64_t c, T* dense);
  // `rows` rows of the 3x3 pools of a dense image; scratch of 3 (w + 2) c
  void (*pool_forward)(const T* x, int64_t h, int64_t w, int64_t c, int stride, int64_t first, int64_t rows, T* max,
                       T* avg, T* scratch);
  // Mean and sum of squared deviations, an image's pixels in several calls: the first chooses the shift [repeat] that
  // sums are taken about; sums of 2 repeat
  void (*add_moments)(const T* y, int64_t pixels, int64_t c, bool first, T* shift, double* mean, double* deviation,
                      T* sums);
  void (*finish_moments)(const T* shift, int64_t pixels, int64_t c, double* mean, double* deviation);
  // dx += gradients of both pools; d_avg already divided by its window's size; scratch of 8 (w c + 96)
  void (*pool_backward)(const T* x, const T* d_max, const T* d_avg, int64_t h, int64_t w, int64_t c, int stride, T* dx,
                        T* scratch);

  // dst = (first ? bias : dst) + sum_k coef[k] (src[k] - mean[k]); coef, mean [n][repeat], bias [repeat] or null.
  // Each stream is centred before it is added: all constants at once would be larger than the sum that is left.
  void (*sum_kept)(T* dst, bool first, int n, const S* const* src, const T* coef, const T* mean, const T* bias,
                   int64_t size, int64_t period);
  void (*sum_states)(T* dst, bool first, int n, const T* const* src, const T* coef, const T* mean, const T* bias,
                     int64_t size, int64_t period);
  // out[k][c] += sum g (src[k] - mean[k]); out [n][C], mean [n][repeat]. g_sum[c] += sum g.
  void (*dot_kept)(const T* g, int n, const S* const* src, const T* mean, double* out, int64_t size, int64_t c,
                   T* scratch);
  void (*dot_states)(const T* g, int n, const T* const* src, const T* mean, double* out, double* g_sum,
                     int64_t size, int64_t c, T* scratch);

  // d = coef0 g + coef1 (y - coef2) + coef3, coef [4][repeat]; then dx = depthwise^T(pointwise^T(d)), or
  // dx += it.
  void (*conv_backward)(const T* g, const S* y, const T* coef, int64_t h, int64_t w, int64_t c, Conv conv,
                        const T* dw, const T* pw_t, Frame e_frame, T* e, bool add, T* dx, T* scratch,
                        Ahead& ahead);
  void (*conv_backward_kept)(const S* g, const S* y, const T* coef, int64_t h, int64_t w, int64_t c, Conv conv,
                             const T* dw, const T* pw_t, Frame e_frame, T* e, bool add, T* dx, T* scratch,
                             Ahead& ahead);
  void (*reduce_backward)(const T* g, const S* y, const T* coef, int64_t h, int64_t w, int64_t c, const T* pw_t,
                          T* dx, T* scratch, Ahead& ahead);
  // du = dx where scale y + shift > 0; sums of du and du (y - mean). du may be where y2 was.
  void (*relu_backward_inner)(const T* dx, const S* y, const T* scale, const T* shift, const T* mean, S* du,
                              double* sum, double* dot, int64_t size, int64_t c, T* scratch);
  void (*relu_backward_add)(const T* dx, const T* x, T* rest, int64_t size, int64_t c);
  void (*divide_by_window)(T* d, int64_t h, int64_t w, int64_t c, int stride);

  // One image through ReLU and 1x1 convolutions; see image_1x1.h.
  void (*conv1x1_forward)(ImageView<T> x, int64_t oh, int64_t ow, int64_t ci, bool reduce, int n, const Conv1x1<T>* convs,
                          T* scratch, Ahead& ahead);
  void (*conv1x1_backward)(ImageView<T> x, int64_t oh, int64_t ow, int64_t ci, bool reduce, int n,
                           const NormBackward<T>* norms, const T* pw_t, T* dx, T* scratch, Ahead& ahead);
  // dense pixels to pixels `step` apart, past the caches
  void (*spread)(const T* x, int64_t pixels, int64_t c, T* to, int64_t step);
  void (*affine)(const T* y, const T* scale, const T* shift, int64_t size, int64_t period, bool bypass_cache, T* out);

  // Partial channels; see bypass.h. mixed = the mixed op's channels of a shuffled image
  void (*take_mixed)(ImageView<T> x, int64_t h, int64_t w, int64_t c, int64_t K, T* mixed);
  // out = shuffle([mixed | sum_j scale[j] x[j]]); scratch of w c
  void (*bypass_forward)(int n, const ImageView<T>* x, const T* scale, const T* mixed, int64_t h, int64_t w, int64_t c,
                         int64_t K, T* out, T* scratch);
  // dst = [mixed | 0] + outer + sum_j scale[j] unshuffle(g[j]), g dense and without the mixed op's channels; mixed and
  // outer may be null. dots[j] = sum unshuffle(g[j]) x, if x has data. scratch of 2 w c + c
  void (*join)(const T* mixed, int n, const T* const* g, const T* scale, ImageView<T> outer, ImageView<T> x, int64_t h, int64_t w,
               int64_t c, int64_t K, T* dst, double* dots, T* scratch);
  void (*half_pool_forward)(ImageView<T> x, int64_t h, int64_t w, int64_t c, T* out);
  // dx += d at its window's first maximum
  void (*half_pool_backward)(ImageView<T> x, const T* d, int64_t h, int64_t w, int64_t c, T* dx);
};

template <class T, class S>
const Kernels<T, S>& kernels();
// those for an instruction set by its name; null where this processor lacks it. (double has one for all.)
template <class T, class S>
const Kernels<T, S>* kernels_for(const char* isa);

// "avx512", "avx2" or "baseline": the best that this processor runs, or what RFDARTS_CPU_ISA names.
const char* isa_name();
const char* isa_best();

}  // namespace rfdarts
