// A node's forward: the sum over the edges that enter it.
#pragma once
#include "cpu/cell_context.h"

namespace rfdarts {

template <class T, class S>
struct NodeForward : Phase<T, S, CellContext<T, S>> {
  using P = Phase<T, S, CellContext<T, S>>;
  using P::cell, P::cm, P::k, P::period, P::run;

  // What one edge adds: scale (value - mean) for each branch output and each stream. The BatchNorms' betas go to the
  // node's shift.
  struct EdgeTerms {
    std::vector<int> outputs;
    Coefficients<T> output_scale, output_mean;
    std::vector<const Branch*> streams;
    Coefficients<T> stream_scale, stream_mean;
    bool pools = false;
  };
  int i;
  std::vector<EdgeTerms> edges;
  std::vector<T> edge_weights;
  Coefficients<T> shift{1, cm, period};
  int64_t widest = 0;  // of its inputs
  // the edges with an average pool without BatchNorm, and its weight
  std::vector<int> averaged;
  Coefficients<T> average_scale, zeros;

  NodeForward(CellContext<T, S>& run, int i) : P{run}, i(i) {
    std::vector<double> sum(cm, 0.0);
    for (int s = 0; s < cell.incoming(i); s++) {
      int e = cell.first_edge(i) + s;
      edges.push_back(edge_terms(e, sum));
      edge_weights.push_back(T(run.edge_weight(e)));
      widest = std::max(widest, cell.sources[s].w);
    }
    for (int64_t c = 0; c < cm; c++) shift.set(0, c, sum[c]);
    average_scale = zeros = Coefficients<T>(edges.size() + 1, cm, period);
    for (int s = 0; s < cell.incoming(i); s++)
      for (int e = cell.first_edge(i) + s, p = 0; p < cell.primitives; p++)
        if (cell.edges[e].branches[p].averages()) {
          average_scale.set(averaged.size(), run.term_weight(e, p));
          averaged.push_back(s);
        }
  }
  EdgeTerms edge_terms(int e, std::vector<double>& shift_sum) const {
    EdgeTerms t;
    t.output_scale = t.output_mean = t.stream_scale = t.stream_mean = Coefficients<T>(cell.primitives, cm, period);
    // one op after the other, as they are summed
    for (Op op : {Op::None, Op::MaxPool, Op::AvgPool, Op::Identity, Op::Noise})
      for (int p = 0; p < cell.primitives; p++) {
        const Branch& b = cell.edges[e].branches[p];
        bool convolves = b.convolves();
        if ((op == Op::None ? !convolves : b.op != op) || b.averages()) continue;
        auto& scale = convolves ? t.output_scale : t.stream_scale;
        auto& mean = convolves ? t.output_mean : t.stream_mean;
        int64_t row = convolves ? t.outputs.size() : t.streams.size();
        double weight = run.term_weight(e, p);
        if (b.norm < 0) scale.set(row, weight);
        for (int64_t c = 0; b.norm >= 0 && c < cm; c++) {
          scale.set(row, c, weight * run.gamma(b.norm, c) * run.rstd(b.norm, c));
          mean.set(row, c, run.mean(b.norm, c));
          shift_sum[c] += weight * run.beta(b.norm, c);
        }
        convolves ? t.outputs.push_back(b.output) : t.streams.push_back(&b);
        t.pools |= b.pools();
      }
    return t;
  }

  // of one thread
  struct Room {
    T *scratch, *mixed, *weighted;
    typename CellContext<T, S>::PoolRoom pools;
    std::vector<const S*> outputs;
    std::vector<const T*> streams;
    std::vector<ImageView<T>> bypass;
    Room(Scratch& room, const NodeForward& node)
        : scratch(room.take<T>(bypasses(node) * ScratchSize<T>::bypass_forward(node.cell.ow, node.cell.channels))),
          mixed(room.take<T>(bypasses(node) * node.run.mixed_size)),
          weighted(room.take<T>(node.averaged.empty() ? 0 : node.run.mixed_size)),
          pools(room, node.run, node.widest) {}
    static int64_t bypasses(const NodeForward& node) { return node.cell.K > 1; }
  };
  // what `image` reads of image n, as far as the cache holds it
  void fetch(int64_t n, FetchQueue& queue) const {
    for (size_t s = 0; s < edges.size() && queue.bytes() < kFetchAtMost; s++) {
      for (int output : edges[s].outputs) queue.add(run.branch_output(output, n), run.mixed_size * sizeof(S));
      queue.add(run.mixed_image(s, n), run.mixed_size * sizeof(T));
      if (cell.K > 1) queue.add(run.bypass[s][n].data, run.full_size * sizeof(T));
    }
  }
  void image(int64_t n, Room& room) const {
    int64_t c = cell.channels;
    T* out = run.states[cell.inputs + i].data + n * run.full_size;
    T* sum = cell.K > 1 ? room.mixed : out;
    for (size_t s = 0; s < edges.size(); s++) add_edge(s, n, sum, room);
    if (!averaged.empty()) {
      room.streams.clear();
      for (int s : averaged) room.streams.push_back(run.mixed_image(s, n));
      k.sum_states(room.weighted, true, averaged.size(), room.streams.data(), average_scale.row(0), zeros.row(0),
                   nullptr, run.mixed_size, period);
      k.window_sums(room.weighted, run.output_size(), true, true, sum);
    }
    if (cell.K > 1) {
      room.bypass.clear();
      for (size_t s = 0; s < edges.size(); s++) room.bypass.push_back(run.bypass[s][n]);
      k.bypass_forward(edges.size(), room.bypass.data(), edge_weights.data(), sum, {cell.oh, cell.ow, c}, cell.K, out,
                       room.scratch);
    }
    if (run.data.concat)
      k.spread(out, cell.pixels(), c, static_cast<T*>(run.data.concat) + (n * cell.pixels() * cell.nodes + i) * c,
               cell.nodes * c);
  }
  void add_edge(int s, int64_t n, T* sum, Room& room) const {
    const EdgeTerms& t = edges[s];
    room.outputs.clear();
    for (int output : t.outputs) room.outputs.push_back(run.branch_output(output, n));
    k.sum_branch_outputs(sum, s == 0, room.outputs.size(), room.outputs.data(), t.output_scale.row(0),
                         t.output_mean.row(0), shift.row(0), run.mixed_size, period);
    const T* x = run.mixed_image(s, n);
    auto add_streams = [&](int64_t at, int64_t count, const T* max, const T* avg) {
      room.streams.clear();
      for (const Branch* b : t.streams) room.streams.push_back(run.stream(*b, x, n, at, max, avg));
      k.sum_states(sum + at, false, room.streams.size(), room.streams.data(), t.stream_scale.row(0),
                   t.stream_mean.row(0), nullptr, count, period);
    };
    if (t.pools)
      run.each_pool_rows(s, x, room.pools, add_streams);
    else
      add_streams(0, run.mixed_size, nullptr, nullptr);
  }
};

}  // namespace rfdarts
