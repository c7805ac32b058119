// The launches of the convolutions of NAS-Bench-201 in a forward, and in a backward of those that are made again;
// before them, that of what tensor cores take of all their weights.
#pragma once
#include "cuda/cell_context.h"
#include "cuda/nor_conv_factors.h"
#include "cuda/nor_conv_forward.h"

namespace rfdarts::cuda {

// with fewer tiles, multiprocessors would have less than their two blocks: each branch has blocks of its own
constexpr int kFewTiles = 256;

// f(TensorCores), which only 16-bit storage can have
template <class T, class F>
void with_products(bool tensor_cores, F&& f) {
  if constexpr (sizeof(T) == 2)
    if (tensor_cores) return f.template operator()<true>();
  f.template operator()<false>();
}

// Takes memory for run.factors, and in a backward for run.transposed_factors; of the former it needs those of what is
// made again.
template <class T>
void launch_nor_conv_factors(CellContext<T>& run, bool backward) {
  if constexpr (sizeof(T) == 2) {
    const Cell& cell = run.cell;
    NorConvFactors<T> p{run.cm, run.conv_weights, 0, {}};
    auto launch_all = [&] {
      dim3 grid(ceil_div(9 * run.cm * run.cm / 8, kThreads), p.convolutions);
      if (p.convolutions) launch(nor_conv_factors_kernel<T>, grid, 0, run.queue, p);
      p.convolutions = 0;
    };
    auto add = [&](const Branch& b, T*& factors, int64_t behind) {
      if (!factors) factors = run.template take<T>(cell.conv_weights_size / 2);
      p.convolution[p.convolutions++] = {b.weight + behind, factors + b.weight / 2, b.kernel * b.kernel};
      if (p.convolutions == kMaxBranches) launch_all();
    };
    if (!run.on_tensor_cores()) return;
    for (const Edge& edge : cell.edges)
      for (const Branch& b : edge.branches) {
        if (b.op != Op::NorConv) continue;
        if (!backward || b.remade()) add(b, run.factors, int64_t(b.kernel) * b.kernel * run.cm * run.cm);
        if (backward) add(b, run.transposed_factors, 0);
      }
    launch_all();
  }
}

// Of the edges that leave states [first, last), the branches that are `wanted`. Takes memory for the outputs that are
// not kept. Returns the parameters; of a launch only if they have branches.
template <class T, class Wanted>
NorConvForward<T> launch_nor_convs(CellContext<T>& run, int first, int last, bool statistics, Wanted&& wanted) {
  const Cell& cell = run.cell;
  NorConvForward<T> p{};
  p.h = run.oh, p.w = run.ow, p.c = run.cm, p.image = cell.image_size();
  p.wide = true, p.conv_weights = run.conv_weights, p.factors = run.factors;
  int rows = 0;
  for (int s = first; s < last; s++) {
    int begin = p.branches;
    for (int e : cell.sources[s].edges)
      for (const Branch& b : cell.edges[e].branches) {
        if (b.op != Op::NorConv || !wanted(b)) continue;
        require(p.branches < kMaxBranches, "branches of a state");
        if (b.remade()) run.remade[e] = run.template take<T>(cell.images * p.image);
        p.branch[p.branches++] = {run.output(e, b), b.weight, b.kernel, b.norm};
        p.reach = std::max(p.reach, b.kernel / 2);
      }
    if (p.branches == begin) continue;
    p.state[rows++] = {run.states[s], begin, p.branches};
    p.wide = p.wide && run.wide(run.states[s]);
  }
  if (!p.branches) return p;
  with_products<T>(run.on_tensor_cores(), [&]<bool TensorCores>() {
    auto bytes_of = [&](const Tiling& t) { return NorConvForwardTile<T, TensorCores>(t, p.c, p.reach).bytes; };
    p.tiling = choose_tiling(run.queue, run.n, p.h, p.w, 0, 0, bytes_of);
    if (p.tiling.count < kFewTiles) {
      // from the last on, as no row's branches come before it
      while (rows--)
        for (auto all = p.state[rows]; all.end-- > all.begin;) p.state[all.end] = {all.x, all.end, all.end + 1};
      rows = p.branches;
    }
    if (statistics) p.partial = run.template take<double>(int64_t(p.branches) * 2 * p.tiling.count * p.c);
    launch(nor_conv_forward_kernel<T, TensorCores>, dim3(p.tiling.count, rows), bytes_of(p.tiling), run.queue, p);
  });
  return p;
}

}  // namespace rfdarts::cuda
