// ReLU, frozen 1x1 convolution, BatchNorm: the preprocessing of a cell, and FactorizedReduce (`reduce`). Several of
// one kind that read the same state share one read of it.
#pragma once
#include "cpu/cell.h"

namespace rfdarts {

template <class T>
struct ReLUConvBN {
  struct Layer {
    int64_t co;
    // [ci][co] and its transpose; 2 ci instead of ci where `reduce`
    const T *conv_weights, *gamma, *beta;
    T *y, *output;     // [images][oh][ow][co]: before and after the BatchNorm
    double* moments;  // [2][co]; read instead of written where not training
  };
  int64_t images, h, w, ci;  // of the input
  bool reduce, training;
  double eps;
  BatchView<T> x;
  std::vector<Layer> layers;

  int64_t oh() const { return reduce ? h / 2 : h; }
  int64_t ow() const { return reduce ? w / 2 : w; }
  int64_t wide() const { return reduce ? 2 * ci : ci; }
  int64_t co() const {
    int64_t sum = 0;
    for (const Layer& layer : layers) sum += layer.co;
    return sum;
  }
  int64_t image_bytes() const { return h * x.row * int64_t(sizeof(T)); }
  // multiply-adds of 16 lanes that an image costs
  int64_t work() const { return oh() * ow() * co() / 16 * wide(); }
};

template <class T>
void relu_conv_bn_forward(const ReLUConvBN<T>& a, const Parallel& parallel);

// of one layer
template <class T>
struct ReLUConvBNGradients {
  const T* g;  // dense
  T *gamma, *beta;
};
// grad_x [images][h][w][ci] or null
template <class T>
void relu_conv_bn_backward(const ReLUConvBN<T>& a, const std::vector<ReLUConvBNGradients<T>>& grads, T* grad_x,
                        const Parallel& parallel);

}  // namespace rfdarts
