// csrc/cpu/amx.h in C++, for processors without AMX: the arithmetic of Intel's Software Developer's Manual, and its
// faults as exceptions.
struct EmulatedTiles {
  using Row = Vec<float, 16>;
  TileConfig config;
  bool configured = false;
  alignas(64) unsigned char tiles[8][16][64];

  void expect(bool right, const char* what) const {
    if (!configured || !right) throw std::logic_error(std::string("AMX: ") + what);
  }
  void configure(const TileConfig& next) {
    config = next, configured = true;
    expect(config.palette == 1 && config.start_row == 0, "expected palette 1, from row 0 on");
    for (int i = 0; i < 16; i++) {
      expect(config.rows[i] <= 16 && config.bytes[i] <= 64, "a tile has 16 rows of 64 bytes at most");
      expect(!config.rows[i] == !config.bytes[i] && (i < 8 || !config.rows[i]), "no such tile");
    }
    std::memset(tiles, 0, sizeof tiles);
  }
  void zero(int tile) {
    expect(config.rows[tile], "a tile that is not configured");
    std::memset(tiles[tile], 0, sizeof tiles[tile]);
  }
  void load(int tile, const char* from, int64_t step) {
    zero(tile);
    for (int r = 0; r < config.rows[tile]; r++) std::memcpy(tiles[tile][r], from + r * step, config.bytes[tile]);
  }
  void store(int tile, char* to, int64_t step) const {
    expect(config.rows[tile], "a tile that is not configured");
    for (int r = 0; r < config.rows[tile]; r++) std::memcpy(to + r * step, tiles[tile][r], config.bytes[tile]);
  }
  // Subnormal operands and results become 0; round to nearest even, as everywhere here. Even and odd inputs have sums
  // of their own, which are added before what was there.
  void multiply(int sums, int a, int b) {
    expect(config.rows[sums] && config.rows[sums] == config.rows[a], "sums and A differ in rows");
    expect(config.bytes[sums] == config.bytes[b], "sums and B differ in columns");
    expect(config.bytes[a] == 4 * config.rows[b], "A's columns and B's rows differ");
    for (int m = 0; m < config.rows[sums]; m++) {
      Row even{}, odd{};
      for (int k = 0; k < config.rows[b]; k++) {
        uint32_t pair;
        std::memcpy(&pair, tiles[a][m] + 4 * k, sizeof pair);
        auto pairs = pair + Vec<uint32_t, 16>{};
        auto weights = *reinterpret_cast<const Vec<uint32_t, 16>*>(tiles[b][k]);
        even = flushed(even + upper(pairs << 16) * upper(weights << 16));
        odd = flushed(odd + upper(pairs) * upper(weights));
      }
      Row& sum = *reinterpret_cast<Row*>(tiles[sums][m]);
      sum = flushed(flushed(sum) + flushed(even + odd));
    }
  }
  static Row flushed(Row v) { return (v < 0x1p-126f) & (v > -0x1p-126f) ? v * 0.f : v; }
  static Row upper(Vec<uint32_t, 16> bits) {
    bits &= 0xffff0000u;
    return flushed(reinterpret_cast<Row&>(bits));
  }
};
static thread_local EmulatedTiles emulated_tiles;

inline void tile_configure(const TileConfig& config) { emulated_tiles.configure(config); }
inline void tile_release() { emulated_tiles.configured = false; }
template <int Tile>
void tile_zero() {
  emulated_tiles.zero(Tile);
}
template <int Tile>
void tile_load(const void* from, int64_t step) {
  emulated_tiles.load(Tile, static_cast<const char*>(from), step);
}
template <int Tile>
void tile_store(void* to, int64_t step) {
  emulated_tiles.store(Tile, static_cast<char*>(to), step);
}
template <int Sums, int A, int B>
void tile_multiply() {
  emulated_tiles.multiply(Sums, A, B);
}
