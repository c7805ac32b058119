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

// Threads are [parts][channels], `channels` at most kThreads. To every thread, the sum of `mine` over the parts of its
// channel, in pairs; room [N][kThreads] doubles.
template <int N>
__device__ __forceinline__ void sum_parts(double (&mine)[N], int channels, double* room) {
  int parts = kThreads / channels, part = threadIdx.x / channels, apart = 1;
  // nobody needs the room any more
  __syncthreads();
#pragma unroll
  for (int n = 0; n < N; n++) room[n * kThreads + threadIdx.x] = mine[n];
  while (apart < parts) apart *= 2;
  for (apart /= 2; apart; apart /= 2) {
    __syncthreads();
    if (part < apart && part + apart < parts)
#pragma unroll
      for (int n = 0; n < N; n++)
        room[n * kThreads + threadIdx.x] += room[n * kThreads + threadIdx.x + apart * channels];
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < N; n++) mine[n] = room[n * kThreads + threadIdx.x % channels];
}

// The same of what the threads of a part load: f(item, terms) sets N terms of an item, for items [0, items), of which
// each part has every parts-th one. A thread waits for 8 items together.
template <int N, class F>
__device__ __forceinline__ void sum_items(int items, int channels, double* room, double (&sum)[N], F&& f) {
  constexpr int ahead = 8;
  int parts = kThreads / channels, part = threadIdx.x / channels;
  double some[2][N] = {};
  if (part < parts)
    for (int first = part; first < items; first += ahead * parts) {
      double terms[ahead][N];
#pragma unroll
      for (int j = 0; j < ahead; j++) {
        if (first + j * parts < items)
          f(first + j * parts, terms[j]);
        else
#pragma unroll
          for (int n = 0; n < N; n++) terms[j][n] = 0;
      }
#pragma unroll
      for (int j = 0; j < ahead; j++)
#pragma unroll
        for (int n = 0; n < N; n++) some[j % 2][n] += terms[j][n];
    }
#pragma unroll
  for (int n = 0; n < N; n++) sum[n] = some[0][n] + some[1][n];
  sum_parts(sum, channels, room);
}
// bytes of room for N sums
constexpr int room_for(int n) { return n * kThreads * int(sizeof(double)); }

// channels of a block that adds up what other blocks left: whole sectors of memory, and many blocks
constexpr int kSumChannels = 4;

// BatchNorms that are no term of a node: the inner ones of separable convolutions, and those of preprocessing.
// Blocks: BatchNorms x groups of kSumChannels.
template <class T>
struct NormGradients {
  int blocks;
  struct {
    NormOutputs<T> outputs;
    int norm;
    const double* partial;  // [2][blocks][c]: sum g, sum g (y - mean)
  } of[kMaxBranches / 2];
};

template <class T>
__global__ void __launch_bounds__(kThreads) norm_gradients_kernel(const __grid_constant__ NormGradients<T> a) {
  RFDARTS_SHARED(shared);
  const auto& of = a.of[blockIdx.x];
  int c = of.outputs.norms.c, channel = int(blockIdx.y) * kSumChannels + int(threadIdx.x) % kSumChannels;
  const double* from = of.partial + min(channel, c - 1);
  double sums[2];
  sum_items<2>(a.blocks, kSumChannels, reinterpret_cast<double*>(shared), sums, [&](int block, double(&terms)[2]) {
    terms[0] = from[int64_t(block) * c], terms[1] = from[(int64_t(a.blocks) + block) * c];
  });
  if (threadIdx.x < kSumChannels && channel < c) of.outputs.write(of.norm, channel, 1, sums[0], sums[1]);
}

}  // namespace rfdarts::cuda
