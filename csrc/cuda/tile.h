// How a block's threads and its shared memory are laid out over a tile; csrc/README.md has a picture.
#pragma once
#include "cuda/params.h"

namespace rfdarts::cuda {

// Elements of a row of a tile [rows][pitch]: columns x ck channels. Rows of fewer than 128 bytes a pixel are spread over
// the banks: neighbouring rows differ by one pixel.
__host__ __device__ inline int tile_pitch(int columns, int ck, int item) {
  int bank_row = 128 / item, row = columns * ck;
  return ck >= bank_row ? row : ceil_div(row, bank_row) * bank_row + ck;
}

// How threads share [pixels][ck]: a thread keeps its V channels, so that their coefficients stay in registers.
template <int V>
struct Lanes {
  int channel, pixel, step;
  __device__ explicit Lanes(int ck) {
    int lanes = ceil_div(ck, V), id = threadIdx.x;
    step = kThreads / lanes;
    channel = id % lanes * V;
    // threads that are left over have no pixel
    pixel = id < step * lanes ? id / lanes : 1 << 30;
  }
};

// f(V): accesses of 16 bytes, or of one element
template <class T, class F>
__device__ __forceinline__ void with_width(bool wide, F&& f) {
  wide ? f.template operator()<kWide<T>>() : f.template operator()<1>();
}

}  // namespace rfdarts::cuda
