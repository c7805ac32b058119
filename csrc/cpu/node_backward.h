// A node's backward: the sums from which the gradients of its BatchNorms, op weights and edge weights follow.
#pragma once
#include "cpu/cell_backward.h"

namespace rfdarts {

template <class T, class S>
struct NodeBackward : Phase<T, S, BackwardContext<T, S>> {
  using P = Phase<T, S, BackwardContext<T, S>>;
  using P::cell, P::cm, P::k, P::period, P::run;

  // Primitives of an edge whose values are multiplied with g: branch outputs, streams, then average pools without
  // BatchNorm, for which g takes the way back.
  struct EdgeTerms {
    std::vector<int> outputs, streams, averages;
    Coefficients<T> output_mean, stream_mean;
    const Branch* conv = nullptr;  // the one that is made again
    int first;                     // of this edge's sums
    bool pools = false;
  };
  int i;
  int64_t sums = 1;  // of g, then for each term of every edge of g (value - mean)
  std::vector<EdgeTerms> edges;
  int64_t widest = 0;  // of its inputs
  bool averages = false;
  Coefficients<T> no_mean{1, cm, period};
  // where the node's gradient is made dense: the mixed op's channels, and all
  T *mixed = nullptr, *whole = nullptr;
  double* partials = nullptr;  // [images][sums][C/K]

  NodeBackward(BackwardContext<T, S>& run, int i) : P{run}, i(i) {
    for (int s = 0; s < cell.incoming(i); s++) {
      edges.push_back(edge_terms(cell.edges[cell.first_edge(i) + s]));
      widest = std::max(widest, cell.sources[s].w);
    }
    partials = run.take_sums(cell.images * sums * cm);
    const BatchView<T>& g = run.state_grad[cell.inputs + i];
    int64_t c = cell.channels;
    bool dense = g.data && g.pixel == c && g.row == cell.ow * c && g.image == run.full_size;
    if (cell.K > 1 || !dense) mixed = run.take(cell.images * run.mixed_size);
    if (cell.K > 1 && !dense) whole = run.take(cell.images * run.full_size);
    run.mixed_grad[i] = mixed ? mixed : g.data;
    if (cell.K > 1) run.node_grad[i] = whole ? whole : g.data;
  }
  EdgeTerms edge_terms(const Edge& edge) {
    EdgeTerms t;
    t.first = sums;
    t.output_mean = t.stream_mean = Coefficients<T>(cell.primitives, cm, period);
    for (int p = 0; p < cell.primitives; p++) {
      const Branch& b = edge.branches[p];
      if (b.op == Op::None) continue;
      auto& list = b.output >= 0 ? t.outputs : b.averages() ? t.averages : t.streams;
      if (b.remade()) t.conv = &b;
      averages |= b.averages();
      auto& mean = b.output >= 0 ? t.output_mean : t.stream_mean;
      for (int64_t c = 0; b.norm >= 0 && c < cm; c++) mean.set(list.size(), c, run.mean(b.norm, c));
      list.push_back(p);
      t.pools |= b.pools();
      sums++;
    }
    return t;
  }
  const Branch& branch(int s, int p) const { return cell.edges[cell.first_edge(i) + s].branches[p]; }

