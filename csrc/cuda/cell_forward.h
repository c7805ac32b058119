// A cell forward as a sequence of launches: for the inputs, and then per state, first and second convolutions and those
// of NAS-Bench-201, each with the merge of their statistics; per node one pass.
#pragma once
#include "cuda/nor_conv_launch.h"
#include "cuda/node_forward.h"
#include "cuda/strip_conv_forward.h"

namespace rfdarts::cuda {

template <class T>
struct ForwardPass : CellContext<T> {
  using Context = CellContext<T>;
  using Context::cell, Context::cm, Context::data, Context::n, Context::norms, Context::oh, Context::ow,
      Context::queue;
  using Context::Context;
  // what is not kept is computed too
  bool remakes = true;
  // of this process's images alone yet
  std::vector<Means<double>> own_moments;

  // The branches of one launch, and the BatchNorms that take the statistics of each.
  struct Convs {
    ConvForward<T> p{};
    int states = 0;
    std::vector<std::vector<int>> norms;

    void add(const typename ConvForward<T>::Branch& branch, int reach, std::vector<int> norms_behind) {
      require(p.branches < kMaxBranches, "branches of a state");
      p.branch[p.branches++] = branch;
      p.reach = std::max(p.reach, reach);
      norms.push_back(std::move(norms_behind));
    }
    // all since `begin` are a state's, the last of them pools
    void end_state(int begin, int pools) {
      if (p.branches > begin) p.state[states++] = {begin, pools, p.branches};
    }
  };

  void launch_convs(Convs& convs, int h, int w, int stride) {
    ConvForward<T>& p = convs.p;
    if (!p.branches) return;
    p.h = h, p.w = w, p.oh = oh, p.ow = ow, p.c = cm, p.image = cell.image_size();
    p.conv_weights = this->conv_weights, p.norms = norms;
    p.wide = true;
    for (int b = 0; b < p.branches; b++) p.wide = p.wide && this->wide(p.branch[b].x);
    bool launched = false;
    if constexpr (sizeof(T) == 2) launched = stride == 1 && launch_strips(p, convs.states);
    if (!launched) {
      p.tiling = forward_tiling<T>(queue, n, oh, ow, cm, p.reach, stride);
      take_partial(p);
      int shared = ForwardTile<T>(p.tiling, cm, p.reach, stride).bytes;
      auto kernel = stride == 1 ? conv_forward_kernel<T, 1> : conv_forward_kernel<T, 2>;
      launch(kernel, dim3(p.tiling.count, convs.states), shared, queue, p);
    }
    if (cell.training) merge_moments(p.tiling, p.partial, convs.norms);
  }
  void take_partial(ConvForward<T>& p) {
    if (cell.training) p.partial = this->template take<double>(int64_t(p.branches) * 2 * p.tiling.count * cm);
  }
  // Whether the branches are ones for strip_conv_forward_kernel; if so, it is launched and p has its tiling.
  bool launch_strips(ConvForward<T>& p, int states) {
    int group = this->strips_side_by_side();
    if (!group) return false;
    StripConvForward<T> s{p, group, true};
    for (int k = 0; k < states; k++)
      for (int b = p.state[k].begin; b < p.state[k].end; b++) {
        if (!this->for_strips(p.branch[b].x, p.h, p.w)) return false;
        s.one_source = s.one_source && p.branch[b].x.data == p.branch[p.state[k].begin].x.data;
      }
    auto bytes_of = [&](const Tiling& t) {
      return with_strip_tile(t, [&]<int H, int W>() {
        StripForwardTile<T, H, W> tile(p.reach, cm, group, s.one_source);
        return tile.pixel_tiles() > kPixelTiles ? -1 : tile.bytes;
      });
    };
    auto tiling = strip_tiling(queue, n, oh, ow, cm, bytes_of);
    if (!tiling) return false;
    p.tiling = s.tiling = *tiling;
    take_partial(p);
    s.partial = p.partial;
    with_strip_tile(s.tiling, [&]<int H, int W>() {
      launch(strip_conv_forward_kernel<T, H, W>, dim3(s.tiling.count, states), bytes_of(s.tiling), queue, s);
    });
    return true;
  }
  // norms: of each branch
  void merge_moments(const Tiling& tiling, const double* partial, const std::vector<std::vector<int>>& norms) {
    MergeMoments m{tiling, n, oh, ow, 0, {}};
    for (size_t b = 0; b < norms.size(); b++)
      for (int norm : norms[b]) {
        require(m.count < 2 * kMaxBranches, "BatchNorms behind a state");
        double* moments = data.moments + int64_t(norm) * cm;
        m.target[m.count++] = {partial + int64_t(b) * 2 * tiling.count * cm, moments, cm, cell.norms};
        own_moments.push_back({moments, moments + int64_t(cell.norms) * cm, cm});
      }
    launch(merge_moments_kernel<kSumChannels>, dim3(m.count, ceil_div(cm, kSumChannels)), room_for(3), queue, m);
  }

