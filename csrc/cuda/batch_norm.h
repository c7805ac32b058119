// BatchNorm's statistics, and its backward: the gradient at its input is scale g + slope (y - mean) + shift, per
// channel, which csrc/README.md derives. The coefficients are computed here, and here alone.
#pragma once
#include "cuda/params.h"

namespace rfdarts::cuda {

// BatchNorms of c channels: means and variances [norms][c] of the batch, or running ones in evaluation mode
template <class T>
struct Norms {
  const Acc<T>*gamma, *beta;
  const double *means, *variances;
  Acc<T> eps;
  int c;

  __device__ Acc<T> rstd(int norm, int ch) const { return inverse_root(Acc<T>(variances[norm * c + ch]) + eps); }
  __device__ Acc<T> scale(int norm, int ch) const { return gamma[norm * c + ch] * rstd(norm, ch); }
  __device__ Acc<T> mean(int norm, int ch) const { return Acc<T>(means[norm * c + ch]); }
};

// The backward of one BatchNorm for V neighbouring channels. In memory: [4][c].
template <class A, int V>
struct NormBackward {
  A scale[V], slope[V], mean[V], shift[V];

  // from: of the first of the V channels
  __device__ __forceinline__ NormBackward(const A* from, int c) {
#pragma unroll
    for (int i = 0; i < V; i++)
      scale[i] = from[i], slope[i] = from[c + i], mean[i] = from[2 * c + i], shift[i] = from[3 * c + i];
  }
  __device__ __forceinline__ A operator()(int i, A g, A y) const {
    // with running statistics slope is 0, whatever y is: an infinity or NaN too
    A distance = slope[i] != A(0) ? y - mean[i] : A(0);
    return scale[i] * g + (slope[i] * distance + shift[i]);
  }
};

// What BatchNorms' backwards write: gradients [norms][c], and coefficients [norms][4][c] for NormBackward.
template <class T>
struct NormOutputs {
  Norms<T> norms;
  double m;  // values per channel
  bool training;
  Acc<T>*grad_gamma, *grad_beta, *coefficients;

  // From sum g and dot = sum g (y - mean) of one channel of a BatchNorm whose output has this weight in a node:
  // gradients and coefficients. Returns the channel's part of the weight's gradient, sum g z.
  __device__ double write(int norm, int ch, double term_weight, double sum, double dot) const {
    int c = norms.c, at = norm * c + ch;
    double rstd = 1 / sqrt(norms.variances[at] + double(norms.eps)), gamma = double(norms.gamma[at]);
    double scale = term_weight * gamma * rstd, dot_hat = dot * rstd;
    grad_gamma[at] = Acc<T>(term_weight * dot_hat);
    grad_beta[at] = Acc<T>(term_weight * sum);
    Acc<T>* to = coefficients + int64_t(norm) * 4 * c + ch;
    to[0] = Acc<T>(scale);
    // statistics that are not the batch's do not depend on y
    to[c] = training ? Acc<T>(-scale * dot_hat * rstd / m) : Acc<T>(0);
    to[2 * c] = norms.mean(norm, ch);
    to[3 * c] = training ? Acc<T>(-scale * sum / m) : Acc<T>(0);
    return gamma * dot_hat + double(norms.beta[at]) * sum;
  }
};

// Threads are [parts][channels]: the sum over blocks of partial [blocks][c] of channel c0 + id % channels.
__device__ inline double sum_partials(const double* partial, int blocks, int c, int ch, int channels, double* room) {
  int parts = kThreads / channels, part = threadIdx.x / channels;
  double sum = 0;
  if (part < parts)
    for (int b = part; b < blocks; b += parts) sum += partial[int64_t(b) * c + ch];
  __syncthreads();
  room[threadIdx.x] = sum;
  __syncthreads();
  sum = 0;
  for (int p = 0; p < parts; p++) sum += room[p * channels + threadIdx.x % channels];
  return sum;
}

// BatchNorms that are no term of a node: the inner ones of separable convolutions, and those of preprocessing.
// Blocks: BatchNorms x groups of `channels`.
template <class T>
struct NormGradients {
  NormOutputs<T> outputs;
  const double* partial;  // [BatchNorms][2][blocks][c]: sum g, sum g (y - mean)
  int blocks, channels;   // channels: at most kThreads
  int norm[kMaxBranches / 2];
};

template <class T>
__global__ void __launch_bounds__(kThreads) norm_gradients_kernel(const __grid_constant__ NormGradients<T> a) {
  RFDARTS_SHARED(shared);
  double* room = reinterpret_cast<double*>(shared);
  int c = a.outputs.norms.c, c0 = int(blockIdx.y) * a.channels, ch = min(c0 + int(threadIdx.x) % a.channels, c - 1);
  const double* sums = a.partial + int64_t(blockIdx.x) * 2 * a.blocks * c;
  double sum = sum_partials(sums, a.blocks, c, ch, a.channels, room);
  double dot = sum_partials(sums + int64_t(a.blocks) * c, a.blocks, c, ch, a.channels, room);
  if (int(threadIdx.x) < a.channels && c0 + int(threadIdx.x) < c)
    a.outputs.write(a.norm[blockIdx.x], ch, 1, sum, dot);
}

}  // namespace rfdarts::cuda
