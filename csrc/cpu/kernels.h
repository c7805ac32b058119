// What one image needs: the kernels that a cell is made of, on raw pointers, one table per instruction set.
#pragma once
#include <cstdint>

// A compiler that knows AMX comes with an assembler that does.
#if defined(__x86_64__) && defined(__linux__) && __has_include(<amxbf16intrin.h>)
#define RFDARTS_BUILDS_AMX
#endif

namespace rfdarts {

struct bf16 {
  uint16_t bits;
};

// Of one image, NHWC.
struct Size {
  int64_t h, w, c;
};

// One image: consecutive channels, any pixel and row stride (in elements).
template <class T>
struct ImageView {
  const T* data;
  int64_t row, pixel;
};

// Scratch image with room around it: `origin` is where pixel (0, 0) lies, `pitch` is how far apart rows are.
struct Frame {
  int64_t origin, pitch, size;
};

// With products of bfloat16 (kernels_of_products) every matrix [C in][C out] of 1x1 or NAS-Bench-201 convolutions is
// pairs, [C in / 2][C out] of two bfloat16 of consecutive inputs in the place of a float, at the beginning of its own
// place. What is multiplied with it is rounded to bfloat16, sums are float.
//
// A frozen depthwise convolution dw [kernel^2][C] and 1x1 convolution pw [C in][C out], pw_t its transpose; rows hold
// `period` values at stride 1, else C.
template <class T>
struct Conv {
  int kernel, dilation, stride;
  const T *dw, *pw, *pw_t;
};

// Where a convolution's output goes, with its mean and its sum of squared deviations per channel. bypass_cache: it is
// next read after it would have been evicted.
template <class S>
struct ConvOutput {
  S* y;
  double *mean, *deviation;
  bool bypass_cache = false;

