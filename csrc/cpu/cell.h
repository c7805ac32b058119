// Cells and layers on the CPU, and how threads share the images. No torch here.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <vector>

#include "core/cell.h"
#include "core/data.h"
#include "cpu/kernels.h"

namespace rfdarts {

// States in their type.
template <class T>
struct BatchView {
  T* data = nullptr;
  int64_t image = 0, row = 0, pixel = 0;
  BatchView() = default;
  BatchView(T* data, int64_t image, int64_t row, int64_t pixel) : data(data), image(image), row(row), pixel(pixel) {}
  explicit BatchView(const States& x) : BatchView(static_cast<T*>(x.data), x.image, x.row, x.pixel) {}
  ImageView<T> operator[](int64_t n) const { return {data ? data + n * image : nullptr, row, pixel}; }
};

// The images of one thread. It takes a few more whenever it gets to its last, so that a thread that is held up does
// not hold up the others. The results do not depend on it: every image has its own sums.
class ImageQueue {
 public:
  ImageQueue(std::atomic<int64_t>& taken, int64_t count, int64_t threads)
      : taken_(taken), count_(count), few_(std::max<int64_t>(1, count / (8 * threads))) {}
  // f(image, the one after it or -1): what that one needs can be fetched meanwhile
  template <class F>
  void each(F&& f) {
    for (int64_t n = after(-1), next; n >= 0; n = next) f(n, next = after(n));
  }

 private:
  int64_t after(int64_t n) {
    if (++n < end_) return n;
    n = taken_.fetch_add(few_);
    end_ = std::min(n + few_, count_);
    return n < count_ ? n : -1;
  }
  std::atomic<int64_t>& taken_;
  int64_t count_, few_, end_ = 0;
};
// calls f in every thread
using Parallel = std::function<void(int64_t count, const std::function<void(ImageQueue&)>& f)>;
// f<T, S>(): the types of arithmetic and states, and of branch outputs
template <class F>
void with_types(Storage storage, F&& f) {
  if (storage == Storage::Double)
    f.template operator()<double, double>();
  else if (storage == Storage::BFloat16)
    f.template operator()<float, bf16>();
  else
    f.template operator()<float, float>();
}

namespace cpu {
void cell_forward(Storage storage, const Cell& cell, const CellForward& data, const Parallel& parallel,
                  const Allocate& allocate);
// fills branch_outputs again, for a cell in evaluation mode
void cell_branch_outputs(Storage storage, const Cell& cell, const CellForward& data, const Parallel& parallel,
                         const Allocate& allocate);
void cell_backward(Storage storage, const Cell& cell, const CellBackward& data, const Parallel& parallel,
                   const Allocate& allocate);
// storage: of x and all that comes of it
void relu_conv_bn_forward(Storage storage, const ReLUConvBN& a, const Parallel& parallel);
void relu_conv_bn_backward(Storage storage, const ReLUConvBN& a, const Parallel& parallel);
void batch_norm_forward(Storage storage, const BatchNorm& a, const Parallel& parallel);
void batch_norm_backward(Storage storage, const BatchNorm& a, const Parallel& parallel);
}  // namespace cpu

}  // namespace rfdarts
