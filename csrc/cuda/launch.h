// Choice of tiles, and checked launches.
#pragma once
#include <stdexcept>
#include <string>

#include "cuda/cell.h"
#include "cuda/conv_backward.h"
#include "cuda/conv_forward.h"

namespace rfdarts::cuda {

// Two blocks share a multiprocessor of sm_90 and sm_100; the hard limit is sm_80's.
constexpr int kSharedGoal = 112 << 10, kSharedLimit = 163 << 10;
// Enough blocks for any device; kernels with loops over items take the rest in further rounds.
constexpr int64_t kMaxBlocks = 4096;

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(error));
}
inline void require(bool room, const char* what) {
  if (!room) throw std::invalid_argument(std::string(what) + ": more than the CUDA kernels have room for");
}

template <class Params>
void launch(void (*kernel)(const Params), dim3 grid, int shared, cudaStream_t stream, const Params& params) {
  static_assert(sizeof(Params) <= 4000, "parameters exceed what a launch takes");
  if (shared > 48 << 10)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               shared),
          "shared memory");
  RFDARTS_LAUNCH(kernel, grid, dim3(kThreads), shared, stream, params);
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
};
inline constexpr TileSize kTileSizes[] = {{16, 16}, {16, 8}, {8, 8}, {4, 8}, {2, 8}};

// The largest tile, no larger than the image needs, that `fits` within the goal, else within the limit.
// fits(tiling, bytes) may lower ck.
template <class Fits>
Tiling choose_tiling(int images, int h, int w, int ck, Fits&& fits) {
  for (int bytes : {kSharedGoal, kSharedLimit})
    for (TileSize size : kTileSizes) {
      bool wasteful = (size.th > 8 && size.th / 2 >= h) || (size.tw > 8 && size.tw / 2 >= w);
      Tiling t(size.th, size.tw, ck, images, h, w);
      if (!wasteful && fits(t, bytes)) return t;
    }
  throw std::invalid_argument("channels: too many for the shared memory of a block");
}

template <class T>
Tiling forward_tiling(int images, int h, int w, int c, int reach, int stride) {
  return choose_tiling(images, h, w, c < kThreads ? c : kThreads, [&](Tiling& t, int bytes) {
    int most = c > 32 ? 32 : c;
    if (t.th * t.tw / kStrip * most > kThreads) return false;
    while (ForwardTile<T>(t, c, reach, stride).bytes > bytes && t.ck > 32) t.ck = round_up(t.ck / 2, 8);
    return ForwardTile<T>(t, c, reach, stride).bytes <= bytes;
  });
}

template <class T>
Tiling backward_tiling(int images, int h, int w, int c, int reach, int stride, bool pools, int& region) {
  return choose_tiling(images, h, w, c < 32 ? c : 32, [&](Tiling& t, int bytes) {
    region = region_size(t.th, reach, stride) * region_size(t.tw, reach, stride);
    if (t.th * t.tw / kStrip * t.ck > kThreads) return false;
    if (ceil_div(region, 4) * ceil_div(t.ck, 4) > kItems * kThreads) return false;
    return BackwardTile<T>(t, region, pools).bytes <= bytes;
  });
}

}  // namespace rfdarts::cuda
