// What a cell's forward and backward share.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

#include "cpu/cell.h"
#include "cpu/scratch.h"

namespace rfdarts {

// Per-channel coefficients in the width that the kernels read.
template <class T>
class Coefficients {
 public:
  Coefficients() = default;
  Coefficients(int64_t rows, int64_t c, int64_t period) : c_(c), period_(period), values_(rows * period) {}
  void set(int64_t row, int64_t channel, double value) {
    for (int64_t k = channel; k < period_; k += c_) values_[row * period_ + k] = T(value);
  }
  void set(int64_t row, double value) {
    for (int64_t i = 0; i < c_; i++) set(row, i, value);
  }
  const T* row(int64_t r) const { return values_.data() + r * period_; }

 private:
  int64_t c_ = 0, period_ = 0;
  std::vector<T> values_;
};

// Mean and squared deviations of each image, for each BatchNorm that a pass feeds.
struct Moments {
  int64_t count = 0, c = 0;
  double* room = nullptr;  // [images][count][2][c]
  static int64_t size(int64_t images, int64_t count, int64_t c) { return images * count * 2 * c; }
  double* mean_of(int64_t n, int64_t i) const { return room + (n * count + i) * 2 * c; }
  double* deviation_of(int64_t n, int64_t i) const { return mean_of(n, i) + c; }

  // images of equal size: the mean of means, and Chan's merge of the deviations
  void merge(int64_t i, int64_t images, int64_t pixels, double* mean_out, double* variance_out) const {
    std::fill_n(mean_out, c, 0.0);
    for (int64_t n = 0; n < images; n++)
      for (int64_t j = 0; j < c; j++) mean_out[j] += mean_of(n, i)[j];
    for (int64_t j = 0; j < c; j++) mean_out[j] /= images, variance_out[j] = 0;
    for (int64_t n = 0; n < images; n++)
      for (int64_t j = 0; j < c; j++) {
        double off = mean_of(n, i)[j] - mean_out[j];
        variance_out[j] += deviation_of(n, i)[j] + pixels * off * off;
      }
    for (int64_t j = 0; j < c; j++) variance_out[j] /= images * pixels;
  }
};

// What an image's convolutions should fetch meanwhile, in the order in which it is needed.
class Queue {
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
  void append(const Queue& other) {
    for (const auto& range : other.ranges_) add(range);
  }
  // another queue's ranges, a share of them after each of `count` steps
  void add_share(const Queue& other, int64_t step, int64_t count) {
    int64_t size = other.ranges_.size();
    for (int64_t i = step * size / count; i < (step + 1) * size / count; i++)
      add(other.ranges_[i]);
  }

 private:
  static constexpr int64_t kLine = 64;
  void add(const Ahead::Range& range) { ranges_.push_back(range), lines_ += range.lines; }
  std::vector<Ahead::Range> ranges_;
  int64_t lines_ = 0;
};
// more than this would push out what is being computed
constexpr int64_t kFetchAtMost = 384 << 10;
// what a pass writes beyond this is gone from the caches before it is read
constexpr int64_t kBypassCache = 1 << 20;

template <class T, class S>
struct CellContext {
  const Cell& cell;
  CellForward<T, S>& data;
  const Parallel& parallel;
  const Allocate& allocate;
  const Kernels<T, S>& k = kernels<T, S>();
  int64_t cm = cell.mixed_channels, period = k.repeat(cm);
  std::vector<T> repeated;  // packed weights, rows repeated to `period`
  std::vector<BatchView<T>> states;
  // per state: the mixed op's channels, dense; what bypasses the mixed op, at the size of the cell's output
  std::vector<const T*> mixed;
  std::vector<BatchView<T>> bypass;
  std::vector<T*> packed, pooled;

  CellContext(const Cell& cell, CellForward<T, S>& data, const Parallel& parallel, const Allocate& allocate)
      : cell(cell), data(data), parallel(parallel), allocate(allocate), states(data.inputs),
        mixed(cell.states()), bypass(mixed.size()), packed(mixed.size()), pooled(mixed.size()) {
    for (T* node : data.nodes)
      states.push_back({node, cell.pixels() * cell.channels, cell.ow * cell.channels, cell.channels});
    states.insert(states.end(), data.node_states.begin(), data.node_states.end());
    if (period == cm) return;
    repeated.resize(cell.conv_weights_size / cm * period);
    for (int64_t r = 0; r < cell.conv_weights_size / cm; r++)
      for (int64_t j = 0; j < period; j += cm) std::copy_n(data.conv_weights + r * cm, cm, repeated.data() + r * period + j);
  }