  ConvOutput from(int64_t channel) const { return {y + channel, mean + channel, deviation + channel, bypass_cache}; }
};

// The gradient at a BatchNorm's input, scale g + slope (y - mean) + shift, formed where it is used: csrc/README.md.
// coefficients: [4][period], rows in the order of NormRow.
template <class T, class G, class S>
struct NormBackward {
  const G* g;
  const S* y;
  const T* coefficients;
};
enum NormRow { kScale, kSlope, kMean, kShift, kNormRows };

// Some of a pixel's channels.
struct Channels {
  int64_t first, count;
};
// Outputs of part 0 of 1, all, or of one of two: FactorizedReduce has a convolution for each half of them.
inline Channels part_of(int64_t co, int part, int parts) {
  int64_t first = part * (co / 2), end = part + 1 < parts ? co / 2 : co;
  return {first, end - first};
}

// One of several 1x1 convolutions of an image: pw [ci][co]; and the gradient at its output.
template <class T, class S>
struct Conv1x1 {
  int64_t co;
  const T* pw;
  ConvOutput<S> out;
};
template <class T>
struct Conv1x1Backward {
  int64_t co;
  NormBackward<T, T, T> norm;
};

// A frozen convolution of NAS-Bench-201, kernel 1 or 3: weights [kernel^2][C in][C out], and for kernel 3 those of
// Winograd's products, [16][C in][C out]. Of the backward: [C out][C in], taps from last to first. The outputs of 1x1
// ones are not stored: `out` has moments alone, and the backward makes them again, from x with `forward` weights.
template <class T, class S>
struct NorConv {
  int kernel;
  const T *weights, *transformed;
  ConvOutput<S> out;
};
template <class T, class S>
struct NorConvBackward {
  int kernel;
  const T *weights, *transformed, *forward;
  NormBackward<T, T, S> norm;
};
// lanes of the widest vector: float on avx512
constexpr int64_t kMaxLanes = 16;

// 2x2 tiles that go through the products together: their values, products and weights fill the caches. How far apart
// the values of two places lie is no power of two.
constexpr int64_t kFewTiles = 8, kPlaceSkew = 32;
constexpr int64_t strip_tiles(int64_t c) { return c > kMaxLanes ? 2 * kFewTiles : kFewTiles; }
constexpr int64_t place_pitch(int64_t c) { return strip_tiles(c) * c + kPlaceSkew; }

// The gradient of a state, of which the mixed op takes the first C / K channels and the others bypass it:
// dx = [mixed | 0] + outer + sum over edges of edge_weights[e] unshuffle(g[e]) without the mixed op's channels.
template <class T>
struct BypassBackward {
  const T* mixed;             // gradient of the mixed op's channels, dense, or null
  ImageView<T> outer;         // gradient from outside the cell; null data: none
  int edges;
  const T* const* g;          // gradients at the edges' nodes, dense and shuffled
  const T* edge_weights;
  ImageView<T> x;             // what bypasses; null data: no dots wanted
  T* dx;                      // dense
  double* dots;               // [edges]: sum of unshuffle(g[e]) x
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

// A convolution's input passes through scratch by strips of rows: they stay in the first-level cache between the
// depthwise and the 1x1 convolution.
constexpr int64_t kStripBytes = 12288;
// What rows of the pools' backward lie further apart than they are long. Rows of a power of two would share cache sets,
// and loads would wait for stores of other rows.
constexpr int64_t kPoolSkewBytes = 384;

// Elements of scratch that the kernels need, on any instruction set. w: of the input, ow: of the output.
template <class T>
struct ScratchSize {
  static constexpr int64_t max(int64_t a, int64_t b) { return a < b ? b : a; }
  static constexpr int64_t padded(int64_t c) { return (c + kMaxLanes - 1) / kMaxLanes * kMaxLanes; }
  static constexpr int64_t period(int64_t c) { return max(c, kMaxLanes); }
  // as many rows as fit, at least one
  static constexpr int64_t strip(int64_t row) { return max(kStripBytes / int64_t(sizeof(T)), row); }
  // shift, sum and sum of squares of the outputs, a mean of the inputs
  static constexpr int64_t moments(int64_t ci, int64_t co) { return 3 * padded(co) + padded(ci); }
  static constexpr int64_t conv_forward(int64_t ow, int64_t c) { return moments(c, c) + strip(ow * c); }
  static constexpr int64_t conv_backward(int64_t ow, int64_t c) { return strip(ow * c); }
  // what is transformed, the products, and moments of n convolutions; or, tap by tap, a row and what it is a product
  // of; or a strip of gradients
  static constexpr int64_t nor_convs_forward(int64_t w, int64_t c, int64_t n) {
    return max(32 * place_pitch(c) + 3 * n * period(c), moments(c, c) + 2 * w * c);
  }
  static constexpr int64_t nor_convs_backward(int64_t w, int64_t c) {
    return max(32 * place_pitch(c), 3 * strip(w * c));
  }
  static constexpr int64_t reduce_backward(int64_t ow, int64_t c) { return 2 * ow * c; }
  // maxima, sums and shares of a row, with a pixel of border
  static constexpr int64_t pool_forward(int64_t w, int64_t c) { return 3 * (w + 2) * c; }
  // a row of lowest values, one of zeros, three of maxima, three of their gradients
  static constexpr int64_t pool_backward(int64_t w, int64_t c) {
    return 8 * (w * c + kPoolSkewBytes / int64_t(sizeof(T)));
  }
  // two sums per channel, in vectors
  static constexpr int64_t sums(int64_t c) { return 2 * period(c); }
  static constexpr int64_t bypass_forward(int64_t w, int64_t c) { return w * c; }
  // a row of sums, one of x, and zeros in the place of the mixed op's channels
  static constexpr int64_t bypass_backward(int64_t w, int64_t c) { return (2 * w + 1) * c; }
  // a strip of inputs; `co`: what all outputs add up to
  static constexpr int64_t conv1x1_forward(int64_t ow, int64_t ci, int64_t convs, int64_t co) {
    return kMaxLanes + strip(ow * ci) + 3 * co + convs * padded(ci);
  }
  // strips of all inputs and of all outputs
  static constexpr int64_t conv1x1_backward(int64_t ow, int64_t inputs, int64_t co) {
    return 2 * strip(ow * max(inputs, co));
  }
};

// Per-channel coefficients are repeated until they fill whole vectors: see `period`.
// T: arithmetic and states. S: how branch outputs are stored (T, or bf16 beside float).
template <class T, class S>
struct Kernels {
  const char* name;
  // values that a coefficient array must hold for C channels: C, or a whole vector where C divides one
  int64_t (*period)(int64_t c);
  Frame (*frame)(Size size, int stride);

