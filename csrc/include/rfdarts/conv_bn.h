// ReLU, frozen 1x1 convolution, BatchNorm: the preprocessing of a cell, and FactorizedReduce (`reduce`). Several of
// one kind that read the same state share one read of it.
#pragma once
#include "rfdarts/cell.h"

namespace rfdarts {

template <class T>
struct ConvNorm {
  struct Part {
    int64_t co;
    // [ci][co] and its transpose; 2 ci instead of ci where `reduce`
    const T *weights, *gamma, *beta;
    T *y, *out;       // [images][oh][ow][co]: before and after the BatchNorm
    double* moments;  // [2][co]; read instead of written where not training
  };
  int64_t images, h, w, ci;  // of the input
  bool reduce, training;
  double eps;
  Batch<T> x;
  std::vector<Part> parts;

  int64_t oh() const { return reduce ? h / 2 : h; }
  int64_t ow() const { return reduce ? w / 2 : w; }
  int64_t wide() const { return reduce ? 2 * ci : ci; }
  int64_t co() const {
    int64_t sum = 0;
    for (const Part& part : parts) sum += part.co;
    return sum;
  }
  int64_t image_bytes() const { return h * x.row * int64_t(sizeof(T)); }
  // multiply-adds of 16 lanes that an image costs
  int64_t work() const { return oh() * ow() * co() / 16 * wide(); }
};

template <class T>
void conv_norm_forward(const ConvNorm<T>& a, const Parallel& parallel);

// of one part
template <class T>
struct ConvNormGradients {
  const T* g;  // dense
  T *gamma, *beta;
};
// dx [images][h][w][ci] or null
template <class T>
void conv_norm_backward(const ConvNorm<T>& a, const std::vector<ConvNormGradients<T>>& grads, T* dx,
                        const Parallel& parallel);

}  // namespace rfdarts
