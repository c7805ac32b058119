#include "rfdarts/memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <unordered_map>

namespace rfdarts {
namespace {
struct Pool {
  std::mutex mutex;
  std::multimap<int64_t, void*> cached;
  std::unordered_map<void*, int64_t> sizes;
  int64_t in_use = 0, in_cache = 0, peak = 0;
  bool poison = false;

  void drop(std::multimap<int64_t, void*>::iterator it) {
    in_cache -= it->first;
    sizes.erase(it->second);
    std::free(it->second);
    cached.erase(it);
  }
};
// never destroyed: tensors may die after static objects
Pool& pool() {
  static Pool* p = new Pool;
  return *p;
}
}  // namespace

void* pool_take(int64_t bytes) {
  Pool& p = pool();
  std::lock_guard lock(p.mutex);
  bytes = std::max<int64_t>((bytes + 4095) / 4096 * 4096, 4096);
  p.in_use += bytes;
  p.peak = std::max(p.peak, p.in_use);
  void* block = nullptr;
  if (auto it = p.cached.find(bytes); it != p.cached.end()) {
    block = it->second;
    p.in_cache -= bytes;
    p.cached.erase(it);
  } else {
    // together with what is in use, the cache never exceeds the most that was ever in use
    while (!p.cached.empty() && p.in_use + p.in_cache > p.peak) p.drop(p.cached.begin());
    block = std::aligned_alloc(4096, bytes);
    if (!block) {
      p.in_use -= bytes;
      throw std::bad_alloc();
    }
#ifdef MADV_HUGEPAGE
    if (bytes >= 4 << 20) madvise(block, bytes, MADV_HUGEPAGE);
#endif
    p.sizes[block] = bytes;
  }
  if (p.poison) std::memset(block, 0xff, bytes);
  return block;
}

void pool_give(void* block) {
  Pool& p = pool();
  std::lock_guard lock(p.mutex);
  int64_t bytes = p.sizes.at(block);
  p.in_use -= bytes;
  p.in_cache += bytes;
  p.cached.emplace(bytes, block);
}

void pool_release() {
  Pool& p = pool();
  std::lock_guard lock(p.mutex);
  while (!p.cached.empty()) p.drop(p.cached.begin());
  p.peak = p.in_use;
}
int64_t pool_cached() {
  Pool& p = pool();
  std::lock_guard lock(p.mutex);
  return p.in_cache;
}
void pool_poison(bool on) {
  Pool& p = pool();
  std::lock_guard lock(p.mutex);
  p.poison = on;
}
}  // namespace rfdarts