  Frame (*nor_frame)(Size size);

  // dst frame = relu(x)
  void (*frame_relu)(ImageView<T> x, Size size, Frame frame, T* dst);
  // dst frame = relu(scale y + shift); scale, shift [period]
  void (*frame_affine_relu)(const S* y, const T* scale, const T* shift, Size size, Frame frame, T* dst);

  // y = pointwise(depthwise(x)), x framed; size: of x
  void (*conv_forward)(const T* x, Frame frame, Size size, const Conv<T>& conv, const ConvOutput<S>& out, T* scratch,
                       Ahead& ahead);
  // Several convolutions of x, in a frame of nor_frame; 3x3 ones come first.
  void (*nor_convs_forward)(const T* x, Frame frame, Size size, int n, const NorConv<T, S>* convs, T* scratch,
                            Ahead& ahead);
  // dense = x without its strides
  void (*pack)(ImageView<T> x, Size size, T* dense);
  // `rows` rows of the 3x3 pools of a dense image
  void (*pool_forward)(const T* x, Size size, int stride, int64_t first, int64_t rows, T* max, T* avg, T* scratch);
  // Mean and sum of squared deviations, an image's pixels in several calls: the first chooses the shift [period] that
  // sums are taken about.
  void (*add_moments)(const T* y, int64_t pixels, int64_t c, bool first, T* shift, double* mean, double* deviation,
                      T* scratch);
  void (*finish_moments)(const T* shift, int64_t pixels, int64_t c, double* mean, double* deviation);
  // dx += gradients of both pools; d_avg already divided by its window's size; finite: all that the pools gave is
  void (*pool_backward)(const T* x, const T* d_max, const T* d_avg, Size size, int stride, bool finite, T* dx,
                        T* scratch);

  // dst = (first ? shift : dst) + sum_k scale[k] (src[k] - mean[k]); scale, mean [n][period], shift [period] or null.
  // Each stream is centred before it is added: all constants at once would be larger than the sum that is left.
  void (*sum_branch_outputs)(T* dst, bool first, int n, const S* const* src, const T* scale, const T* mean,
                             const T* shift, int64_t count, int64_t period);
  void (*sum_states)(T* dst, bool first, int n, const T* const* src, const T* scale, const T* mean, const T* shift,
                     int64_t count, int64_t period);
  // out[k][c] += sum g (src[k] - mean[k]); out [n][C], mean [n][period]. g_sum[c] += sum g.
  void (*dot_branch_outputs)(const T* g, int n, const S* const* src, const T* mean, double* out, int64_t count,
                             int64_t c, T* scratch);
  void (*dot_states)(const T* g, int n, const T* const* src, const T* mean, double* out, double* g_sum, int64_t count,
                     int64_t c, T* scratch);

