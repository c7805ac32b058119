// A cell backward as a sequence of launches, from the last state to the first: per node its sums, its gradients, and
// its separable convolutions' second halves; per state the gradient from all edges that leave it.
#pragma once
#include "cuda/node_backward.h"
#include "cuda/node_gradients.h"
#include "cuda/nor_conv_backward.h"
#include "cuda/nor_conv_launch.h"
#include "cuda/strip_second_convs_backward.h"
#include "cuda/strip_state_backward.h"

namespace rfdarts::cuda {

template <class T>
struct BackwardPass : CellContext<T> {
  using Context = CellContext<T>;
  using Context::c, Context::cell, Context::cm, Context::edge_weights, Context::n, Context::norms, Context::oh,
      Context::op_weights, Context::ow, Context::queue;
  const CellBackward& back;
  Acc<T>*grad_op_weights, *grad_edge_weights;
  double* edge_terms = nullptr;  // NodeGradients'
  NormOutputs<T> outputs;
  // gradients of states, whole; of nodes, the mixed op's channels only; at the inner BatchNorms' outputs
  std::vector<ImageView<T>> state_grad, mixed_grad;
  std::vector<T*> grad_z;

  BackwardPass(const Cell& cell, const CellBackward& back, const Queue& queue, const Allocate& allocate)
      : Context(cell, back.forward, queue, allocate), back(back), state_grad(cell.states()), mixed_grad(cell.nodes),
        grad_z(cell.outputs) {
    for (int i = 0; i < cell.nodes; i++) state_grad[cell.inputs + i] = view<T>(back.grad_nodes[i]);
    auto params = [](void* p) { return static_cast<Acc<T>*>(p); };
    grad_op_weights = params(back.grad_op_weights), grad_edge_weights = params(back.grad_edge_weights);
    outputs = {norms, double(cell.images * cell.pixels()), cell.training, params(back.grad_gamma),
               params(back.grad_beta), this->template take<Acc<T>>(int64_t(cell.norms) * 4 * cm)};
    zero(grad_op_weights, int64_t(cell.edges.size()) * cell.primitives);
    zero(outputs.grad_gamma, int64_t(cell.norms) * cm);
    zero(outputs.grad_beta, int64_t(cell.norms) * cm);
    launch_nor_conv_factors(*this, true);
    launch_nor_convs(*this, 0, cell.states(), false, [](const Branch& b) { return b.remade(); });
    if (!grad_edge_weights) return;
    int64_t terms = int64_t(cell.edges.size()) * (cell.primitives + 1);
    edge_terms = this->template take<double>(terms);
    zero(edge_terms, terms);
  }
  template <class U>
  void zero(U* p, int64_t count) {
    if (queue.launches) check(cudaMemsetAsync(p, 0, count * sizeof(U), queue.stream), "memset");
  }

  void node(int i) {
    int64_t pixels = cell.images * cell.pixels();
    ImageView<T>& g = state_grad[cell.inputs + i];
    if (!g.data) {
      T* none = this->template take<T>(pixels * c);
      zero(none, pixels * c);
      g = Context::dense(none, oh, ow, c);
    }
    NodeBackward<T> p{};
    p.node = this->node_of(i);
    p.g = mixed_grad[i] = g, p.bypasses = edge_terms && cell.K > 1;
    if (cell.K > 1) {
      p.mixed_g = this->template take<T>(pixels * cm);
      mixed_grad[i] = Context::dense(p.mixed_g, oh, ow, cm);
    }
    p.tiling = node_tiling<T>(n, oh, ow, cm);
    this->with_partial_channels([&]<int K>() {
      constexpr int v = kNarrow<T>;
      this->aligned_node(p.node, v) ? sums<K, v>(p) : sums<K, 1>(p);
    });
    NodeGradients<T> f{p.node, outputs, p.partial, p.tiling.count, int(cell.primitives), grad_op_weights, edge_terms};
    launch(node_gradients_kernel<T>, dim3(p.node.rows() + (p.bypasses ? p.node.incoming : 0)), room_for(2), queue, f);
    merge_over_processes(i, &Branch::norm);
  }
  // slopes and shifts of BatchNorms behind, or inside, the branches that enter node i
  void merge_over_processes(int i, int Branch::*norm) const {
    std::vector<Means<Acc<T>>> means;
    for (int e = cell.first_edge(i); cell.training && e < cell.first_edge(i + 1); e++)
      for (const Branch& b : cell.edges[e].branches)
        if (b.*norm >= 0) {
          Acc<T>* of = outputs.coefficients + int64_t(b.*norm) * 4 * cm;
          means.push_back({of + cm, of + 3 * cm, cm});
        }
    this->template over_processes<false>(means);
  }
  template <int K, int V>
  void sums(NodeBackward<T>& p) {
    p.lanes = std::min(32, ceil_div(cm, V)), p.step = 32 / p.lanes;
    // four warps share an edge where it has columns for them, and sums have room
    p.parts = std::clamp(std::min(128 / cm, ceil_div(p.tiling.tw, p.step)), 1, 4);
    p.wide = aligned(p.g, std::min(K * V, kWide<T>));
    int rows = p.node.rows() + 1 + (p.bypasses ? p.node.incoming : 0);
    p.partial = this->template take<double>(int64_t(rows) * p.tiling.count * cm);
    launch(node_backward_kernel<T, K, V>, dim3(p.tiling.count), p.shared_bytes(V), queue, p);
  }
  void edges() {
    if (!edge_terms) return;
    EdgeGradients<T> p{edge_terms, int(cell.edges.size()), int(cell.primitives) + 1, grad_edge_weights};
    launch(edge_gradients_kernel<T>, dim3(ceil_div(p.edges, kThreads)), 0, queue, p);
  }

