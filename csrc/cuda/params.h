// What the parameters of kernels are made of: plain structs, passed by value. The parameters of x_y_kernel are an XY.
#pragma once
#include "core/cell.h"
#include "cuda/numeric.h"

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
// whose branches share a launch
constexpr int kMaxStates = 2;

// NHWC with any image, row and pixel stride; null where there is none
template <class T>
struct ImageView {
  const T* data = nullptr;
  int64_t image = 0;
  int row = 0, pixel = 0;

  __host__ __device__ const T* at(int n, int y, int x) const {
    return data + n * image + int64_t(y) * row + int64_t(x) * pixel;
  }
};

// A tile's first pixel.
struct Corner {
  int n, y, x;
};

// Images are cut into tiles of th x tw outputs, one block each; ck channels at a time pass through shared memory.
struct Tiling {
  int th, tw, ck;
  int down, across, count;

  Tiling() = default;
  Tiling(int th, int tw, int ck, int images, int h, int w)
      : th(th), tw(tw), ck(ck), down(ceil_div(h, th)), across(ceil_div(w, tw)), count(images * down * across) {}
  __device__ Corner corner(int tile) const {
    return {tile / (across * down), tile / across % down * th, tile % across * tw};
  }
};

}  // namespace rfdarts::cuda
