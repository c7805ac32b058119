// What a cell's forward and backward share.
#pragma once
#include <algorithm>
#include <cmath>

#include "cpu/cell.h"
#include "cpu/fetch_queue.h"
#include "cpu/per_channel.h"
#include "cpu/scratch.h"

namespace rfdarts {

template <class T, class S>
struct CellContext {
  const Cell& cell;
  const CellForward& data;
  const Parallel& parallel;
  const Allocate& allocate;
  const Kernels<T, S>& k = data.bfloat16_products ? kernels_of_products<T, S>() : kernels<T, S>();
  int64_t cm = cell.mixed_channels, period = k.period(cm);
  // elements of an image of the cell's output: of the mixed channels, and of all
  int64_t mixed_size = cell.pixels() * cm, full_size = cell.pixels() * cell.channels;
  const T* conv_weights = typed(data.conv_weights);
  // packed convolutions, rows repeated to `period`
  std::vector<T> repeated;
  std::vector<BatchView<T>> states;
  // per state: the mixed op's channels, dense; what bypasses the mixed op, at the size of the cell's output
  std::vector<const T*> mixed;
  std::vector<BatchView<T>> bypass;
  // where `make_dense` puts them, null where they are in the state itself
  std::vector<T*> packed, pooled;
  // of BatchNorms, of this process's images alone yet
  std::vector<Moments> own_moments;

  CellContext(const Cell& cell, const CellForward& data, const Parallel& parallel, const Allocate& allocate)
      : cell(cell), data(data), parallel(parallel), allocate(allocate), mixed(cell.states()), bypass(mixed.size()),
        packed(mixed.size()), pooled(mixed.size()) {
    for (const auto* list : {&data.inputs, &data.nodes})
      for (const States& x : *list) states.emplace_back(x);
    if (period == cm) return;
    int64_t rows = cell.conv_weights_size / cm;
    repeated.resize(rows * period);
    for (int64_t r = 0; r < rows; r++)
      for (int64_t j = 0; j < period; j += cm)
        std::copy_n(conv_weights + r * cm, cm, repeated.data() + r * period + j);
  }

  static const T* typed(const void* p) { return static_cast<const T*>(p); }
  Size source_size(int s) const { return {cell.sources[s].h, cell.sources[s].w, cm}; }
  Size output_size() const { return {cell.oh, cell.ow, cm}; }
  // values of a channel behind its statistics
  double count() const {
    return double((data.processes.sum ? data.processes.images : cell.images) * cell.pixels());
  }
  void merge_over_processes() {
    rfdarts::merge_over_processes(data.processes.sum, double(cell.images * cell.pixels()), count(), own_moments);
    own_moments.clear();
  }
  // one of a branch's separable convolutions
  Conv<T> conv(const Branch& b, bool second, int stride) const {
    bool wide = stride != 1 || period == cm;
    const T* base = wide ? conv_weights : repeated.data();
    int64_t row = wide ? cm : period, taps = b.kernel * b.kernel;
    const T* dw = base + (b.weight / cm + (second ? taps + 2 * cm : 0)) * row;
    return {b.kernel, b.dilation, stride, dw, dw + taps * row, dw + (taps + cm) * row};
  }
  // a convolution of NAS-Bench-201, or, for the backward, its transpose: weights and transformed weights
  std::pair<const T*, const T*> nor_conv(const Branch& b, bool transposed) const {
    int64_t taps = b.kernel * b.kernel, square = cm * cm;
    const T* weights = conv_weights + b.weight;
    return {weights + transposed * taps * square, weights + (2 * taps + transposed * 16) * square};
  }
  // multiply-adds of 16 lanes that one of its convolutions costs an image; see FetchQueue
  int64_t work(const Branch& b) const {
    int64_t taps = b.kernel * b.kernel + cm;
    // Winograd has 16 products for 4 outputs
    if (b.op == Op::NorConv) taps = (b.kernel == 3 ? 4 : 1) * cm;
    return cell.pixels() * cm / 16 * taps;
  }
  S* branch_output(int i, int64_t n) const {
    return static_cast<S*>(data.branch_outputs) + (i * cell.images + n) * cell.image_size();
  }