  void lay_out(ConvBackward<T>& p, int h, int w) {
    p.h = h, p.w = w, p.oh = oh, p.ow = ow, p.c = cm, p.image = cell.image_size();
    p.conv_weights = this->conv_weights, p.norms = norms;
  }
  BackwardBranch<T> branch(const Branch& b, const ImageView<T>& g, const T* y, int norm, int64_t weight) const {
    return {g, y, outputs.coefficients + int64_t(norm) * 4 * cm, weight, int16_t(b.op), int8_t(b.kernel),
            int8_t(b.dilation)};
  }

  void second_convs(int i) {
    SecondConvsBackward<T> p{};
    int first = cell.first_edge(i), reach = 0;
    for (int e = first; e < first + cell.incoming(i); e++)
      for (const Branch& b : cell.edges[e].branches) {
        if (b.op != Op::SepConv) continue;
        require(p.branches < kMaxBranches / 2, "separable convolutions of a node");
        grad_z[b.output] = this->template take<T>(cell.images * cell.image_size());
        const T* y = this->branch_output(b.output);
        p.branch[p.branches++] = {branch(b, mixed_grad[i], y, b.norm, this->second_weight(b)),
                                  this->branch_output(b.inner_output), grad_z[b.output], b.inner_norm};
        reach = std::max(reach, this->reach(b));
      }
    if (!p.branches) return;
    p.wide = this->wide(mixed_grad[i]);
    lay_out(p, oh, ow);
    bool launched = false;
    if constexpr (sizeof(T) == 2) launched = launch_strips(p, mixed_grad[i], reach);
    if (!launched) {
      p.tiling = backward_tiling<T>(queue, n, oh, ow, cm, reach, 1, false, p.region);
      take_partial(p);
      int shared = BackwardTile<T>(p.tiling, p.region, false).bytes;
      launch(second_convs_backward_kernel<T>, dim3(p.tiling.count, p.branches), shared, queue, p);
    }
    NormGradients<T> f{p.tiling.count, {}};
    for (int b = 0; b < p.branches; b++)
      f.of[b] = {outputs, p.branch[b].inner_norm, p.partial + int64_t(b) * 2 * f.blocks * cm};
    launch(norm_gradients_kernel<T>, dim3(p.branches, ceil_div(cm, kSumChannels)), room_for(2), queue, f);
    merge_over_processes(i, &Branch::inner_norm);
  }

