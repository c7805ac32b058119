#include "core/memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <unordered_map>

namespace rfdarts {
namespace {
constexpr int64_t kPage = 4096;

// Address space as large as the machine's memory, of which only what is touched costs any. Blocks are taken as low as
// they fit, so that what one step has touched is what the next one uses.
struct Arena {
  char* base = nullptr;
  int64_t size = 0;
  std::map<int64_t, int64_t> free;  // offset and bytes of the gaps below `top`
  // where untouched addresses, or again unused ones, begin; and what was touched since the last release
  int64_t top = 0, touched = 0;

  Arena() {
    int64_t bytes = int64_t(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE);
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    // without address space every block comes from the system
    if (p == MAP_FAILED) return;
    base = static_cast<char*>(p), size = bytes;
#ifdef MADV_HUGEPAGE
    madvise(base, size, MADV_HUGEPAGE);
#endif
  }
  bool owns(void* p) const { return p >= base && p < base + size; }

  void* take(int64_t bytes) {
    for (auto [offset, gap] : free) {
      if (gap < bytes) continue;
      free.erase(offset);
      if (gap > bytes) free[offset + bytes] = gap - bytes;
      return base + offset;
    }
    if (top + bytes > size) return std::aligned_alloc(kPage, bytes);
    top += bytes;
    touched = std::max(touched, top);
    return base + top - bytes;
  }
  void give(void* p, int64_t bytes) {
    if (!owns(p)) return std::free(p);
    auto gap = free.emplace(static_cast<char*>(p) - base, bytes).first;
    if (auto next = std::next(gap); next != free.end() && gap->first + gap->second == next->first) {
      gap->second += next->second;
      free.erase(next);
    }
    if (gap != free.begin())
      if (auto before = std::prev(gap); before->first + before->second == gap->first) {
        before->second += gap->second;
        free.erase(gap);
        gap = before;
      }
    if (gap->first + gap->second < top) return;
    top = gap->first;
    free.erase(gap);
  }
  void release() {
    for (auto [offset, gap] : free) madvise(base + offset, gap, MADV_DONTNEED);
    if (touched > top) madvise(base + top, touched - top, MADV_DONTNEED);
    touched = top;
  }
  int64_t cached() const {
    int64_t bytes = touched - top;
    for (auto [_, gap] : free) bytes += gap;
    return bytes;
  }
};
struct Pool {
  std::mutex mutex;
  // small blocks would break up the room that the next large one needs
  Arena arenas[2];
  struct Block {
    Arena* arena;
    int64_t bytes;
  };
  std::unordered_map<void*, Block> used;
  bool poison = false;
};
// never destroyed: tensors may die after static objects
Pool& pool() {
  static Pool* p = new Pool;
  return *p;
}
}  // namespace

void* pool_take(int64_t bytes, Lifetime lifetime) {
  Pool& p = pool();
  std::lock_guard lock(p.mutex);
  bytes = std::max<int64_t>((bytes + kPage - 1) / kPage * kPage, kPage);
  Arena& arena = p.arenas[lifetime == Lifetime::BranchOutputs];
  void* block = arena.take(bytes);
  if (!block) throw std::bad_alloc();
  p.used[block] = {&arena, bytes};
  if (p.poison) std::memset(block, 0xff, bytes);
  return block;
}

void pool_give(void* block) {
  Pool& p = pool();
  std::lock_guard lock(p.mutex);
  auto it = p.used.find(block);
  it->second.arena->give(block, it->second.bytes);
  p.used.erase(it);
}

void pool_release() {
  Pool& p = pool();
  std::lock_guard lock(p.mutex);
  for (Arena& arena : p.arenas) arena.release();
}
int64_t pool_cached() {
  Pool& p = pool();
  std::lock_guard lock(p.mutex);
  return p.arenas[0].cached() + p.arenas[1].cached();
}
void pool_poison(bool on) {
  Pool& p = pool();
  std::lock_guard lock(p.mutex);
  p.poison = on;
}
}  // namespace rfdarts