  // dx = depthwise^T(pointwise^T(gradient)), or dx += it; size: of dx; framed: of the frame's size
  void (*conv_backward)(const NormBackward<T, T, S>& norm, Size size, const Conv<T>& conv, Frame frame, T* framed,
                        bool add, T* dx, T* scratch, Ahead& ahead);
  // the same where g is stored as a branch output
  void (*conv_backward_stored)(const NormBackward<T, S, S>& norm, Size size, const Conv<T>& conv, Frame frame,
                               T* framed, bool add, T* dx, T* scratch, Ahead& ahead);
  // dense pixels through ReLU and a 1x1 convolution; scratch: as many
  void (*relu_conv1x1)(const T* x, int64_t pixels, int64_t c, const T* weights, T* y, T* scratch);
  // dx = the gradients before nor_convs_forward, summed; 3x3 ones are framed, one after the other
  void (*nor_convs_backward)(const T* x, int n, const NorConvBackward<T, S>* convs, Size size, Frame frame, T* framed,
                             T* dx, T* scratch, Ahead& ahead);
  // dx += the gradient before a FactorizedReduce's convolutions
  void (*reduce_backward)(const NormBackward<T, T, S>& norm, Size size, const T* pw_t, T* dx, T* scratch,
                          Ahead& ahead);
  // du = dx where scale y + shift > 0; sums of du and of du (y - mean). du may be where the outer branch output was.
  void (*relu_backward_inner)(const T* dx, const S* y, const T* scale, const T* shift, const T* mean, S* du,
                              double* sum, double* dot, int64_t count, int64_t c, T* scratch);
  // sum += dx where x > 0
  void (*relu_backward_add)(const T* dx, const T* x, T* sum, int64_t count, int64_t c);
  void (*divide_by_window)(T* d, Size size, int stride);
  // dst = sums over 3x3 windows, zero around the image, or their average; or added
  void (*window_sums)(const T* x, Size size, bool average, bool add, T* dst);

  // One image through ReLU and 1x1 convolutions, oh x ow outputs; see relu_conv_bn_kernels.h.
  void (*conv1x1_forward)(ImageView<T> x, int64_t oh, int64_t ow, int64_t ci, bool reduce, int n,
                          const Conv1x1<T, S>* convs, T* scratch, Ahead& ahead);
  void (*conv1x1_backward)(ImageView<T> x, int64_t oh, int64_t ow, int64_t ci, bool reduce, int n,
                           const Conv1x1Backward<T>* convs, const T* pw_t, T* dx, T* scratch, Ahead& ahead);
  // dense pixels to pixels `step` apart, past the caches
  void (*spread)(const T* x, int64_t pixels, int64_t c, T* to, int64_t step);
  // out = scale y + shift, or its ReLU
  void (*affine)(const T* y, const T* scale, const T* shift, int64_t count, int64_t period, bool bypass_cache,
                 bool relu, T* out);
  // dx = the gradient, of a dense image; may be where g is
  void (*norm_backward)(const NormBackward<T, T, T>& norm, int64_t count, int64_t c, T* dx);

  // Partial channels; see bypass.h. mixed = the mixed op's channels of a shuffled image
  void (*take_mixed)(ImageView<T> x, Size size, int64_t K, T* mixed);
  // out = shuffle([mixed | sum over n edges of edge_weights[e] x[e]])
  void (*bypass_forward)(int n, const ImageView<T>* x, const T* edge_weights, const T* mixed, Size size, int64_t K,
                         T* out, T* scratch);
  void (*bypass_backward)(const BypassBackward<T>& a, Size size, int64_t K, T* scratch);
  void (*half_pool_forward)(ImageView<T> x, Size size, T* out);
  // dx += d at its window's first maximum
  void (*half_pool_backward)(ImageView<T> x, const T* d, Size size, T* dx);
};

template <class T, class S>
const Kernels<T, S>& kernels();
// those with products of bfloat16, where this processor multiplies them; they have T = float
template <class T, class S>
const Kernels<T, S>& kernels_of_products();
bool multiplies_bfloat16();
// those for an instruction set by its name, with products of bfloat16 for avx512_bf16 and amx_bf16; null where this
// processor lacks it. (double has one for all, but those.)
template <class T, class S>
const Kernels<T, S>* kernels_for(const char* isa);

// "amx_bf16", "avx512_bf16", "avx512", "avx2" or "baseline": the best that this processor runs, or what RFDARTS_CPU_ISA
// names.
const char* isa_name();
const char* isa_best();
// Why the best is not amx_bf16; "" where it is. The first call asks Linux to let this process use tiles.
const char* amx_missing();

}  // namespace rfdarts
