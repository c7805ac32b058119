// What differs between nvcc and the CPU emulation: the headers, a launch, and dynamic shared memory.
#pragma once
#ifdef RFDARTS_EMULATION
#include "emulation/cuda.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define RFDARTS_LAUNCH(kernel, grid, block, shared, stream, ...) \
  (kernel)<<<(grid), (block), (shared), (stream)>>>(__VA_ARGS__)
#define RFDARTS_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif
