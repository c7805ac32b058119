// A cell's forward and backward on the CPU: their data, and how they share the images among threads. No torch here.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <vector>

#include "core/cell.h"
#include "cpu/kernels.h"

namespace rfdarts {

// N images, NHWC with any image, row and pixel stride; null where there are none.
template <class T>
struct BatchView {
  const T* data = nullptr;
  int64_t image = 0, row = 0, pixel = 0;
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
// memory for as long as the call lasts
using Allocate = std::function<void*(int64_t bytes)>;

template <class T, class S>
struct CellForward {
  std::vector<BatchView<T>> inputs;
  std::vector<const T*> noise;
  const T *conv_weights, *gamma, *beta;
  const T* op_weights;    // [edges][primitives]
  const T* edge_weights;  // [edges] or null
  S* branch_outputs;      // [outputs][images][image_size()]
  double* moments;        // [2][norms][C/K] mean and variance; read instead of written where not training
  // cell_forward writes them: [images][oh][ow][channels]; the others read them, in any order
  std::vector<T*> nodes;
  std::vector<BatchView<T>> node_states;
  T* concat = nullptr;    // [images][oh][ow][nodes * channels], or null
};

template <class T, class S>
struct CellBackward {
  CellForward<T, S> forward;                // branch_outputs is used up
  std::vector<BatchView<T>> grad_nodes;     // null: no gradient
  std::vector<T*> grad_inputs;              // [images][h][w][channels] or null
  T *grad_gamma, *grad_beta;                // [norms][C/K]
  T *grad_op_weights, *grad_edge_weights;   // [edges][primitives], [edges] or null
};

template <class T, class S>
void cell_forward(const Cell& cell, const CellForward<T, S>& data, const Parallel& parallel, const Allocate& allocate);
// fills branch_outputs again, for a cell in evaluation mode
template <class T, class S>
void cell_branch_outputs(const Cell& cell, const CellForward<T, S>& data, const Parallel& parallel,
                         const Allocate& allocate);
template <class T, class S>
void cell_backward(const Cell& cell, const CellBackward<T, S>& data, const Parallel& parallel,
                   const Allocate& allocate);

}  // namespace rfdarts