  double mean(int norm, int64_t i) const { return data.moments[norm * cm + i]; }
  double variance(int norm, int64_t i) const { return data.moments[(cell.norms + norm) * cm + i]; }
  double rstd(int norm, int64_t i) const { return 1 / std::sqrt(variance(norm, i) + cell.eps); }
  double gamma(int norm, int64_t i) const { return typed(data.gamma)[norm * cm + i]; }
  double beta(int norm, int64_t i) const { return typed(data.beta)[norm * cm + i]; }
  double op_weight(int edge, int primitive) const {
    return typed(data.op_weights)[edge * cell.primitives + primitive];
  }
  double edge_weight(int edge) const { return data.edge_weights ? typed(data.edge_weights)[edge] : 1; }
  double term_weight(int edge, int primitive) const { return op_weight(edge, primitive) * edge_weight(edge); }
  // a BatchNorm as scale y + shift, and its mean: rows 0, 1, 2
  Coefficients<T> affine(int norm) const {
    Coefficients<T> rows(3, cm, period);
    for (int64_t i = 0; i < cm; i++) {
      double scale = gamma(norm, i) * rstd(norm, i);
      rows.set(0, i, scale);
      rows.set(1, i, beta(norm, i) - mean(norm, i) * scale);
      rows.set(2, i, mean(norm, i));
    }
    return rows;
  }

  T* take(int64_t n) const { return static_cast<T*>(allocate(n * int64_t(sizeof(T)))); }
  double* take_sums(int64_t n) const { return static_cast<double*>(allocate(n * int64_t(sizeof(double)))); }
  ImageMoments take_moments(int64_t count) const {
    return {count, cm, take_sums(ImageMoments::size(cell.images, count, cm))};
  }

  // Where `mixed` and `bypass` of state s will be: both are read once per edge. `make_dense` fills them.
  void plan_dense(int s, bool bypassed) {
    const Source& source = cell.sources[s];
    const BatchView<T>& x = states[s];
    int64_t h = source.h, w = source.w, c = cell.channels;
    mixed[s] = x.data;
    bypass[s] = x;
    if (cell.K > 1 || x.pixel != c || x.row != w * c || x.image != h * w * c)
      mixed[s] = packed[s] = take(cell.images * h * w * cm);
    if (bypassed && source.stride == 2)
      bypass[s] = {pooled[s] = take(cell.images * full_size), full_size, cell.ow * c, c};
  }
  void make_dense(int s, int64_t n) const {
    auto [h, w, _] = source_size(s);
    if (packed[s]) k.pack(states[s][n], {h, w, cm}, packed[s] + n * h * w * cm);
    if (pooled[s]) k.half_pool_forward(states[s][n], {h, w, cell.channels}, pooled[s] + n * full_size);
  }
  const T* mixed_image(int s, int64_t n) const {
    return mixed[s] + n * cell.sources[s].h * cell.sources[s].w * cm;
  }

  // rows that were made again from a state
  struct Remade {
    const T *max, *avg, *conv;
  };
  // What a branch without branch output adds to its node, from element `at` of image n on: a part of its state x, of a
  // pool or 1x1 convolution of it, or noise.
  const T* stream(const Branch& b, const T* x, int64_t n, int64_t at, const Remade& rows) const {
    if (b.pools()) return b.op == Op::MaxPool ? rows.max : rows.avg;
    if (b.remade()) return rows.conv;
    return (b.op == Op::Noise ? typed(data.noise[b.noise]) + n * mixed_size : x) + at;
  }

  // A few rows at a time of both pools of a state, or of a 1x1 convolution, so that they are used in the first-level
  // cache.
  struct RowRoom {
    static constexpr int64_t kElements = 2048;
    int64_t rows;
    T *max, *avg, *conv, *scratch;
    // width: of the widest state
    RowRoom(Scratch& room, const CellContext& run, int64_t width) {
      int64_t row = run.cell.ow * run.cm;
      rows = std::min(std::max<int64_t>(kElements / row, 1), run.cell.oh);
      max = room.take<T>(rows * row);
      avg = room.take<T>(rows * row);
      conv = room.take<T>(rows * row);
      scratch = room.take<T>(std::max(ScratchSize<T>::pool_forward(width, run.cm), rows * row));
    }
  };
  // f(element, count, rows); conv: the 1x1 convolution, or null
  template <class F>
  void each_rows(int s, const T* x, const RowRoom& room, bool pools, const Branch* conv, F&& f) const {
    int64_t row = cell.ow * cm;
    for (int64_t r = 0; r < cell.oh; r += room.rows) {
      int64_t count = std::min(room.rows, cell.oh - r);
      if (pools)
        k.pool_forward(x, source_size(s), cell.sources[s].stride, r, count, room.max, room.avg, room.scratch);
      if (conv)
        k.relu_conv1x1(x + r * row, count * cell.ow, cm, conv_weights + conv->weight, room.conv, room.scratch);
      f(r * row, count * row, Remade{room.max, room.avg, room.conv});
    }
  }
};

// A pass of a cell over its images, planned by the constructor; Run: the cell's forward or backward.
template <class T, class S, class Run>
struct Phase {
  Run& run;
  const Cell& cell = run.cell;
  const Kernels<T, S>& k = run.k;
  int64_t cm = run.cm, period = run.period;
};

}  // namespace rfdarts
