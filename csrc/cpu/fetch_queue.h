// What should be fetched into the caches while an image's convolutions compute.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/kernels.h"

namespace rfdarts {

// more than this would push out what is being computed
constexpr int64_t kFetchAtMost = 384 << 10;
// what a pass writes beyond this is gone from the caches before it is read
constexpr int64_t kBypassCache = 1 << 20;

// Ranges of memory in the order in which they are needed.
class FetchQueue {
 public:
  void clear() { ranges_.clear(), lines_ = 0; }
  void add(const void* p, int64_t bytes, int64_t step = kLine) {
    if (!p) return;
    ranges_.push_back({static_cast<const char*>(p), (bytes + kLine - 1) / kLine, step});
    lines_ += ranges_.back().lines;
  }
  // an image of `pixels`, c channels each
  template <class T>
  void add(ImageView<T> x, int64_t pixels, int64_t c) {
    if (x.pixel == c) return add(x.data, pixels * c * sizeof(T));
    for (int64_t k = 0; k < c && x.data; k += kLine / sizeof(T)) add(x.data + k, pixels * kLine, x.pixel * sizeof(T));
  }
  int64_t bytes() const { return lines_ * kLine; }
  // over so many multiply-adds of 16 lanes
  Ahead over(int64_t work) {
    if (ranges_.empty()) return {};
    return {ranges_.data(), ranges_.data() + ranges_.size(), (lines_ << 16) / std::max<int64_t>(work, 1) + 1, 0};
  }
  void append(const FetchQueue& other) {
    for (const auto& range : other.ranges_) add(range);
  }
  // another queue's ranges, a share of them after each of `count` steps
  void add_share(const FetchQueue& other, int64_t step, int64_t count) {
    int64_t size = other.ranges_.size();
    for (int64_t i = step * size / count; i < (step + 1) * size / count; i++) add(other.ranges_[i]);
  }

 private:
  static constexpr int64_t kLine = 64;
  void add(const Ahead::Range& range) { ranges_.push_back(range), lines_ += range.lines; }
  std::vector<Ahead::Range> ranges_;
  int64_t lines_ = 0;
};

}  // namespace rfdarts