  // packed weights of one convolution pair
  struct Pair {
    const T *dw, *pw, *pw_t;
    Conv conv;
  };
  Pair pair(const Branch& b, bool second, int stride) const {
    if (second) stride = 1;
    bool wide = stride != 1 || period == cm;
    const T* base = wide ? data.conv_weights : repeated.data();
    int64_t row = wide ? cm : period, taps = b.kernel * b.kernel;
    const T* dw = base + (b.weight / cm + (second ? taps + 2 * cm : 0)) * row;
    return {dw, dw + taps * row, dw + (taps + cm) * row, {b.kernel, b.dilation, stride}};
  }
  // multiply-adds of 16 lanes that one of its convolutions costs an image; see Queue
  int64_t work(const Branch& b) const {
    int64_t taps = b.op == Op::Reduce ? 2 * cm : b.kernel * b.kernel + cm;
    return cell.pixels() * cm / 16 * taps;
  }
  S* branch_output(int s, int64_t n) const { return data.branch_outputs + (s * cell.images + n) * cell.image_size(); }
  double mean(int norm, int64_t i) const { return data.moments[norm * cm + i]; }
  double variance(int norm, int64_t i) const { return data.moments[(cell.norms + norm) * cm + i]; }
  double rstd(int norm, int64_t i) const { return 1 / std::sqrt(variance(norm, i) + cell.eps); }
  double gamma(int norm, int64_t i) const { return data.gamma[norm * cm + i]; }
  double beta(int norm, int64_t i) const { return data.beta[norm * cm + i]; }
  double mix(int edge, int primitive) const { return data.op_weights[edge * cell.primitives + primitive]; }
  double edge_weight(int edge) const { return data.edge_weights ? data.edge_weights[edge] : 1; }
  double term_weight(int edge, int primitive) const { return mix(edge, primitive) * edge_weight(edge); }

  T* take(int64_t n) const { return static_cast<T*>(allocate(n * int64_t(sizeof(T)))); }
  double* take_sums(int64_t n) const { return static_cast<double*>(allocate(n * int64_t(sizeof(double)))); }
  Moments take_moments(int64_t count) const {
    return {count, cm, take_sums(Moments::size(cell.images, count, cm))};
  }

  // Where `mixed` and `bypass` of state s will be: both are read once per edge. `make_dense` fills them.
  void plan_dense(int s, bool bypassed) {
    const Source& source = cell.sources[s];
    const BatchView<T>& x = states[s];
    int64_t h = source.h, w = source.w, c = cell.channels, row = cell.ow * c, full = cell.oh * row;
    mixed[s] = x.data;
    bypass[s] = x;
    if (cell.K > 1 || x.pixel != c || x.row != w * c || x.image != h * w * c)
      mixed[s] = packed[s] = take(cell.images * h * w * cm);
    if (bypassed && source.stride == 2) bypass[s] = {pooled[s] = take(cell.images * full), full, row, c};
  }
  void make_dense(int s, int64_t n) const {
    const Source& source = cell.sources[s];
    int64_t h = source.h, w = source.w, c = cell.channels;
    if (packed[s]) k.pack(states[s][n], h, w, cm, packed[s] + n * h * w * cm);
    if (pooled[s]) k.half_pool_forward(states[s][n], h, w, c, pooled[s] + n * cell.pixels() * c);
  }
  const T* mixed_image(int s, int64_t n) const {
    return mixed[s] + n * cell.sources[s].h * cell.sources[s].w * cm;
  }

  // A few rows of both pools of a state at a time, so that they are used in the first-level cache.
  struct PoolRoom {
    T *max, *avg, *scratch;
  };
  int64_t pool_rows() const { return std::min(std::max<int64_t>(2048 / (cell.ow * cm), 1), cell.oh); }
  PoolRoom take_pool_room(Scratch& room, int64_t width) const {
    int64_t size = pool_rows() * cell.ow * cm;
    return {room.take<T>(size), room.take<T>(size), room.take<T>(3 * (width + 2) * cm + 64)};
  }
  // f(element, size, max, avg)
  template <class F>
  void each_pool_rows(const Source& source, const T* x, const PoolRoom& room, F&& f) const {
    int64_t rows = pool_rows(), row = cell.ow * cm;
    for (int64_t r = 0; r < cell.oh; r += rows) {
      int64_t count = std::min(rows, cell.oh - r);
      k.pool_forward(x, source.h, source.w, cm, source.stride, r, count, room.max, room.avg, room.scratch);
      f(r * row, count * row, room.max, room.avg);
    }
  }
};

}  // namespace rfdarts
