// The gradient of a state: from every edge that leaves it, and from outside the cell.
#pragma once
#include "cpu/cell_backward.h"

namespace rfdarts {

template <class T, class S>
struct StateBackward : Phase<T, S, BackwardContext<T, S>> {
  using P = Phase<T, S, BackwardContext<T, S>>;
  using P::cell, P::cm, P::k, P::period, P::run;

  struct Term {
    const Branch* branch;
    int node;
  };
  // The gradient at a pool's output, of all edges that have it together, for they share its statistics: scale g of each,
  // then slope (pool - mean) and shift.
  struct PoolTerms {
    std::vector<int64_t> edges;
    Coefficients<T> scale, mean, shift;
    // the gradient of gamma is a sum over all that the pool gave
    bool finite = true;
  };
  int s;
  const Source& source = cell.sources[s];
  int64_t edges = source.edges.size();
  Frame frame = k.frame(this->run.output_size(), source.stride);
  BatchView<T> outside;  // the gradient from outside the cell
  T* dx;
  // those of NAS-Bench-201 come first, of them 3x3 ones
  std::vector<Term> convs;
  int64_t nor_convs = 0, work = 0;
  Frame nor_frame = k.nor_frame(this->run.source_size(s));
  // per edge: gradients at its node, of the mixed op's channels and, where channels bypass it, of all
  std::vector<const T*> mixed_grads, node_grads;
  std::vector<T> edge_weights;
  // edges with an identity, and with an average pool without BatchNorm, and its weight in each: another's gradient may be
  // NaN, times 0 too
  struct Weighted {
    std::vector<int64_t> edges;
    Coefficients<T> weights;
  };
  Weighted identities{{}, {edges, cm, period}}, averages{{}, {edges, cm, period}};
  PoolTerms max = pool_terms(Op::MaxPool), avg = pool_terms(Op::AvgPool);
  Coefficients<T> zeros{edges, cm, period};
  double* dots = nullptr;  // [images][edges]: each edge's gradient with what bypassed it; null: not wanted

  // dx: [images][h][w][channels], dense
  StateBackward(BackwardContext<T, S>& run, int s, T* dx) : P{run}, s(s), outside(run.state_grad[s]), dx(dx) {
    if (run.wants_dots()) dots = run.take_sums(cell.images * edges);
    for (int64_t j = 0; j < edges; j++) {
      int e = source.edges[j], node = cell.edges[e].node;
      mixed_grads.push_back(run.mixed_grad[node]);
      if (cell.K > 1) node_grads.push_back(run.node_grad[node]);
      edge_weights.push_back(T(run.edge_weight(e)));
      for (int p = 0; p < cell.primitives; p++) {
        const Branch& b = cell.edges[e].branches[p];
        if (b.convolves()) convs.push_back({&b, node}), work += run.work(b);
        nor_convs += b.op == Op::NorConv;
        for (Weighted* list : {&identities, &averages}) {
          if (list == &identities ? b.op != Op::Identity : !b.averages()) continue;
          list->weights.set(list->edges.size(), run.term_weight(e, p));
          list->edges.push_back(j);
        }
      }
    }
    std::stable_sort(convs.begin(), convs.end(), [](const Term& a, const Term& b) {
      return std::pair(!a.branch->nor_conv_rank(), a.branch->nor_conv_rank()) <
             std::pair(!b.branch->nor_conv_rank(), b.branch->nor_conv_rank());
    });
  }
  PoolTerms pool_terms(Op op) const {
    PoolTerms t{{}, {edges + 1, cm, period}, {edges + 1, cm, period}, {1, cm, period}};
    std::vector<double> slope(cm, 0.0), shift(cm, 0.0), mean(cm, 0.0);
    for (int64_t j = 0; j < edges; j++)
      for (const Branch& b : cell.edges[source.edges[j]].branches) {
        if (b.op != op || !b.pools()) continue;
        const Coefficients<T>& norm = this->run.coefficients[b.norm];
        for (int64_t c = 0; c < cm; c++) {
          t.scale.set(t.edges.size(), c, norm.row(kScale)[c]);
          mean[c] = norm.row(kMean)[c];
          slope[c] += norm.row(kSlope)[c];
          shift[c] += norm.row(kShift)[c];
          t.finite &= std::isfinite(this->run.grad_gamma[b.norm * cm + c]);
        }
        t.edges.push_back(j);
      }
    int64_t last = t.edges.size();
    for (int64_t c = 0; c < cm; c++)
      t.scale.set(last, c, slope[c]), t.mean.set(last, c, mean[c]), t.shift.set(0, c, shift[c]);
    return t;
  }

