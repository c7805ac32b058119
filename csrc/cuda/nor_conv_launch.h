// The launch of the convolutions of NAS-Bench-201 in a forward, and in a backward of those that are made again.
#pragma once
#include "cuda/cell_context.h"
#include "cuda/nor_conv_forward.h"

namespace rfdarts::cuda {

// f(TensorCores), which only 16-bit storage can have
template <class T, class F>
void with_products(bool tensor_cores, F&& f) {
  if constexpr (sizeof(T) == 2)
    if (tensor_cores) return f.template operator()<true>();
  f.template operator()<false>();
}

// Of the edges that leave states [first, last), the branches that are `wanted`. Takes memory for the outputs that are
// not kept. Returns the parameters; of a launch only if they have branches.
template <class T, class Wanted>
NorConvForward<T> launch_nor_convs(CellContext<T>& run, int first, int last, bool statistics, Wanted&& wanted) {
  const Cell& cell = run.cell;
  NorConvForward<T> p{};
  p.h = run.oh, p.w = run.ow, p.c = run.cm, p.image = cell.image_size();
  p.wide = true, p.conv_weights = run.conv_weights;
  int states = 0;
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
    require(states < kMaxIncoming, "states of a cell");
    p.state[states++] = {run.states[s], begin, p.branches};
    p.wide = p.wide && run.wide(run.states[s]);
  }
  if (!p.branches) return p;
  with_products<T>(run.on_tensor_cores(), [&]<bool TensorCores>() {
    auto bytes_of = [&](const Tiling& t) { return NorConvForwardTile<T, TensorCores>(t, p.c, p.reach).bytes; };
    p.tiling = choose_tiling(run.queue, run.n, p.h, p.w, 0, 0, bytes_of);
    if (statistics) p.partial = run.template take<double>(int64_t(p.branches) * 2 * p.tiling.count * p.c);
    launch(nor_conv_forward_kernel<T, TensorCores>, dim3(p.tiling.count, states), bytes_of(p.tiling), run.queue, p);
  });
  return p;
}

}  // namespace rfdarts::cuda
