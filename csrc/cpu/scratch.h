// Scratch memory of one thread, which outlives the calls that use it.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

namespace rfdarts {

// Taken piece by piece, given back at once.
class Scratch {
 public:
  // zero: when the piece is taken
  template <class T>
  T* take(int64_t n, bool zero = false) {
    // skewed, so that pieces do not share cache sets
    int64_t bytes = (n * int64_t(sizeof(T)) + 63) / 64 * 64 + 320;
    T* p = static_cast<T*>(grab(bytes));
    if (zero) std::memset(static_cast<void*>(p), 0, n * sizeof(T));
    return p;
  }

 private:
  static constexpr int64_t kPage = 4096, kBlock = 1 << 20;
  struct Block {
    char* data;
    int64_t size;
  };
  struct Arena {
    std::vector<Block> blocks;
    ~Arena() {
      for (Block& b : blocks) std::free(b.data);
    }
  };
  static inline thread_local Arena arena_;

  void* grab(int64_t bytes) {
    // blocks never move, as pieces of them are in use
    while (block_ < arena_.blocks.size() && used_ + bytes > arena_.blocks[block_].size) block_++, used_ = 0;
    if (block_ == arena_.blocks.size()) {
      int64_t size = (bytes + kBlock) / kPage * kPage + kPage;
      char* p = static_cast<char*>(std::aligned_alloc(kPage, size));
      if (!p) throw std::bad_alloc();
      arena_.blocks.push_back({p, size});
    }
    void* p = arena_.blocks[block_].data + used_;
    used_ += bytes;
    return p;
  }
  size_t block_ = 0;
  int64_t used_ = 0;
};

}  // namespace rfdarts
