// Products of bfloat16 on AMX's tiles. A row of sums is 16 outputs of a pixel; a row of A inputs of a pixel that lie
// next to each other; a row of B the weights of a pair of inputs for 16 outputs, as they are packed. Other instruction
// sets see none of it: what their compiler inlines would change.

// What LDTILECFG reads: bytes of a row and rows of each tile.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

#ifdef RFDARTS_EMULATED_TILES
#include "emulation/amx.h"
#else
#include "cpu/amx.h"
#endif

constexpr int kTileSize = 16;

// All pairs of inputs, in equal parts of as many as a tile takes; 0: there is no such part that would gain.
RF_INLINE int64_t tile_pairs(int64_t ci) {
  int64_t pairs = ci / 2, parts = (pairs + kTileSize - 1) / kTileSize;
  while (pairs % parts) parts++;
  return pairs / parts < kTileSize / 2 ? 0 : pairs / parts;
}

// Tiles 0 to 3 are sums, 4 and 5 A, 6 and 7 B. Whatever else runs on this thread has tiles of its own: they are
// configured for a product, and released after it.
struct Tiles {
  Tiles(int64_t pixels, int64_t pairs) {
    TileConfig config;
    for (int i = 0; i < 8; i++) {
      config.rows[i] = i < 6 ? pixels : pairs;
      config.bytes[i] = i / 2 == 2 ? 4 * pairs : 4 * kTileSize;
    }
    tile_configure(config);
  }
  ~Tiles() { tile_release(); }
};

// Rows * Blocks tiles of sums: pixels from d on, ci inputs each, times outputs from w on.
template <int Rows, int Blocks>
RF_INLINE void multiply_tiles(const bf16* d, int64_t ci, int64_t pairs, const float* w, int64_t co) {
  unroll<Rows * Blocks>(RF_LAMBDA(i) { tile_zero<i>(); });
  for (int64_t k = 0; k < ci / 2; k += pairs) {
    unroll<Rows>(RF_LAMBDA(m) { tile_load<4 + m>(d + m * kTileSize * ci + 2 * k, 2 * ci); });
    unroll<Blocks>(RF_LAMBDA(n) {
      constexpr int B = 6 + n % 2;
      tile_load<B>(w + k * co + n * kTileSize, 4 * co);
      unroll<Rows>(RF_LAMBDA(m) { tile_multiply<m * Blocks + n, 4 + m, B>(); });
    });
  }
}
template <int Rows, int Blocks>
RF_INLINE void store_sums(float* to, int64_t step) {
  unroll<Rows>(RF_LAMBDA(m) {
    unroll<Blocks>(RF_LAMBDA(n) { tile_store<m * Blocks + n>(to + m * kTileSize * step + n * kTileSize, 4 * step); });
  });
}

// pointwise_columns on tiles. A pixel's sums do not depend on where it lies among the others.
template <int Blocks, class Out>
RF_INLINE void tile_columns(const bf16* d, int64_t pixels, int64_t ci, int64_t pairs, const float* w, int64_t co,
                            Ahead& ahead, Out&& out) {
  constexpr int Rows = Blocks == 4 ? 1 : 2, step = Blocks * kTileSize;
  int64_t size = least<int64_t>(pixels, kTileSize), done = 0;
  Tiles tiles(size, pairs);
  alignas(64) float sums[Rows * kTileSize * step];
  auto take = [&](auto rows, int64_t first) __attribute__((always_inline)) {
    multiply_tiles<rows, Blocks>(d + first * ci, ci, pairs, w, co);
    store_sums<rows, Blocks>(sums, step);
    for (int64_t end = first + rows * size; done < end; done++) {
      fetch<kTileSize>(ahead, Blocks * ci);
      unroll<Blocks>(RF_LAMBDA(n) {
        out(done, int64_t(n * kTileSize), load<kTileSize>(sums + (done - first) * step + n * kTileSize));
      });
    }
  };
  if constexpr (Rows == 2)
    while (done + 2 * kTileSize <= pixels) take(std::integral_constant<int, 2>{}, done);
  // the last ones in a whole tile, some of them once more
  while (done < pixels) take(std::integral_constant<int, 1>{}, least(done, pixels - size));
}