  void take_partial(SecondConvsBackward<T>& p) {
    p.partial = this->template take<double>(int64_t(p.branches) * 2 * p.tiling.count * cm);
  }
  // Whether these are convolutions for strip_second_convs_backward_kernel; if so, it is launched and p has its tiling.
  bool launch_strips(SecondConvsBackward<T>& p, const ImageView<T>& g, int reach) {
    int group = this->strips_side_by_side();
    if (!group || !this->for_strips(g, oh, ow)) return false;
    auto bytes_of = [&](const Tiling& t) {
      return with_strip_tile(t, [&]<int H, int W>() {
        StripBackwardTile<T, H, W> tile(cm, group, reach);
        return tile.fits() ? strip_second_convs_bytes(tile) : -1;
      });
    };
    auto tiling = strip_tiling(queue, n, oh, ow, cm, bytes_of);
    if (!tiling) return false;
    p.tiling = *tiling;
    take_partial(p);
    StripSecondConvsBackward<T> s{p, group, reach};
    dim3 grid(p.tiling.count, ceil_div(p.branches, group));
    with_strip_tile(p.tiling, [&]<int H, int W>() {
      launch(strip_second_convs_backward_kernel<T, H, W>, grid, bytes_of(p.tiling), queue, s);
    });
    return true;
  }

