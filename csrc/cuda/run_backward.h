// A cell backward as a sequence of launches, from the last state to the first: per node B1 and, for its separable
// convolutions, B2; per state B3, each followed by what its sums are good for.
#pragma once
#include "cuda/cell_parts.h"

namespace rfdarts::cuda {

template <class T>
struct RunBackward : CellParts<T> {
  using Parts = CellParts<T>;
  using Parts::c, Parts::cell, Parts::cm, Parts::n, Parts::norms, Parts::oh, Parts::ow, Parts::stream;
  const CellBackward& back;
  Acc<T>*grad_gamma, *grad_beta, *grad_mix, *grad_edge_weights, *coef;
  // gradients of states, whole; and of nodes, the mixed op's channels only
  std::vector<Images<T>> state_grad, mixed_grad;
  std::vector<T*> du;

  RunBackward(const Cell& cell, const CellBackward& back, cudaStream_t stream, const Allocate& allocate)
      : Parts(cell, back.forward, stream, allocate), back(back), state_grad(cell.inputs + cell.nodes),
        mixed_grad(cell.nodes), du(cell.outputs) {
    for (int i = 0; i < cell.nodes; i++) state_grad[cell.inputs + i] = images<T>(back.grad_nodes[i]);
    auto params = [](void* p) { return static_cast<Acc<T>*>(p); };
    grad_gamma = params(back.grad_gamma), grad_beta = params(back.grad_beta), grad_mix = params(back.grad_op_weights);
    grad_edge_weights = params(back.grad_edge_weights);
    coef = this->template take<Acc<T>>(int64_t(cell.norms) * 4 * cm);
    zero(grad_mix, int64_t(cell.edges.size()) * cell.primitives);
    zero(grad_gamma, int64_t(cell.norms) * cm);
    zero(grad_beta, int64_t(cell.norms) * cm);
    if (grad_edge_weights) zero(grad_edge_weights, cell.edges.size());
  }
  void zero(Acc<T>* p, int64_t count) {
    check(cudaMemsetAsync(p, 0, count * sizeof(Acc<T>), stream), "memset");
  }

  void node(int i) {
    int s = cell.inputs + i;
    if (!state_grad[s].data) {
      T* none = this->template take<T>(cell.images * cell.pixels() * c);
      check(cudaMemsetAsync(none, 0, cell.images * cell.pixels() * c * sizeof(T), stream), "memset");
      state_grad[s] = Parts::dense(none, oh, ow, c);
    }
    NodeSums<T> p{};
    p.node = this->node_of(i);
    p.g = state_grad[s], p.K = int(cell.K);
    mixed_grad[i] = p.g;
    if (p.K > 1) {
      p.mixed_g = this->template take<T>(cell.images * cell.pixels() * cm);
      mixed_grad[i] = Parts::dense(p.mixed_g, oh, ow, cm);
    }
    int64_t pixels = cell.images * cell.pixels();
    p.chunk = std::clamp(8192 / cm, 16, 512);
    int blocks = int(ceil_div<int64_t>(pixels, p.chunk)), rows = p.node.rows() + 1 + (p.K > 1 ? p.node.incoming : 0);
    p.partial = this->template take<double>(int64_t(rows) * blocks * cm);
    int shared = p.chunk * cm * int(sizeof(Acc<T>));
    constexpr int v = kWide<T> < 4 ? kWide<T> : 4;
    auto kernel = this->aligned_node(p.node, v) ? node_backward_kernel<T, v> : node_backward_kernel<T, 1>;
    launch(kernel, dim3(blocks), shared, stream, p);
    NodeFinish<T> f{p.node, p.partial, blocks, p.K, cell.training, grad_gamma, grad_beta, coef, grad_mix,
                    grad_edge_weights};
    launch(node_finish_kernel<T>, dim3(p.node.incoming), kThreads * sizeof(double), stream, f);
  }

  void common(Back<T>& p, int h, int w, int stride, int reach, bool pools) {
    p.h = h, p.w = w, p.oh = oh, p.ow = ow, p.c = cm, p.image = cell.image_size();
    p.weights = this->weights, p.norms = norms;
    p.tiling = backward_tiling<T>(n, h, w, cm, reach, stride, pools, p.region);
  }
  BackBranch<T> branch(const Branch& b, const Images<T>& g, int slot, int norm, int64_t weight) const {
    return {g, this->branch_output(slot), coef + int64_t(norm) * 4 * cm, weight, int16_t(b.op), int8_t(b.kernel),
            int8_t(b.dilation)};
  }