  // of one thread
  struct Room {
    T *scratch, *divided, *averaged;
    typename CellContext<T, S>::RowRoom pools;
    std::vector<const S*> outputs;
    std::vector<const T*> streams;
    Room(Scratch& room, const NodeBackward& node)
        : scratch(room.take<T>(ScratchSize<T>::sums(node.cm))),
          divided(room.take<T>(node.averages ? node.run.mixed_size : 0)),
          averaged(room.take<T>(node.averages ? node.run.mixed_size : 0)), pools(room, node.run, node.widest) {}
  };
  // what `image` reads of image n, as far as the cache holds it
  void fetch(int64_t n, FetchQueue& queue) const {
    for (size_t s = 0; s < edges.size() && queue.bytes() < kFetchAtMost; s++) {
      for (int p : edges[s].outputs) queue.add(run.branch_output(branch(s, p).output, n), run.mixed_size * sizeof(S));
      queue.add(run.mixed_image(s, n), run.mixed_size * sizeof(T));
    }
  }
  void image(int64_t n, Room& room) const {
    make_dense(n);
    double* to = partials + n * sums * cm;
    std::fill_n(to, sums * cm, 0.0);
    const T* g = run.mixed_grad[i] + n * run.mixed_size;
    k.dot_states(g, 0, nullptr, nullptr, nullptr, to, run.mixed_size, cm, room.scratch);
    if (averages) {
      std::copy_n(g, run.mixed_size, room.divided);
      k.divide_by_window(room.divided, run.output_size(), 1);
      k.window_sums(room.divided, run.output_size(), false, false, room.averaged);
    }
    for (size_t s = 0; s < edges.size(); s++) add_edge(s, n, g, to + edges[s].first * cm, room);
  }
  void make_dense(int64_t n) const {
    ImageView<T> g = run.state_grad[cell.inputs + i][n];
    int64_t c = cell.channels;
    if (whole) {
      T* to = whole + n * run.full_size;
      if (g.data)
        k.pack(g, {cell.oh, cell.ow, c}, to);
      else
        std::fill_n(to, run.full_size, T(0));
      g = {to, cell.ow * c, c};
    }
    if (!mixed) return;
    T* to = mixed + n * run.mixed_size;
    if (!g.data)
      std::fill_n(to, run.mixed_size, T(0));
    else if (cell.K > 1)
      k.take_mixed(g, {cell.oh, cell.ow, c}, cell.K, to);
    else
      k.pack(g, {cell.oh, cell.ow, c}, to);
  }
  void add_edge(int s, int64_t n, const T* g, double* to, Room& room) const {
    const EdgeTerms& t = edges[s];
    room.outputs.clear();
    for (int p : t.outputs) room.outputs.push_back(run.branch_output(branch(s, p).output, n));
    k.dot_branch_outputs(g, room.outputs.size(), room.outputs.data(), t.output_mean.row(0), to, run.mixed_size, cm,
                         room.scratch);
    const T* x = run.mixed_image(s, n);
    auto dot = [&](int64_t at, int64_t count, const typename CellContext<T, S>::Remade& rows) {
      room.streams.clear();
      for (int p : t.streams) room.streams.push_back(run.stream(branch(s, p), x, n, at, rows));
      k.dot_states(g + at, room.streams.size(), room.streams.data(), t.stream_mean.row(0),
                   to + t.outputs.size() * cm, nullptr, count, cm, room.scratch);
    };
    if (t.pools || t.conv)
      run.each_rows(s, x, room.pools, t.pools, t.conv, dot);
    else
      dot(0, run.mixed_size, {});
    if (!t.averages.empty())
      k.dot_states(room.averaged, 1, &x, no_mean.row(0), to + (t.outputs.size() + t.streams.size()) * cm, nullptr,
                   run.mixed_size, cm, room.scratch);
  }
  void finish() const {
    std::vector<double> sum(sums * cm, 0.0);
    for (int64_t n = 0; n < cell.images; n++)
      for (int64_t v = 0; v < sums * cm; v++) sum[v] += partials[n * sums * cm + v];
    std::vector<double> all = run.over_processes(sum);
    for (size_t s = 0; s < edges.size(); s++) {
      int e = cell.first_edge(i) + s;
      const EdgeTerms& t = edges[s];
      double edge_gradient = 0;
      const double *dot = sum.data() + t.first * cm, *all_dot = all.data() + t.first * cm;
      for (const auto* list : {&t.outputs, &t.streams, &t.averages})
        for (int p : *list) {
          int norm = branch(s, p).norm;
          double gradient = 0;
          if (norm >= 0)
            gradient = run.finish_norm(norm, run.term_weight(e, p), {sum.data(), dot}, {all.data(), all_dot});
          else
            for (int64_t c = 0; c < cm; c++) gradient += dot[c];
          run.grad_op_weights[e * cell.primitives + p] = T(run.edge_weight(e) * gradient);
          edge_gradient += run.op_weight(e, p) * gradient;
          dot += cm, all_dot += cm;
        }
      run.grad_edge_weights[e] = edge_gradient;
    }
  }
};

}  // namespace rfdarts