  // of one thread; sum: of gradients at the mixed op's channels, behind the ReLU; at_output: see add_bypass
  struct Room {
    T *framed, *nor_framed, *dx, *sum, *scratch, *d_max, *d_avg, *at_output;
    std::vector<NorConvBackward<T, S>> nor_convs;
    typename CellContext<T, S>::PoolRoom pools;
    std::vector<const T*> streams, node_grads;
    FetchQueue rest;
    Room(Scratch& room, const StateBackward& state) : pools(room, state.run, state.source.w) {
      const Source& source = state.source;
      int64_t cm = state.cm, ow = state.cell.ow, channels = state.cell.channels, count = source.h * source.w * cm;
      bool pooled_bypass = state.cell.K > 1 && source.stride == 2;
      framed = room.take<T>(state.convs.size() > size_t(state.nor_convs) ? state.frame.size : 0, true);
      nor_framed = room.take<T>(state.nor_convs ? state.nor_frame.size : 0, true);
      dx = room.take<T>(count);
      sum = room.take<T>(count);
      scratch = room.take<T>(std::max({ScratchSize<T>::conv_backward(ow, cm), ScratchSize<T>::reduce_backward(ow, cm),
                                       source.pools ? ScratchSize<T>::pool_backward(source.w, cm) : 0,
                                       state.nor_convs ? ScratchSize<T>::nor_convs_backward(source.w, cm) : 0,
                                       ScratchSize<T>::bypass_backward(source.w, channels)}));
      d_max = room.take<T>(source.pools ? state.run.mixed_size : 0);
      d_avg = room.take<T>(source.pools || !state.averages.edges.empty() ? state.run.mixed_size : 0);
      at_output = room.take<T>(pooled_bypass ? state.run.full_size : 0);
    }
  };

