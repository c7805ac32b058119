// A cell backward, from the last state to the first. Per node one pass of dot products (BatchNorm, alpha and beta
// gradients), one through the second halves of its edges; per state one pass that gathers the gradients of all
// edges that leave it. The gradient at a BatchNorm's input is never stored: norm_backward in image_backward.h.
#include <algorithm>

#include "cell_parts.h"

namespace rfdarts {
namespace {

template <class T, class S>
struct Backward : CellContext<T, S> {
  using CellContext<T, S>::cell;
  using CellContext<T, S>::data;
  using CellContext<T, S>::k;
  using CellContext<T, S>::cm;
  using CellContext<T, S>::period;
  using CellContext<T, S>::states;
  using CellContext<T, S>::bypass;

  CellBackward<T, S>& back;
  // per node: the gradient at the mixed op's output, dense, and that of what bypasses it, planar; per state: the
  // whole gradient
  std::vector<const T*> mixed_grad, planar_grad;
  std::vector<Batch<T>> state_grad;
  // per BatchNorm: A, B, mean, C of its backward, see norm_backward
  std::vector<Coefficients<T>> norms;

  Backward(const Cell& cell, CellBackward<T, S>& back, const Parallel& parallel, const Allocate& allocate)
      : CellContext<T, S>(cell, back.forward, parallel, allocate), back(back), mixed_grad(cell.nodes),
        planar_grad(cell.nodes), state_grad(cell.inputs + cell.nodes), norms(cell.norms) {
    for (int s = 0; s < cell.inputs + cell.nodes; s++)
      if (!cell.sources[s].edges.empty()) this->prepare(s, cell.K > 1 && back.grad_edge_weights);
    for (int i = 0; i < cell.nodes; i++) state_grad[cell.inputs + i] = back.grad_nodes[i];
    std::fill_n(back.grad_gamma, cell.norms * cm, T(0));
    std::fill_n(back.grad_beta, cell.norms * cm, T(0));
    std::fill_n(back.grad_mix, cell.edges.size() * cell.primitives, T(0));
    if (back.grad_edge_weights) std::fill_n(back.grad_edge_weights, cell.edges.size(), T(0));
  }

  // Gradients of a BatchNorm from sum g and sum g (y - mean) at its output, and what its input's gradient needs.
  // Returns sum over channels of gamma sum(g xhat) + beta sum g.
  double norm_gradients(int norm, double strength, const double* g_sum, const double* dot) {
    double total = 0, m = double(cell.images * cell.pixels());
    Coefficients<T>& coef = norms[norm] = Coefficients<T>(4, cm, period);
    for (int64_t i = 0; i < cm; i++) {
      double rstd = this->rstd(norm, i), gamma = this->gamma(norm, i), gx = dot[i] * rstd;
      back.grad_gamma[norm * cm + i] = T(strength * gx);
      back.grad_beta[norm * cm + i] = T(strength * g_sum[i]);
      total += gamma * gx + this->beta(norm, i) * g_sum[i];
      double a = strength * gamma * rstd;
      coef.set(0, i, a);
      coef.set(1, i, cell.training ? -a * gx * rstd / m : 0);
      coef.set(2, i, this->mean(norm, i));
      coef.set(3, i, cell.training ? -a * g_sum[i] / m : 0);
    }
    return total;
  }

  struct NodeTerms {
    std::vector<int> slots;
    std::vector<int> kept, states;  // primitives, in the order of the streams
    Coefficients<T> kept_mean, states_mean;
    int first;  // of this edge's sums
    bool pools = false, identity = false;
  };

