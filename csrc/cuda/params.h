// What kernels are launched with: plain structs, passed by value.
#pragma once
#include "cuda/numeric.h"
#include "core/cell.h"
#include "core/running_stats.h"

namespace rfdarts::cuda {

constexpr int kThreads = 256;
// blocks of a multiprocessor that must have enough registers; double is for checking gradients, not for speed
template <class T>
constexpr int kResident = sizeof(T) == 8 ? 1 : 2;
// outputs that one thread of a depthwise convolution computes, next to each other in a row
constexpr int kStrip = 8;
// a launch's parameters must stay below 4 KiB
constexpr int kMaxBranches = 48;
constexpr int kMaxIncoming = 8;

// NHWC with any image, row and pixel stride; null where there is none
template <class T>
struct Images {
  const T* data = nullptr;
  int64_t image = 0;
  int row = 0, pixel = 0;

  __host__ __device__ const T* at(int n, int y, int x) const {
    return data + n * image + int64_t(y) * row + int64_t(x) * pixel;
  }
};

// BatchNorms of c channels: mean and var [norms][c] of the batch, or running ones in evaluation mode
template <class T>
struct Norms {
  const Acc<T>*gamma, *beta;
  const double *mean, *var;
  Acc<T> eps;
  int c;

  __device__ Acc<T> rstd(int norm, int ch) const { return inverse_root(Acc<T>(var[norm * c + ch]) + eps); }
  __device__ Acc<T> scale(int norm, int ch) const { return gamma[norm * c + ch] * rstd(norm, ch); }
  __device__ Acc<T> centre(int norm, int ch) const { return Acc<T>(mean[norm * c + ch]); }
};

// Images are cut into tiles of th x tw outputs, one block each; ck channels at a time pass through shared memory.
struct Tiling {
  int th, tw, ck;
  int down, across, count;

  Tiling() = default;
  Tiling(int th, int tw, int ck, int images, int h, int w)
      : th(th), tw(tw), ck(ck), down(ceil_div(h, th)), across(ceil_div(w, tw)), count(images * down * across) {}
  __device__ void place(int tile, int& n, int& y, int& x) const {
    x = tile % across * tw;
    y = tile / across % down * th;
    n = tile / (across * down);
  }
};

// Stages 1 and 2: y = pointwise(depthwise(relu(x))) per branch. x: [h][w], of stride 2 if S = 2.
template <class T>
struct ConvForward {
  Tiling tiling;
  int h, w, oh, ow, c, reach;
  int64_t image;     // of y
  bool wide;         // 16-byte loads and stores are aligned
  double* partial;   // [branches][2][tiles][c] mean and squared deviations, or null
  const Acc<T>* weights;
  Norms<T> norms;
  int branches;
  struct Branch {
    Images<T> x;
    T* y;  // null: pools, whose outputs are not kept
    int64_t weight;
    int norm;  // x = norm's scale x + shift; -1: x itself
    int16_t op;
    int8_t kernel, dilation;
  } branch[kMaxBranches];
};

// Which BatchNorms take which of a ConvForward's statistics.
struct Moments {
  Tiling tiling;
  int images, h, w, c, norms;
  const double* partial;
  double* moments;  // [2][norms][c]
  int count;
  struct Target {
    int16_t branch, norm;
  } target[2 * kMaxBranches];
};

// A node: its incoming edges as streams (kept branch outputs, noise) and what is recomputed from their inputs.
template <class T>
struct Node {
  int images, oh, ow, c, cm;
  Norms<T> norms;
  const Acc<T>*mix, *edge_weights;
  int streams, incoming;
  struct Stream {
    const T* data;
    int64_t image;
    int norm, mix, edge;
  } stream[kMaxBranches];
  struct Incoming {
    Images<T> x;
    int h, w, stride, edge;
    // norm and place in `mix` of each, or -1
    int max_norm, max_mix, avg_norm, avg_mix, identity_mix;
  } in[kMaxIncoming];

  // rows of coefficients and of sums: streams, then (max, average, identity) per incoming edge
  __host__ __device__ int rows() const { return streams + 3 * incoming; }
  __device__ Acc<T> strength(int at, int edge) const { return edge_weights ? edge_weights[edge] * mix[at] : mix[at]; }
};

// Gradients that leave a convolution's BatchNorm at its input: A g + B (y - mean) + D, per channel. coef is [4][c].
template <class T>
struct BackBranch {
  Images<T> g;
  const T* y;
  const Acc<T>* coef;
  int64_t weight;
  int16_t op;
  int8_t kernel, dilation;
};

template <class T>
struct Back {
  Tiling tiling;  // of the [h][w] that the gradient goes to
  int h, w, oh, ow, c;
  int region;     // largest number of pixels of [oh][ow] that a tile depends on
  int64_t image;  // of kept tensors
  bool wide;
  const Acc<T>* weights;
  Norms<T> norms;
};

// The second half of separable convolutions, up to the inner BatchNorm's output.
template <class T>
struct InnerBackward : Back<T> {
  double* partial;  // [branches][2][tiles][c]: sum du, sum du (y - mean)
  int branches;
  struct Branch : BackBranch<T> {
    const T* inner;
    T* du;
    int norm;
  } branch[kMaxBranches / 2];
};

// The gradient of a state from all edges that leave it.
template <class T>
struct StateBackward : Back<T> {
  Images<T> x, outer;  // outer: from outside the cell, or null
  T* dx;               // [n][h][w][full]
  int full;
  const Acc<T>*mix, *edge_weights;
  const Acc<T>* coef;  // [norms][4][c]
  bool pools;
  int leaving;
  struct Leaving {
    Images<T> g;
    int edge, max_norm, avg_norm, identity_mix;
  } edge[kMaxIncoming];
  int branches;
  BackBranch<T> branch[kMaxBranches];
};

constexpr int kMaxNorms = 128;

// mean, variance: [norms][c] of the batch
template <class A>
struct RunningParams {
  const double *mean, *variance;
  int c, norms;
  RunningUpdate update;
  struct {
    A *mean, *variance;
    int64_t* batches;
  } norm[kMaxNorms];
};

}  // namespace rfdarts::cuda