  // adds an edge that leaves the state: of its convolutions those of NAS-Bench-201, or the others; returns how far they
  // reach
  int add_edge(StateBackward<T>& p, int e, bool nor) const {
    const Edge& edge = cell.edges[e];
    require(p.leaving < kMaxIncoming, "edges that leave a state");
    auto& leaving = p.edge[p.leaving++];
    leaving = {mixed_grad[edge.node], e, -1, -1, -1, -1};
    p.wide = p.wide && this->wide(leaving.g);
    int reach = 0;
    for (int k = 0; k < cell.primitives; k++) {
      const Branch& b = edge.branches[k];
      if (b.op == Op::MaxPool) leaving.max_norm = b.norm;
      if (b.op == Op::AvgPool) leaving.avg_norm = b.norm;
      if (b.averages()) leaving.average_op = e * cell.primitives + k;
      if (b.op == Op::Identity) leaving.identity_op = e * cell.primitives + k;
      if (!b.convolves() || (b.op == Op::NorConv) != nor) continue;
      require(p.branches < kMaxBranches, "branches of a state");
      if (b.op == Op::SepConv)
        p.branch[p.branches++] = branch(b, this->mixed(grad_z[b.output]), this->branch_output(b.inner_output),
                                        b.inner_norm, b.weight);
      else
        p.branch[p.branches++] = branch(b, leaving.g, this->output(e, b), b.norm, b.weight);
      if (b.op != Op::Reduce) reach = std::max(reach, nor ? b.kernel / 2 : this->reach(b));
    }
    return reach;
  }
  // what both of its launches have in common; returns how far its convolutions reach
  int set(StateBackward<T>& p, int s, T* grad_x, bool nor) {
    const Source& source = cell.sources[s];
    p.x = this->states[s], p.outer = state_grad[s], p.grad_x = grad_x, p.channels = c;
    p.op_weights = op_weights, p.edge_weights = edge_weights;
    p.coefficients = outputs.coefficients, p.pools = source.pools;
    p.wide = cm % kWide<T> == 0;
    int reach = 0;
    for (int e : source.edges) reach = std::max(reach, add_edge(p, e, nor));
    lay_out(p, int(source.h), int(source.w));
    return reach;
  }
  // The gradient of state s, from every edge that leaves it and from outside the cell.
  void state(int s, T* grad_x) {
    bool nor = false, others = false;
    for (int e : cell.sources[s].edges)
      for (const Branch& b : cell.edges[e].branches) {
        nor = nor || b.op == Op::NorConv || b.averages();
        others = others || b.pools() || (b.convolves() && b.op != Op::NorConv);
      }
    // identities and the gradient from outside go to the first of two
    if (others || !nor) other_convs(s, grad_x);
    if (nor) nor_convs(s, grad_x, others);
    if (cell.K > 1) bypass(s, grad_x);
  }
  // more: grad_x has a part already
  void nor_convs(int s, T* grad_x, bool more) {
    NorConvBackward<T> p{};
    p.reach = set(p, s, grad_x, true);
    p.factors = this->transposed_factors;
    if (more) p.outer = Context::dense(grad_x, p.h, p.w, c);
    p.wide = p.wide && this->wide(p.x) && this->wide(p.outer);
    for (int e = 0; e < p.leaving; e++) {
      if (more) p.edge[e].identity_op = -1;
      if (p.edge[e].average_op >= 0) p.averages = true, p.reach = 1;
    }
    with_products<T>(this->on_tensor_cores(), [&]<bool TensorCores>() {
      auto bytes_of = [&](const Tiling& t) { return NorConvBackwardTile<T, TensorCores>(t, cm, p.reach).bytes; };
      p.tiling = choose_tiling(queue, n, p.h, p.w, 0, 0, bytes_of);
      launch(nor_conv_backward_kernel<T, TensorCores>, dim3(p.tiling.count), bytes_of(p.tiling), queue, p);
    });
  }
  void other_convs(int s, T* grad_x) {
    const Source& source = cell.sources[s];
    StateBackward<T> p{};
    int reach = set(p, s, grad_x, false);
    bool launched = false;
    if constexpr (sizeof(T) == 2) launched = source.stride == 1 && launch_strips(p, reach);
    if (!launched) {
      p.tiling = backward_tiling<T>(queue, n, p.h, p.w, cm, reach, source.stride, p.pools, p.region);
      int shared = BackwardTile<T>(p.tiling, p.region, p.pools).bytes;
      auto kernel = source.stride == 1 ? state_backward_kernel<T, 1> : state_backward_kernel<T, 2>;
      launch(kernel, dim3(p.tiling.count), shared, queue, p);
    }
  }
  // Whether the state is one for strip_state_backward_kernel; if so, it is launched.
  bool launch_strips(StateBackward<T>& p, int reach) {
    int group = this->strips_side_by_side();
    bool all = group && n <= kMostGridRows && c % 4 == 0;
    all = all && this->for_strips(p.x, p.h, p.w) && this->for_strips(p.outer, p.h, p.w);
    for (int e = 0; e < p.leaving; e++) all = all && this->for_strips(p.edge[e].g, oh, ow);
    if (!all) return false;
    auto bytes_of = [&](const Tiling& t) {
      return with_strip_tile(t, [&]<int H, int W>() {
        StripBackwardTile<T, H, W> tile(cm, group, reach);
        int pools = p.pools ? tile.staged + StripPools<T, H, W>(cm).bytes : 0;
        return tile.fits() ? std::max(tile.bytes, pools) : -1;
      });
    };
    auto tiling = strip_tiling(queue, n, p.h, p.w, cm, bytes_of);
    if (!tiling) return false;
    p.tiling = *tiling;
    StripStateBackward<T> s{p, group, reach};
    with_strip_tile(p.tiling, [&]<int H, int W>() {
      dim3 grid(p.tiling.across, p.tiling.down, n);
      launch(strip_state_backward_kernel<T, H, W>, grid, bytes_of(p.tiling), queue, s);
    });
    return true;
  }
  void bypass(int s, T* grad_x) {
    const Source& source = cell.sources[s];
    BypassBackward<T> p{this->states[s], state_grad[s], grad_x, edge_weights, n, int(source.h), int(source.w), oh, ow,
                        cm, c, source.stride, 0, {}};
    for (int e : source.edges) p.edge[p.leaving++] = {state_grad[cell.inputs + cell.edges[e].node], e};
    this->with_partial_channels([&]<int K>() {
      constexpr int v = kNarrow<T>;
      bool vectors = cm % v == 0 && aligned(p.x, v) && aligned(p.outer, v);
      for (int e = 0; e < p.leaving; e++) vectors = vectors && aligned(p.edge[e].g, std::min(K * v, kWide<T>));
      vectors ? launch_bypass<K, v>(p) : launch_bypass<K, 1>(p);
    });
  }
  template <int K, int V>
  void launch_bypass(const BypassBackward<T>& p) {
    if constexpr (K > 1) {
      int64_t items = cell.images * p.h * p.w * (cm / V);
      require(items < int64_t(1) << 31, "pixels of a state");
      launch(bypass_backward_kernel<T, K, V>, this->grid(items), 0, queue, p);
    }
  }
};

template <class T>
void CellRun<T>::backward(const Cell& cell, const CellBackward& back, const Queue& queue, const Allocate& allocate) {
  BackwardPass<T> pass(cell, back, queue, allocate);
  for (int i = cell.nodes - 1; i >= 0; i--) {
    int s = cell.inputs + i;
    if (!cell.sources[s].edges.empty()) {
      T* whole = pass.template take<T>(cell.images * cell.pixels() * cell.channels);
      pass.state(s, whole);
      pass.state_grad[s] = pass.dense(whole, pass.oh, pass.ow, pass.c);
    }
    pass.node(i);
    pass.second_convs(i);
  }
  for (int s = 0; s < cell.inputs; s++)
    if (back.grad_inputs[s]) pass.state(s, static_cast<T*>(back.grad_inputs[s]));
  pass.edges();
}

}  // namespace rfdarts::cuda