  void node(int i) {
    Timed timed(kNodesBackward);
    int first = cell.first_edge(i), count = cell.inputs + i, s = cell.inputs + i;
    int64_t pixels = cell.pixels(), size = pixels * cm, c = cell.channels, full = pixels * c;
    bool partial = cell.K > 1;
    std::vector<NodeTerms> all(count);
    int sums = 1;
    int64_t largest = 0;
    for (int j = 0; j < count; j++) {
      NodeTerms& t = all[j];
      const auto& branches = cell.edges[first + j].branches;
      t.first = sums;
      t.kept_mean = t.states_mean = Coefficients<T>(cell.primitives, cm, period);
      auto centre = [&](Coefficients<T>& mean, int64_t row, const Branch& b) {
        for (int64_t ch = 0; ch < cm; ch++) mean.set(row, ch, b.norm < 0 ? 0 : this->mean(b.norm, ch));
      };
      for (int p = 0; p < cell.primitives; p++) {
        const Branch& b = branches[p];
        if (b.op == Op::None) continue;
        auto& list = b.convolves() ? t.kept : t.states;
        centre(b.convolves() ? t.kept_mean : t.states_mean, list.size(), b);
        list.push_back(p);
        t.pools |= b.pools();
        t.identity |= b.op == Op::Identity;
      }
      sums += t.kept.size() + t.states.size();
      largest = std::max(largest, cell.sources[j].h * cell.sources[j].w);
    }
    std::vector<double> partials(cell.images * sums * cm), around(cell.images * count);
    bool ready = !partial && state_grad[s].data && state_grad[s].pixel == c && state_grad[s].row == cell.ow * c &&
                 state_grad[s].image == full;
    T* gathered = ready ? nullptr : this->take(cell.images * size);
    mixed_grad[i] = ready ? state_grad[s].data : gathered;
    T* planar = partial ? this->take(cell.images * full) : nullptr;
    planar_grad[i] = planar;
    this->parallel(cell.images, [&](int64_t begin, int64_t end) {
      Scratch room;
      T* scratch = room.take<T>(4 * (largest + 16) * cm + 16 * (period + c));
      T* max = room.take<T>(size);
      T* avg = room.take<T>(size);
      for (int64_t n = begin; n < end; n++) {
        double* sum = partials.data() + n * sums * cm;
        if (!ready) {
          T* to = gathered + n * size;
          View<T> g = state_grad[s][n];
          if (!g.data)
            std::fill_n(to, size, T(0)), std::fill_n(planar + n * full, partial ? full : 0, T(0));
          else if (partial)
            k.unshuffle(g, cell.oh, cell.ow, c, cell.K, to, planar + n * full);
          else
            k.pack(g, cell.oh, cell.ow, c, to);
        }
        const T* g = mixed_grad[i] + n * size;
        k.dot_states(g, 0, nullptr, nullptr, nullptr, sum, size, cm, scratch);
        for (int j = 0; j < count; j++) {
          const NodeTerms& t = all[j];
          const Source& source = cell.sources[j];
          const auto& branches = cell.edges[first + j].branches;
          double* to = sum + t.first * cm;
          std::vector<const S*> kept;
          for (int p : t.kept) kept.push_back(this->slot(branches[p].slot, n));
          k.dot_kept(g, kept.size(), kept.data(), t.kept_mean.row(0), to, size, cm, scratch);
          const T* x = this->mixed_image(j, n);
          if (t.pools) k.pool_forward(x, source.h, source.w, cm, source.stride, max, avg, scratch);
          std::vector<const T*> from;
          for (int p : t.states) {
            Op op = branches[p].op;
            from.push_back(op == Op::MaxPool   ? max
                           : op == Op::AvgPool ? avg
                           : op == Op::Noise   ? data.noise[branches[p].noise] + n * size
                                               : x);
          }
          k.dot_states(g, from.size(), from.data(), t.states_mean.row(0), to + t.kept.size() * cm, nullptr, size, cm,
                       scratch);
          if (partial && back.grad_edge_weights)
            around[n * count + j] = k.dot_view(planar + n * full, bypass[j][n], cell.oh, cell.ow, c);
        }
      }
    });
    std::vector<double> sum(sums * cm, 0.0);
    for (int64_t n = 0; n < cell.images; n++)
      for (int64_t v = 0; v < sums * cm; v++) sum[v] += partials[n * sums * cm + v];
    for (int j = 0; j < count; j++) {
      int e = first + j;
      const NodeTerms& t = all[j];
      double edge_gradient = 0;
      for (int64_t n = 0; n < cell.images; n++) edge_gradient += around[n * count + j];
      const double* at = sum.data() + t.first * cm;
      for (const auto* list : {&t.kept, &t.states})
        for (int p : *list) {
          const Branch& b = cell.edges[e].branches[p];
          double gradient = 0;
          if (b.norm >= 0)
            gradient = norm_gradients(b.norm, this->strength(e, p), sum.data(), at);
          else
            for (int64_t ch = 0; ch < cm; ch++) gradient += at[ch];
          back.grad_mix[e * cell.primitives + p] = T(this->edge_weight(e) * gradient);
          edge_gradient += this->mix(e, p) * gradient;
          at += cm;
        }
      if (back.grad_edge_weights) back.grad_edge_weights[e] = T(edge_gradient);
    }
  }