  // `queue`: what follows the convolutions; returned with what they read themselves in between
  void fetch(int64_t n, int64_t next, Room& room, FetchQueue& queue) const {
    room.rest.clear();
    room.rest.add(outside[n], source.h * source.w, cell.channels);
    if (dots) room.rest.add(run.bypass[s][n], cell.pixels(), cell.channels);
    for (const T* g : node_grads) room.rest.add(g + n * run.full_size, run.full_size * sizeof(T));
    room.rest.append(queue);
    queue.clear();
    int node = -1;
    auto add = [&](const Term& t, int64_t n) {
      const Branch& b = *t.branch;
      bool sep = b.op == Op::SepConv;
      queue.add(run.branch_output(sep ? b.inner_output : b.output, n), run.mixed_size * sizeof(S));
      if (sep)
        queue.add(run.branch_output(b.output, n), run.mixed_size * sizeof(S));
      else if (t.node != node)
        queue.add(run.mixed_grad[node = t.node] + n * run.mixed_size, run.mixed_size * sizeof(T));
    };
    int64_t count = convs.size();
    for (int64_t i = 0; i < count; i++) {
      if (i + 1 < count) add(convs[i + 1], n);
      queue.add_share(room.rest, i, count);
    }
    if (next >= 0 && count) add(convs[0], next);
  }
  void image(int64_t n, Room& room, FetchQueue& queue) const {
    const T* x = run.mixed_image(s, n);
    add_convs(n, room, queue.over(work));
    add_identities(n, room);
    if (!averages.edges.empty()) add_averages(n, room);
    if (source.pools) add_pools(x, n, room);
    k.relu_backward_add(room.dx, x, room.sum, source.h * source.w * cm, cm);
    add_bypass(n, room);
  }
  // room.dx: before the convolutions' ReLU
  void add_convs(int64_t n, Room& room, Ahead ahead) const {
    Size size = run.source_size(s);
    // the first of them writes what the others add to
    bool add = convs.empty() || convs[0].branch->op == Op::Reduce;
    if (add) std::fill_n(room.dx, size.h * size.w * cm, T(0));
    if (nor_convs) add_nor_convs(n, room, ahead), add = true;
    for (size_t i = nor_convs; i < convs.size(); i++) {
      const Term& t = convs[i];
      const Branch& b = *t.branch;
      const T* g = run.mixed_grad[t.node] + n * run.mixed_size;
      S* y = run.branch_output(b.output, n);
      if (b.op == Op::Reduce) {
        const T* pw_t = run.conv_weights + b.weight + cm * cm;
        k.reduce_backward(run.norm_backward(b.norm, g, y), size, pw_t, room.dx, room.scratch, ahead);
      } else if (b.op == Op::SepConv) {
        // second_convs_backward put the gradient in the place of the outer branch output
        NormBackward<T, S, S> norm{y, run.branch_output(b.inner_output, n), run.coefficients[b.inner_norm].row(0)};
        k.conv_backward_stored(norm, size, run.conv(b, false, source.stride), frame, room.framed, add, room.dx,
                               room.scratch, ahead);
      } else {
        k.conv_backward(run.norm_backward(b.norm, g, y), size, run.conv(b, false, source.stride), frame, room.framed,
                        add, room.dx, room.scratch, ahead);
      }
      add = true;
    }
  }
  void add_nor_convs(int64_t n, Room& room, Ahead& ahead) const {
    room.nor_convs.clear();
    for (int64_t i = 0; i < nor_convs; i++) {
      const Branch& b = *convs[i].branch;
      auto [weights, transformed] = run.nor_conv(b, true);
      const T* g = run.mixed_grad[convs[i].node] + n * run.mixed_size;
      room.nor_convs.push_back(
          {b.kernel, weights, transformed, run.norm_backward(b.norm, g, run.branch_output(b.output, n))});
    }
    k.nor_convs_backward(nor_convs, room.nor_convs.data(), run.source_size(s), nor_frame, room.nor_framed, room.dx,
                         room.scratch, ahead);
  }
  // to = the gradients at the edges' nodes, weighted
  void sum_gradients(int64_t n, const Weighted& list, T* to, Room& room) const {
    room.streams.clear();
    for (int64_t j : list.edges) room.streams.push_back(mixed_grads[j] + n * run.mixed_size);
    k.sum_states(to, true, list.edges.size(), room.streams.data(), list.weights.row(0), zeros.row(0), nullptr,
                 source.h * source.w * cm, period);
  }
  // room.sum: of the identities' gradients
  void add_identities(int64_t n, Room& room) const {
    if (identities.edges.empty())
      std::fill_n(room.sum, source.h * source.w * cm, T(0));
    else
      sum_gradients(n, identities, room.sum, room);
  }
  void add_averages(int64_t n, Room& room) const {
    Size size = run.source_size(s);
    sum_gradients(n, averages, room.d_avg, room);
    k.divide_by_window(room.d_avg, size, 1);
    k.window_sums(room.d_avg, size, false, true, room.sum);
  }
  void add_pools(const T* x, int64_t n, Room& room) const {
    run.each_pool_rows(s, x, room.pools, [&](int64_t at, int64_t count, const T* max_rows, const T* avg_rows) {
      auto sum = [&](const PoolTerms& t, const T* pool, T* d) {
        if (t.edges.empty()) return void(std::fill_n(d, count, T(0)));
        room.streams.clear();
        for (int64_t j : t.edges) room.streams.push_back(mixed_grads[j] + n * run.mixed_size + at);
        // running statistics do not depend on the pool's output
        if (cell.training) room.streams.push_back(pool);
        k.sum_states(d, true, room.streams.size(), room.streams.data(), t.scale.row(0), t.mean.row(0), t.shift.row(0),
                     count, period);
      };
      sum(max, max_rows, room.d_max + at);
      sum(avg, avg_rows, room.d_avg + at);
    });
    Size size = run.source_size(s);
    k.divide_by_window(room.d_avg, size, source.stride);
    k.pool_backward(x, room.d_max, room.d_avg, size, source.stride, max.finite && avg.finite, room.sum, room.scratch);
  }
  // dx: room.sum, what bypassed the mixed ops, and what comes from outside
  void add_bypass(int64_t n, Room& room) const {
    Size size{source.h, source.w, cell.channels};
    room.node_grads.clear();
    for (const T* g : node_grads) room.node_grads.push_back(g + n * run.full_size);
    BypassBackward<T> a{};
    a.mixed = room.sum, a.outer = outside[n];
    a.edges = node_grads.size(), a.g = room.node_grads.data(), a.edge_weights = edge_weights.data();
    if (dots) a.x = run.bypass[s][n], a.dots = dots + n * edges;
    a.dx = dx + n * size.h * size.w * size.c;
    if (a.edges == 0 || source.stride == 1) return k.bypass_backward(a, size, cell.K, room.scratch);
    // the maxima of 2x2 pixels bypassed: their gradients are summed at the size of the output
    BypassBackward<T> pooled = a;
    pooled.mixed = nullptr, pooled.outer = {}, pooled.dx = room.at_output;
    k.bypass_backward(pooled, {cell.oh, cell.ow, cell.channels}, cell.K, room.scratch);
    a.edges = 0, a.x = {};
    k.bypass_backward(a, size, cell.K, room.scratch);
    k.half_pool_backward(run.states[s][n], room.at_output, size, a.dx);
  }
  void finish() const {
    if (!dots) return;
    for (int64_t n = 0; n < cell.images; n++)
      for (int64_t j = 0; j < edges; j++) run.grad_edge_weights[source.edges[j]] += dots[n * edges + j];
  }
};

}  // namespace rfdarts