  void add_first_convs(Convs& convs, int s) {
    std::vector<int> max_norms, avg_norms;
    int begin = convs.p.branches;
    for (int e : cell.sources[s].edges)
      for (const Branch& b : cell.edges[e].branches) {
        if (b.pools()) (b.op == Op::MaxPool ? max_norms : avg_norms).push_back(b.norm);
        if (!b.convolves() || b.op == Op::NorConv) continue;
        bool sep = b.op == Op::SepConv;
        convs.add({this->states[s], this->branch_output(sep ? b.inner_output : b.output), b.weight, -1, int16_t(b.op),
                   int8_t(b.kernel), int8_t(b.dilation)},
                  this->reach(b), {sep ? b.inner_norm : b.norm});
      }
    int pools = convs.p.branches;
    // pools are computed for their statistics alone
    auto add_pool = [&](Op op, const std::vector<int>& norms) {
      if (cell.training && !norms.empty())
        convs.add({this->states[s], nullptr, 0, -1, int16_t(op), 3, 1}, 1, norms);
    };
    add_pool(Op::MaxPool, max_norms);
    add_pool(Op::AvgPool, avg_norms);
    convs.end_state(begin, pools);
  }
  void add_second_convs(Convs& convs, int s) {
    int begin = convs.p.branches;
    for (int e : cell.sources[s].edges)
      for (const Branch& b : cell.edges[e].branches)
        if (b.op == Op::SepConv)
          convs.add({this->mixed(this->branch_output(b.inner_output)), this->branch_output(b.output),
                     this->second_weight(b), b.inner_norm, int16_t(b.op), int8_t(b.kernel), int8_t(b.dilation)},
                    this->reach(b), {b.norm});
    convs.end_state(begin, convs.p.branches);
  }
  // of states [first, last), which are alike
  void convs(int first, int last) {
    const Source& source = cell.sources[first];
    Convs halves[2];
    for (int s = first; s < last; s++) add_first_convs(halves[0], s), add_second_convs(halves[1], s);
    launch_convs(halves[0], int(source.h), int(source.w), source.stride);
    // second halves read what the first BatchNorms make
    if (halves[1].p.branches) merge_over_processes();
    launch_convs(halves[1], oh, ow, 1);
    for (int s = first; s < last; s++) nor_convs(s);
    merge_over_processes();
  }
  void merge_over_processes() {
    this->template over_processes<true>(own_moments);
    own_moments.clear();
  }
  void nor_convs(int s) {
    auto wanted = [&](const Branch& b) { return remakes || !b.remade(); };
    NorConvForward<T> p = launch_nor_convs(*this, s, s + 1, cell.training, wanted);
    std::vector<std::vector<int>> norms;
    for (int b = 0; b < p.branches; b++) norms.push_back({p.branch[b].norm});
    if (cell.training && p.branches) merge_moments(p.tiling, p.partial, norms);
  }
  // of all inputs, in one launch if there is room
  void input_convs() {
    int branches = 0;
    bool alike = cell.inputs <= kMaxStates;
    for (int s = 0; s < cell.inputs; s++) {
      const Source &one = cell.sources[s], &other = cell.sources[0];
      alike = alike && one.h == other.h && one.w == other.w && one.stride == other.stride;
      // each may have both pools
      branches += 2;
      for (int e : one.edges)
        for (const Branch& b : cell.edges[e].branches) branches += b.convolves() && b.op != Op::NorConv;
    }
    if (alike && branches <= kMaxBranches) return convs(0, cell.inputs);
    for (int s = 0; s < cell.inputs; s++) convs(s, s + 1);
  }

  template <int K, int V>
  void launch_node(const NodeForward<T>& p) {
    int64_t strips = cell.images * ceil_div(oh, kNodeRows) * ow * (cm / V);
    require(strips < int64_t(1) << 31, "pixels of a node");
    dim3 grid(unsigned(std::min(ceil_div<int64_t>(strips, kThreads), kMaxNodeBlocks)));
    launch(node_forward_kernel<T, K, V>, grid, (2 * p.node.rows() + 1) * cm * int(sizeof(Acc<T>)), queue, p);
  }
  void node(int i) {
    NodeForward<T> p{this->node_of(i), this->states[cell.inputs + i]};
    this->with_partial_channels([&]<int K>() {
      constexpr int v = kNarrow<T>;
      bool vectors = this->aligned_node(p.node, v) && aligned(p.out, std::min(K * v, kWide<T>));
      vectors ? launch_node<K, v>(p) : launch_node<K, 1>(p);
    });
  }
};

template <class T>
void CellRun<T>::forward(const Cell& cell, const CellForward& data, const Queue& queue, const Allocate& allocate) {
  ForwardPass<T> pass(cell, data, queue, allocate);
  launch_nor_conv_factors(pass, false);
  pass.input_convs();
  for (int s = cell.inputs; s < cell.states(); s++) {
    pass.node(s - cell.inputs);
    pass.convs(s, s + 1);
  }
}
template <class T>
void CellRun<T>::branch_outputs(const Cell& cell, const CellForward& data, const Queue& queue,
                                const Allocate& allocate) {
  ForwardPass<T> pass(cell, data, queue, allocate);
  pass.remakes = false;
  launch_nor_conv_factors(pass, false);
  pass.input_convs();
  for (int s = cell.inputs; s < cell.states(); s++) pass.convs(s, s + 1);
}

}  // namespace rfdarts::cuda