  // Second halves of the edges that enter node i. What reaches the inner BatchNorm's output replaces the kept
  // output of the second half, which is not needed any more.
  void stage2(int i) {
    Timed timed(kStage2Backward);
    std::vector<const Branch*> branches;
    int first = cell.first_edge(i);
    for (int e = first; e < first + cell.inputs + i; e++)
      for (const Branch& b : cell.edges[e].branches)
        if (b.op == Op::SepConv) branches.push_back(&b);
    if (branches.empty()) return;
    int64_t count = branches.size(), h = cell.oh, w = cell.ow, size = h * w * cm;
    std::vector<Coefficients<T>> affine;
    for (const Branch* b : branches) {
      Coefficients<T> a(3, cm, period);
      for (int64_t ch = 0; ch < cm; ch++) {
        double scale = this->gamma(b->inner_norm, ch) * this->rstd(b->inner_norm, ch);
        a.set(0, ch, scale);
        a.set(1, ch, this->beta(b->inner_norm, ch) - this->mean(b->inner_norm, ch) * scale);
        a.set(2, ch, this->mean(b->inner_norm, ch));
      }
      affine.push_back(a);
    }
    std::vector<double> partials(cell.images * count * 2 * cm);
    Frame frame = k.frame(h, w, cm, 1);
    this->parallel(cell.images, [&](int64_t begin, int64_t end) {
      Scratch room;
      T* e = room.take<T>(frame.size, true);
      T* dx = room.take<T>(size);
      T* scratch = room.take<T>(w * cm + 8 * cm + 16384);
      for (int64_t n = begin; n < end; n++)
        for (int64_t j = 0; j < count; j++) {
          const Branch& b = *branches[j];
          auto p = this->pair(b, true, 1);
          S* y = this->slot(b.slot, n);
          std::fill_n(dx, size, T(0));
          // next: this branch's inner output, and the next branch's outer one
          bool last = j + 1 == count;
          const S* next = last && n + 1 == end ? nullptr : this->slot(branches[last ? 0 : j + 1]->slot, n + last);
          Ahead ahead = this->ahead(this->slot(b.inner_slot, n), size * sizeof(S), next, size * sizeof(S));
          k.conv_backward(mixed_grad[i] + n * size, y, norms[b.norm].row(0), h, w, cm, p.conv, p.dw, p.pw_t, frame,
                          e, dx, scratch, ahead);
          double* sums = partials.data() + (n * count + j) * 2 * cm;
          k.relu_backward_inner(dx, this->slot(b.inner_slot, n), affine[j].row(0), affine[j].row(1),
                                affine[j].row(2), y, sums, sums + cm, size, cm, scratch);
        }
    });
    std::vector<double> sum(count * 2 * cm, 0.0);
    for (int64_t n = 0; n < cell.images; n++)
      for (size_t v = 0; v < sum.size(); v++) sum[v] += partials[n * sum.size() + v];
    for (int64_t j = 0; j < count; j++)
      norm_gradients(branches[j]->inner_norm, 1, sum.data() + j * 2 * cm, sum.data() + (j * 2 + 1) * cm);
  }

