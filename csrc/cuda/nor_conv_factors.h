// The convolutions of NAS-Bench-201 as tensor cores take them: weights rounded to the storage type, in the order in
// which warps read them, 16 bytes for each lane:
//
//     factors [c / 16 of outputs][taps][c / 16 of inputs][lane][8]
//
// Taps go from last to first. They take half as much room as the packed weights, in the same order: those of the
// convolution at `weight` begin at weight / 2.
#pragma once
#include "cuda/mma.h"
#include "cuda/params.h"

namespace rfdarts::cuda {

template <class T>
struct NorConvFactors {
  int c;
  const float* conv_weights;
  int convolutions;
  struct Convolution {
    int64_t from;  // [taps][c outputs][c inputs] in conv_weights
    T* to;
    int taps;
  } convolution[kMaxBranches];
};

// Blocks: any number x convolutions. A thread: what a lane takes for 16 outputs and 16 inputs. Of lane 4 g + t, the
// weights of the outputs g and 8 + g for the inputs 2 t, 2 t + 1, 2 t + 8 and 2 t + 9.
template <class T>
__global__ void __launch_bounds__(kThreads) nor_conv_factors_kernel(const __grid_constant__ NorConvFactors<T> a) {
  const auto& own = a.convolution[blockIdx.y];
  int c = a.c, blocks = c / 16, items = own.taps * blocks * blocks * 32;
  for (int i = blockIdx.x * kThreads + threadIdx.x; i < items; i += gridDim.x * kThreads) {
    int lane = i % 32, n = i / 32 / blocks / own.taps, tap = i / 32 / blocks % own.taps;
    const float* from = a.conv_weights + own.from + (int64_t(tap) * c + n * 16 + lane / 4) * c;
    from += i / 32 % blocks * 16 + lane % 4 * 2;
    Pack<uint32_t, 4> factors;
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
      for (int k = 0; k < 2; k++) {
        float two[2];
        load<2>(from + 8 * (j * c + k), two);
        factors.v[2 * j + k] = pair<T>(two[0], two[1]);
      }
    *reinterpret_cast<Pack<uint32_t, 4>*>(own.to + int64_t(i) * 8) = factors;
  }
}

}  // namespace rfdarts::cuda
