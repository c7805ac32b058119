// ReLU, frozen 1x1 convolution, BatchNorm on a CUDA device; see conv_bn.h. No torch and no CUDA header here.
#pragma once
#include "rfdarts/cuda_cell.h"

namespace rfdarts::cuda {

struct ConvNorm {
  int64_t images, h, w, ci, co;  // of the input
  bool reduce, training;
  double eps;
  States x;
  // [ci][co] and its transpose; 2 ci instead of ci where `reduce`: the first half of the outputs has its matrix in the
  // upper left, the second in the lower right
  const void *weights, *gamma, *beta;
  void* y;          // [images][oh][ow][co]: before the BatchNorm
  double* moments;  // [2][co]; read instead of written where not training

  int64_t oh() const { return reduce ? h / 2 : h; }
  int64_t ow() const { return reduce ? w / 2 : w; }
};

// As cell_forward and cell_backward, they only launch kernels.
void conv_norm_forward(Storage storage, const ConvNorm& a, void* out, void* stream, const Allocate& allocate);
// g dense; dx [images][h][w][ci] or null
void conv_norm_backward(Storage storage, const ConvNorm& a, const void* g, void* dx, void* grad_gamma,
                        void* grad_beta, void* stream, const Allocate& allocate);

}  // namespace rfdarts::cuda