  // The gradient of state s: from every edge that leaves it, and from outside the cell.
  void state(int s, T* dst) {
    Timed timed(kStage1Backward);
    const Source& source = cell.sources[s];
    struct Term {
      const Branch* branch;
      int node;
    };
    std::vector<Term> convs;
    std::vector<const T*> grads;
    int count = source.edges.size();
    Coefficients<T> identity(count, cm, period), max_coef(count + 1, cm, period), avg_coef(count + 1, cm, period);
    Coefficients<T> max_bias(1, cm, period), avg_bias(1, cm, period);
    std::vector<T> scale;
    bool has_identity = false;
    // pools of all edges share their input's statistics, so their gradients add up before the pool's backward
    auto pool = [&](int j, const Branch& b, Coefficients<T>& coef, std::vector<double>& slope,
                    std::vector<double>& constant) {
      const Coefficients<T>& norm = norms[b.norm];
      for (int64_t ch = 0; ch < cm; ch++) {
        coef.set(j, ch, norm.row(0)[ch]);
        slope[ch] += norm.row(1)[ch];
        constant[ch] += double(norm.row(3)[ch]) - double(norm.row(1)[ch]) * this->mean(b.norm, ch);
      }
    };
    std::vector<double> slopes[2], constants[2];
    for (int m : {0, 1}) slopes[m].assign(cm, 0.0), constants[m].assign(cm, 0.0);
    for (int j = 0; j < count; j++) {
      int e = source.edges[j];
      grads.push_back(mixed_grad[cell.edges[e].node]);
      scale.push_back(T(this->edge_weight(e)));
      double through = 0;
      for (int p = 0; p < cell.primitives; p++) {
        const Branch& b = cell.edges[e].branches[p];
        if (b.convolves()) convs.push_back({&b, cell.edges[e].node});
        if (b.op == Op::MaxPool) pool(j, b, max_coef, slopes[0], constants[0]);
        if (b.op == Op::AvgPool) pool(j, b, avg_coef, slopes[1], constants[1]);
        if (b.op == Op::Identity) through += this->strength(e, p), has_identity = true;
      }
      identity.set(j, through);
    }
    for (int64_t ch = 0; ch < cm; ch++) {
      max_coef.set(count, ch, slopes[0][ch]);
      avg_coef.set(count, ch, slopes[1][ch]);
      max_bias.set(0, ch, constants[0][ch]);
      avg_bias.set(0, ch, constants[1][ch]);
    }
    int64_t h = source.h, w = source.w, in = h * w * cm, size = cell.pixels() * cm, c = cell.channels;
    int64_t full = cell.pixels() * c;
    bool partial = cell.K > 1;
    Frame frame = k.frame(cell.oh, cell.ow, cm, source.stride);
    this->parallel(cell.images, [&](int64_t begin, int64_t end) {
      Scratch room;
      T* e = room.take<T>(frame.size, true);
      T* dx = room.take<T>(in);
      T* rest = room.take<T>(in);
      T* scratch = room.take<T>(4 * (w + 2) * cm + 16384);
      T* max = room.take<T>(source.pools ? size : 0);
      T* avg = room.take<T>(source.pools ? size : 0);
      T* d_max = room.take<T>(source.pools ? size : 0);
      T* d_avg = room.take<T>(source.pools ? size : 0);
      bool halved = partial && source.stride == 2;
      T* summed = room.take<T>(halved ? full : 0);
      T* around = room.take<T>(halved ? h * w * c : 0);
      for (int64_t n = begin; n < end; n++) {
        const T* x = this->mixed_image(s, n);
        std::fill_n(dx, in, T(0));
        for (size_t i = 0; i < convs.size(); i++) {
          const Term& t = convs[i];
          const Branch& b = *t.branch;
          Ahead ahead;
          if (i + 1 < convs.size() || n + 1 < end) {
            bool last = i + 1 == convs.size();
            const Term& next = convs[last ? 0 : i + 1];
            bool sep = next.branch->op == Op::SepConv;
            const S* y = this->slot(sep ? next.branch->inner_slot : next.branch->slot, n + last);
            const void* g = sep ? static_cast<const void*>(this->slot(next.branch->slot, n + last))
                                : mixed_grad[next.node] + (n + last) * size;
            ahead = this->ahead(y, size * sizeof(S), g, size * (sep ? sizeof(S) : sizeof(T)));
          }
          auto p = this->pair(b, false, source.stride);
          const T* g = mixed_grad[t.node] + n * size;
          if (b.op == Op::Reduce)
            k.reduce_backward(g, this->slot(b.slot, n), norms[b.norm].row(0), h, w, cm,
                              data.weights + b.weight + 2 * cm * cm, dx, scratch);
          else if (b.op == Op::SepConv)
            k.conv_backward_kept(this->slot(b.slot, n), this->slot(b.inner_slot, n), norms[b.inner_norm].row(0), h,
                                 w, cm, p.conv, p.dw, p.pw_t, frame, e, dx, scratch, ahead);
          else
            k.conv_backward(g, this->slot(b.slot, n), norms[b.norm].row(0), h, w, cm, p.conv, p.dw, p.pw_t, frame, e,
                            dx, scratch, ahead);
        }
        std::vector<const T*> from;
        for (const T* g : grads) from.push_back(g + n * size);
        if (has_identity)
          k.sum_states(rest, true, count, from.data(), identity.row(0), nullptr, in, period);
        else
          std::fill_n(rest, in, T(0));
        if (source.pools) {
          k.pool_forward(x, h, w, cm, source.stride, max, avg, scratch);
          from.push_back(max);
          k.sum_states(d_max, true, count + 1, from.data(), max_coef.row(0), max_bias.row(0), size, period);
          from.back() = avg;
          k.sum_states(d_avg, true, count + 1, from.data(), avg_coef.row(0), avg_bias.row(0), size, period);
          k.divide_by_window(d_avg, h, w, cm, source.stride);
          k.pool_backward(x, max, d_max, d_avg, h, w, cm, source.stride, rest);
        }
        k.relu_backward_add(dx, x, rest, in, cm);
        std::vector<View<T>> planar;
        for (int j = 0; partial && j < count; j++)
          planar.push_back({planar_grad[cell.edges[source.edges[j]].node] + n * full, cell.ow * c, c});
        const T *factors = scale.data(), one = 1;
        if (halved) {
          // no outer gradient yet: it has the size of the input
          k.join(nullptr, count, planar.data(), factors, {nullptr, 0, 0}, cell.oh, cell.ow, c, 0, summed);
          k.half_pool_backward(states[s][n], summed, h, w, c, around);
          planar = {{around, w * c, c}};
          factors = &one;
        }
        k.join(rest, planar.size(), planar.data(), factors, state_grad[s][n], h, w, c, cm, dst + n * h * w * c);
      }
    });
  }
};
}  // namespace

template <class T, class S>
void cell_backward(const Cell& cell, CellBackward<T, S>& data, const Parallel& parallel, const Allocate& allocate) {
  Backward<T, S> run(cell, data, parallel, allocate);
  int64_t row = cell.ow * cell.channels, full = cell.oh * row;
  for (int i = cell.nodes - 1; i >= 0; i--) {
    int s = cell.inputs + i;
    if (!cell.sources[s].edges.empty()) {
      T* whole = run.take(cell.images * full);
      run.state(s, whole);
      run.state_grad[s] = {whole, full, row, cell.channels};
    }
    run.node(i);
    run.stage2(i);
  }
  for (int s = 0; s < cell.inputs; s++)
    if (data.grad_inputs[s]) run.state(s, data.grad_inputs[s]);
}
template void cell_backward(const Cell&, CellBackward<float, float>&, const Parallel&, const Allocate&);
template void cell_backward(const Cell&, CellBackward<float, bf16>&, const Parallel&, const Allocate&);
template void cell_backward(const Cell&, CellBackward<double, double>&, const Parallel&, const Allocate&);
}  // namespace rfdarts
