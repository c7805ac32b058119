// A cell forward as a sequence of launches: per state stages 1 and 2, each with the merge of its statistics; per
// node one pass.
#pragma once
#include "cuda/cell_parts.h"

namespace rfdarts::cuda {

template <class T>
struct RunForward : CellParts<T> {
  using Parts = CellParts<T>;
  using Parts::cell, Parts::cm, Parts::data, Parts::n, Parts::norms, Parts::oh, Parts::ow, Parts::stream;
  using Parts::Parts;

  // feeds: the BatchNorms behind each branch
  void convolve(ConvForward<T>& p, const std::vector<std::vector<int>>& feeds, int stride) {
    if (!p.branches) return;
    p.oh = oh, p.ow = ow, p.c = cm, p.image = cell.image_size(), p.weights = this->weights, p.norms = norms;
    p.tiling = forward_tiling<T>(n, oh, ow, cm, p.reach, stride);
    p.wide = true;
    for (int b = 0; b < p.branches; b++) p.wide = p.wide && this->wide(p.branch[b].x);
    bool moments = cell.training;
    p.partial = moments ? this->template take<double>(int64_t(p.branches) * 2 * p.tiling.count * cm) : nullptr;
    int shared = ForwardShared<T>(p.tiling, cm, p.reach, stride).bytes;
    auto kernel = stride == 1 ? conv_forward_kernel<T, 1> : conv_forward_kernel<T, 2>;
    launch(kernel, dim3(p.tiling.count), shared, stream, p);
    if (!moments) return;
    Moments m{p.tiling, n, oh, ow, cm, cell.norms, p.partial, data.moments, 0, {}};
    for (size_t b = 0; b < feeds.size(); b++)
      for (int norm : feeds[b]) {
        Parts::require(m.count < 2 * kMaxBranches, "BatchNorms behind a state");
        m.target[m.count++] = {int16_t(b), int16_t(norm)};
      }
    dim3 grid(m.count, ceil_div(cm, kMergeChannels));
    launch(merge_moments_kernel<kMergeChannels>, grid, kThreads * sizeof(double), stream, m);
  }
  typename ConvForward<T>::Branch& add(ConvForward<T>& p) {
    Parts::require(p.branches < kMaxBranches, "branches of a state");
    return p.branch[p.branches++];
  }

  void stage1(int s) {
    const Source& source = cell.sources[s];
    ConvForward<T> p{};
    p.h = int(source.h), p.w = int(source.w);
    std::vector<std::vector<int>> feeds;
    std::vector<int> pools[2];
    for (int e : source.edges)
      for (const Branch& b : cell.edges[e].branches) {
        if (b.pools()) pools[b.op == Op::AvgPool].push_back(b.norm);
        if (!b.convolves()) continue;
        bool sep = b.op == Op::SepConv;
        add(p) = {this->states[s], this->branch_output(sep ? b.inner_output : b.output), b.weight, -1, int16_t(b.op),
                  int8_t(b.kernel), int8_t(b.dilation)};
        p.reach = std::max(p.reach, this->reach(b));
        feeds.push_back({sep ? b.inner_norm : b.norm});
      }
    if (cell.training)
      for (Op op : {Op::MaxPool, Op::AvgPool}) {
        if (pools[op == Op::AvgPool].empty()) continue;
        add(p) = {this->states[s], nullptr, 0, -1, int16_t(op), 3, 1};
        p.reach = std::max(p.reach, 1);
        feeds.push_back(pools[op == Op::AvgPool]);
      }
    convolve(p, feeds, source.stride);
  }

  void stage2(int s) {
    ConvForward<T> p{};
    p.h = oh, p.w = ow;
    std::vector<std::vector<int>> feeds;
    for (int e : cell.sources[s].edges)
      for (const Branch& b : cell.edges[e].branches) {
        if (b.op != Op::SepConv) continue;
        int64_t second = b.weight + int64_t(b.kernel) * b.kernel * cm + 2 * int64_t(cm) * cm;
        add(p) = {this->branch_output_images(b.inner_output), this->branch_output(b.output), second, b.inner_norm, int16_t(b.op),
                  int8_t(b.kernel), int8_t(b.dilation)};
        p.reach = std::max(p.reach, this->reach(b));
        feeds.push_back({b.norm});
      }
    convolve(p, feeds, 1);
  }

  template <int K, int V>
  void launch_node(const Node<T>& p, const Images<T>& out) {
    int shared = (2 * p.rows() + 1) * cm * int(sizeof(Acc<T>));
    launch(node_forward_kernel<T, K, V>, this->grid(cell.images * cell.pixels() * cm / V), shared, stream, p, out);
  }
  void node(int i) {
    Node<T> p = this->node_of(i);
    const Images<T>& out = this->states[cell.inputs + i];
    // more than 16 accumulators a group of channels would cost registers, not save loads
    constexpr int narrow = kWide<T> < 4 ? kWide<T> : 4;
    auto with = [&]<int K>() {
      constexpr int v = K == 1 ? kWide<T> : narrow;
      this->aligned_node(p, v) && aligned(out, v) ? launch_node<K, v>(p, out) : launch_node<K, 1>(p, out);
    };
    switch (cell.K) {
      case 1: return with.template operator()<1>();
      case 2: return with.template operator()<2>();
      case 4: return with.template operator()<4>();
      case 8: return with.template operator()<8>();
    }
    throw std::invalid_argument("K: the CUDA kernels know 1, 2, 4 and 8");
  }
};

template <class T>
void run_forward(const Cell& cell, const CellForward& data, bool nodes, cudaStream_t stream, const Allocate& allocate) {
  RunForward<T> run(cell, data, stream, allocate);
  for (int s = 0; s < cell.inputs + cell.nodes; s++) {
    if (nodes && s >= cell.inputs) run.node(s - cell.inputs);
    if (cell.sources[s].edges.empty()) continue;
    run.stage1(s);
    run.stage2(s);
  }
}

}  // namespace rfdarts::cuda