  void stage2(int i) {
    InnerBackward<T> p{};
    InnerFinish<T> f{};
    int first = cell.first_edge(i), reach = 0;
    p.wide = this->wide(mixed_grad[i]);
    for (int e = first; e < first + cell.incoming(i); e++)
      for (const Branch& b : cell.edges[e].branches) {
        if (b.op != Op::SepConv) continue;
        Parts::require(p.branches < kMaxBranches / 2, "separable convolutions of a node");
        du[b.output] = this->template take<T>(cell.images * cell.image_size());
        int64_t second = b.weight + int64_t(b.kernel) * b.kernel * cm + 2 * int64_t(cm) * cm;
        f.norm[p.branches] = b.inner_norm;
        p.branch[p.branches++] = {branch(b, mixed_grad[i], b.output, b.norm, second), this->branch_output(b.inner_output),
                                  du[b.output], b.inner_norm};
        reach = std::max(reach, this->reach(b));
      }
    if (!p.branches) return;
    common(p, oh, ow, 1, reach, false);
    p.partial = this->template take<double>(int64_t(p.branches) * 2 * p.tiling.count * cm);
    int shared = BackwardShared<T>(p.tiling, p.region, false).bytes;
    launch(inner_backward_kernel<T>, dim3(p.tiling.count, p.branches), shared, stream, p);
    f.norms = norms, f.partial = p.partial, f.blocks = p.tiling.count, f.training = cell.training;
    f.channels = std::min(cm, kThreads);
    f.m = double(cell.images * cell.pixels());
    f.grad_gamma = grad_gamma, f.grad_beta = grad_beta, f.coef = coef;
    dim3 grid(p.branches, ceil_div(cm, f.channels));
    launch(inner_finish_kernel<T>, grid, kThreads * sizeof(double), stream, f);
  }

  // The gradient of state s, from every edge that leaves it and from outside the cell.
  void state(int s, T* dx) {
    const Source& source = cell.sources[s];
    StateBackward<T> p{};
    int reach = 0, stride = source.stride;
    p.x = this->states[s], p.outer = state_grad[s], p.dx = dx, p.full = c;
    p.mix = this->mix, p.edge_weights = this->edge_weights, p.coef = coef, p.pools = source.pools;
    p.wide = cm % kWide<T> == 0;
    for (int e : source.edges) {
      const Edge& edge = cell.edges[e];
      Parts::require(p.leaving < kMaxIncoming, "edges that leave a state");
      auto& leaving = p.edge[p.leaving++];
      leaving = {mixed_grad[edge.node], e, -1, -1, -1};
      p.wide = p.wide && this->wide(leaving.g);
      for (int k = 0; k < cell.primitives; k++) {
        const Branch& b = edge.branches[k];
        if (b.op == Op::MaxPool) leaving.max_norm = b.norm;
        if (b.op == Op::AvgPool) leaving.avg_norm = b.norm;
        if (b.op == Op::Identity) leaving.identity_mix = e * cell.primitives + k;
        if (!b.convolves()) continue;
        Parts::require(p.branches < kMaxBranches, "branches of a state");
        bool sep = b.op == Op::SepConv;
        Images<T> g = sep ? Images<T>{du[b.output], cell.image_size(), ow * cm, cm} : leaving.g;
        p.branch[p.branches++] =
            branch(b, g, sep ? b.inner_output : b.output, sep ? b.inner_norm : b.norm, b.weight);
        reach = std::max(reach, b.op == Op::Reduce ? 0 : this->reach(b));
      }
    }
    common(p, int(source.h), int(source.w), stride, reach, p.pools);
    int shared = BackwardShared<T>(p.tiling, p.region, p.pools).bytes;
    auto kernel = stride == 1 ? state_backward_kernel<T, 1> : state_backward_kernel<T, 2>;
    launch(kernel, dim3(p.tiling.count), shared, stream, p);
    if (cell.K == 1) return;
    for (int e = 0; e < p.leaving; e++) p.edge[e].g = state_grad[cell.inputs + cell.edges[p.edge[e].edge].node];
    int64_t items = cell.images * source.h * source.w * (c - cm);
    launch(bypass_backward_kernel<T>, this->grid(items), 0, stream, p, n, stride);
  }
};

template <class T>
void run_backward(const Cell& cell, const CellBackward& back, cudaStream_t stream, const Allocate& allocate) {
  RunBackward<T> run(cell, back, stream, allocate);
  for (int i = cell.nodes - 1; i >= 0; i--) {
    int s = cell.inputs + i;
    if (!cell.sources[s].edges.empty()) {
      T* whole = run.template take<T>(cell.images * cell.pixels() * cell.channels);
      run.state(s, whole);
      run.state_grad[s] = run.dense(whole, run.oh, run.ow, run.c);
    }
    run.node(i);
    run.stage2(i);
  }
  for (int s = 0; s < cell.inputs; s++)
    if (back.grad_inputs[s]) run.state(s, static_cast<T*>(back.grad_inputs[s]));
}

}  // namespace rfdarts::cuda
