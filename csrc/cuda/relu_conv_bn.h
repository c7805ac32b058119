// ReLU, frozen 1x1 convolution, BatchNorm on a CUDA device; see cpu/relu_conv_bn.h. No torch and no CUDA header here.
#pragma once
#include "cuda/cell.h"

namespace rfdarts::cuda {

struct ReLUConvBN {
  int64_t images, h, w, ci, co;  // of the input
  bool reduce, training;
  double eps;
  States x;
  // [ci][co] and its transpose
  const void *conv_weights, *gamma, *beta;
  void* y;          // [images][oh][ow][co]: before the BatchNorm
  double* moments;  // [2][co]; read instead of written where not training

  int64_t oh() const { return reduce ? h / 2 : h; }
  int64_t ow() const { return reduce ? w / 2 : w; }
};

// As cell_forward and cell_backward, they only launch kernels.
void relu_conv_bn_forward(Storage storage, const ReLUConvBN& a, void* out, void* stream, const Allocate& allocate);
// g dense; grad_x [images][h][w][ci] or null
void relu_conv_bn_backward(Storage storage, const ReLUConvBN& a, const void* g, void* grad_x, void* grad_gamma,
                           void* grad_beta, void* stream, const Allocate& allocate);

}  // namespace rfdarts::cuda
