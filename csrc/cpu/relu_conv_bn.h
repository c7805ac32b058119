// ReLU, frozen 1x1 convolution, BatchNorm: the preprocessing of a cell, and FactorizedReduce (`reduce`). Several such
// layers that read the same state share one read of it.
#pragma once
#include "cpu/cell.h"

namespace rfdarts {

template <class T>
struct ReLUConvBN {
  struct Layer {
    int64_t co;
    // [inputs][co] and its transpose
    const T *conv_weights, *gamma, *beta;
    T *y, *output;    // [images][oh][ow][co]: before and after the BatchNorm
    double* moments;  // [2][co]; read instead of written where not training
  };
  int64_t images, h, w, ci;  // of x
  bool reduce, training;
  double eps;
  BatchView<T> x;
  std::vector<Layer> layers;

  int64_t oh() const { return reduce ? h / 2 : h; }
  int64_t ow() const { return reduce ? w / 2 : w; }
  // numbers behind one output: of a pixel, or of two
  int64_t inputs() const { return reduce ? 2 * ci : ci; }
  int64_t co() const {
    int64_t sum = 0;
    for (const Layer& layer : layers) sum += layer.co;
    return sum;
  }
};

template <class T>
void relu_conv_bn_forward(const ReLUConvBN<T>& a, const Parallel& parallel);

// of one layer
template <class T>
struct ReLUConvBNGradients {
  const T* g;                // at its output, dense
  T *grad_gamma, *grad_beta;
};
// grad_x: [images][h][w][ci] or null
template <class T>
void relu_conv_bn_backward(const ReLUConvBN<T>& a, const std::vector<ReLUConvBNGradients<T>>& gradients, T* grad_x,
                           const Parallel& parallel);

}  // namespace rfdarts
