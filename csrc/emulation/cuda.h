// CUDA C++ on the CPU, for tests: one fiber per CUDA thread, one block after the other, one OS thread. Covers what
// csrc/cuda uses. Fixed or shuffled thread order; shared memory begins as NaNs. Does not see races between blocks. The
// devices are what a test says: their limits are enforced, and errors come as on a GPU.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define RFDARTS_LAUNCH(kernel, grid, block, shared, stream, ...) \
  (static_cast<void>(stream), emulation::launch((kernel), (grid), (block), (shared), __VA_ARGS__))
#define RFDARTS_SHARED(name) unsigned char* name = emulation::block.shared

using std::max;
using std::min;

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrReservedSharedMemoryPerBlock,
};
struct cudaFuncAttributes {};
const char* cudaGetErrorString(cudaError_t);
cudaError_t cudaGetLastError();
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device);
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void* kernel);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes);
cudaError_t cudaMemGetInfo(size_t* free, size_t* total);
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}

// round to nearest even; a NaN stays one
struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16(float x) {
  uint32_t u = std::bit_cast<uint32_t>(x);
  if (x != x) return {uint16_t(u >> 16 | 0x40)};
  return {uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
struct __half {
  _Float16 value;
};
inline float __half2float(__half x) { return float(x.value); }
inline __half __float2half(float x) { return {_Float16(x)}; }

namespace emulation {

enum class State : uint8_t { Running, Barrier, Warp, Returned };
struct Thread {
  void* stack;
  struct {
    unsigned x, y, z;
  } id;
  int lane, warp;
  State state;
  unsigned mask;  // of the warp operation that the thread waits in
  int operation;
  uint64_t slot;
};
struct Block {
  dim3 id, grid;
  unsigned char* shared;
  // what each lane of a warp brought to its last warp operation
  uint64_t (*exchange)[32];
};
extern Thread* thread;
extern Block block;

// Shared memory in bytes; image: the library has code for it; allocation: bytes of the largest one, or -1 for any.
struct Device {
  int major, minor, per_multiprocessor, per_block, reserved;
  bool image;
  int64_t allocation;
};
// one H100 unless a test says otherwise; the first is current again
void emulate(std::vector<Device> devices);
// fails as torch's allocator through its stable ABI
void allocate(int64_t bytes);
// whether the current device takes a launch; if not, that is the last error
bool launchable(const void* kernel, size_t shared);

void barrier();
void warp_operation(unsigned mask, int operation);
void run(dim3 grid, dim3 size, size_t shared, void (*body)(void*), void* context);
// threads run in the order of their numbers, or in a new random order between any two barriers
void shuffle(bool on);
// from here on, launches are only written down
void record(bool on);
// One launch a line: type of the parameters | blocks | bytes of shared memory | the kernel's place in this library |
// grid | threads | the parameters' bytes; the last four for benchmarks that read the GPU's own code.
const std::string& recorded();
struct Bytes {
  const void* data;
  size_t size;
};
bool write_down(const char* function, const void* kernel, dim3 grid, dim3 size, size_t shared, Bytes params);

template <class T>
T exchange(unsigned mask, T value, int source, int operation) {
  static_assert(sizeof(T) <= 8);
  std::memcpy(&thread->slot, &value, sizeof(T));
  warp_operation(mask, operation);
  std::memcpy(&value, &block.exchange[thread->warp][source & 31], sizeof(T));
  return value;
}

// mma.sync m16n8k16: c (16 x 8) += a (16 x 16) b (16 x 8) with the fragment layouts of the PTX manual; two values a
// register, value(register, i) unpacks one
template <class Value>
void multiply_tile(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Value&& value) {
  struct Fragments {
    uint32_t a[4], b[2];
  } mine = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, all[32];
  const Fragments* address = &mine;
  std::memcpy(&thread->slot, &address, sizeof(address));
  warp_operation(~0u, 2);
  for (int lane = 0; lane < 32; lane++) {
    std::memcpy(&address, &block.exchange[thread->warp][lane], sizeof(address));
    all[lane] = *address;
  }
  // no lane leaves before all have read
  warp_operation(~0u, 3);
  int g = thread->lane / 4, t = thread->lane % 4;
  for (int r = 0; r < 4; r++) {
    int row = g + r / 2 * 8, column = 2 * t + r % 2;
    double sum = c[r];
    for (int k = 0; k < 16; k++) {
      const Fragments &left = all[row % 8 * 4 + k % 8 / 2], &right = all[column * 4 + k % 8 / 2];
      sum += double(value(left.a[row / 8 + k / 8 * 2], k % 2)) * double(value(right.b[k / 8], k % 2));
    }
    c[r] = float(sum);
  }
}

// ldmatrix x4: four 8x8 matrices of 16-bit values, whose rows the lanes name
inline void load_matrices(uint32_t (&to)[4], const void* row, bool transposed) {
  std::memcpy(&thread->slot, &row, sizeof(row));
  warp_operation(~0u, 4);
  int g = thread->lane / 4, t = thread->lane % 4;
  auto value = [&](int matrix, int r, int column) {
    const uint16_t* values;
    std::memcpy(&values, &block.exchange[thread->warp][8 * matrix + r], sizeof(values));
    return uint32_t(values[column]);
  };
  for (int i = 0; i < 4; i++)
    to[i] = transposed ? value(i, 2 * t, g) | value(i, 2 * t + 1, g) << 16
                       : value(i, g, 2 * t) | value(i, g, 2 * t + 1) << 16;
}

template <class Params>
void launch(void (*kernel)(Params), dim3 grid, dim3 size, size_t shared, const Params& params) {
  auto address = reinterpret_cast<const void*>(kernel);
  if (!launchable(address, shared)) return;
  if (write_down(__PRETTY_FUNCTION__, address, grid, size, shared, {&params, sizeof(params)})) return;
  auto body = [&] { kernel(params); };
  run(grid, size, shared, [](void* context) { (*static_cast<decltype(body)*>(context))(); }, &body);
}

}  // namespace emulation

#define threadIdx (emulation::thread->id)
#define blockIdx (emulation::block.id)
#define gridDim (emulation::block.grid)

inline void __syncthreads() { emulation::barrier(); }
// of one block at a time
inline int __syncthreads_or(int predicate) {
  static int any;
  emulation::barrier();
  any = 0;
  emulation::barrier();
  any |= predicate;
  emulation::barrier();
  return any;
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return emulation::exchange(mask, value, lane, 1);
}
