// Choice of tiles, and checked launches.
#pragma once
#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>

#include "cuda/cell.h"
#include "cuda/conv_backward.h"
#include "cuda/conv_forward.h"
#include "cuda/device.h"

namespace rfdarts::cuda {

// Enough blocks for any device; kernels with loops over items take the rest in further rounds.
constexpr int64_t kMaxBlocks = 4096;
// of a grid's second and third dimension
constexpr int kMostGridRows = 65535;

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  // or whoever asks next takes it for an error of their own
  cudaGetLastError();
  std::string text = std::string(what) + ": " + cudaGetErrorString(error);
  if (error == cudaErrorMemoryAllocation) throw OutOfMemory(text);
  throw std::runtime_error("CUDA: " + text);
}
inline void require(bool room, const char* what) {
  if (!room) throw std::invalid_argument(std::string(what) + ": more than the CUDA kernels have room for");
}

// A stream of the current device, and the shared memory of this device's blocks: two with `goal` bytes fit on a
// multiprocessor, none can have more than `limit`. Without `launches`, kernels are only checked against the limit.
struct Queue {
  cudaStream_t stream;
  bool launches;
  int goal, limit;

  explicit Queue(void* stream, bool launches = true) : stream(cudaStream_t(stream)), launches(launches) {
    int device = 0;
    check(cudaGetDevice(&device), "device");
    auto ask = [&](cudaDeviceAttr attribute) {
      int value = 0;
      check(cudaDeviceGetAttribute(&value, attribute, device), "device");
      return value;
    };
    limit = ask(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    int half = ask(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / 2;
    goal = std::min(limit, half - ask(cudaDevAttrReservedSharedMemoryPerBlock));
  }
  std::invalid_argument no_room(int needed) const {
    return std::invalid_argument("shared memory: a block of the CUDA kernels needs " + std::to_string(needed) +
                                 " bytes, the device has " + std::to_string(limit));
  }
};

template <class Params>
void launch(void (*kernel)(const Params), dim3 grid, int shared, const Queue& queue, const Params& params) {
  static_assert(sizeof(Params) <= 4000, "parameters exceed what a launch takes");
  if (shared > queue.limit) throw queue.no_room(shared);
  if (!queue.launches) return;
  if (shared > 48 << 10)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               shared),
          "shared memory");
  RFDARTS_LAUNCH(kernel, grid, dim3(kThreads), shared, queue.stream, params);
  check(cudaGetLastError(), "launch");
}

// f(T), the type of states and branch outputs
template <class F>
void with_storage(Storage storage, F&& f) {
  switch (storage) {
    case Storage::Float: return f.template operator()<float>();
    case Storage::Double: return f.template operator()<double>();
    case Storage::BFloat16: return f.template operator()<__nv_bfloat16>();
    case Storage::Half: return f.template operator()<__half>();
  }
}

struct TileSize {
  int th, tw;

  // a smaller one is enough for an image of h x w
  bool wasteful(int h, int w) const { return (th > 8 && th / 2 >= h) || (tw > 8 && tw / 2 >= w); }
};
inline constexpr TileSize kTileSizes[] = {{16, 16}, {16, 8}, {8, 8}, {4, 8}, {2, 8}};

// The largest tile, no larger than the image needs, that takes at most queue.goal bytes, else at most queue.limit, else
// that with fewer channels at a time, down to `least`. `bytes_of(tiling)` is negative where threads are too few.
template <class Bytes>
Tiling choose_tiling(const Queue& queue, int images, int h, int w, int ck, int least, Bytes&& bytes_of) {
  struct Pass {
    int bytes, least;
  };
  int fewest = 0;
  for (Pass pass : {Pass{queue.goal, 32}, Pass{queue.limit, 32}, Pass{queue.limit, least}})
    for (TileSize size : kTileSizes) {
      if (size.wasteful(h, w)) continue;
      Tiling t(size.th, size.tw, ck, images, h, w);
      int bytes = bytes_of(t);
      while (bytes > pass.bytes && t.ck > pass.least) t.ck = round_up(t.ck / 2, 8), bytes = bytes_of(t);
      if (bytes >= 0 && bytes <= pass.bytes) return t;
      fewest = bytes;
    }
  throw queue.no_room(fewest);
}

// f(H, W), a tile of whole strips as constants
template <class F>
auto with_strip_tile(const Tiling& t, F&& f) {
  return t.th == 16 ? f.template operator()<16, 16>() : f.template operator()<8, 8>();
}

// The largest tile of whole strips that takes at most queue.goal bytes, else at most queue.limit. `bytes_of(tiling)` is
// negative where it has too many pixels.
template <class Bytes>
std::optional<Tiling> strip_tiling(const Queue& queue, int images, int h, int w, int c, Bytes&& bytes_of) {
  for (int most : {queue.goal, queue.limit})
    for (TileSize size : {TileSize{16, 16}, TileSize{8, 8}}) {
      if (size.wasteful(h, w)) continue;
      Tiling t(size.th, size.tw, c, images, h, w);
      int bytes = bytes_of(t);
      if (bytes >= 0 && bytes <= most) return t;
    }
  return {};
}

template <class T>
Tiling forward_tiling(const Queue& queue, int images, int h, int w, int c, int reach, int stride) {
  return choose_tiling(queue, images, h, w, std::min(c, kThreads), 8, [&](const Tiling& t) {
    bool few = t.th * t.tw / kStrip * std::min(c, 32) > kThreads;
    return few ? -1 : ForwardTile<T>(t, c, reach, stride).bytes;
  });
}

template <class T>
Tiling backward_tiling(const Queue& queue, int images, int h, int w, int c, int reach, int stride, bool pools,
                       int& region) {
  // tensor cores take 16 channels at a time, and 32 always have room
  return choose_tiling(queue, images, h, w, std::min(c, 32), 32, [&](const Tiling& t) {
    region = region_size(t.th, reach, stride) * region_size(t.tw, reach, stride);
    bool few = t.th * t.tw / kStrip * t.ck > kThreads || ceil_div(region, 4) * ceil_div(t.ck, 4) > kItems * kThreads;
    return few ? -1 : BackwardTile<T>(t, region, pools).bytes;
  });
}

}  // namespace rfdarts::cuda
