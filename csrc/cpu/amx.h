// AMX's instructions on tiles of at most 16 rows of 64 bytes (Intel's Software Developer's Manual). GCC's own
// intrinsics paste a tile's number as text, which no template can give them, and do not say what memory they read.
// csrc/emulation/amx.h has the same functions in C++.

// all tiles become 0
RF_INLINE void tile_configure(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config) : "memory"); }
RF_INLINE void tile_release() { asm volatile("tilerelease"); }
template <int Tile>
RF_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(Tile));
}
// rows are `step` bytes apart
template <int Tile>
RF_INLINE void tile_load(const void* from, int64_t step) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(step), "i"(Tile) : "memory");
}
template <int Tile>
RF_INLINE void tile_store(void* to, int64_t step) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(step), "i"(Tile) : "memory");
}
// Sums += A B, of pairs of bfloat16 that lie next to each other in A's rows and in B's columns
template <int Sums, int A, int B>
RF_INLINE void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sums), "i"(A), "i"(B));
}
