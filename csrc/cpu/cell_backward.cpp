// A cell backward, from the last state to the first. Per state two passes over the images: one gathers the gradients of
// all edges that leave it (stage 1) and takes the dot products of its own edges with them (BatchNorm, alpha and beta
// gradients); one goes through the second halves of its edges (stage 2). The gradient at a BatchNorm's input is never
// stored: norm_backward in image_backward.h.
#include <algorithm>

#include "cpu/cell_context.h"

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
  // per node: the gradient at the mixed op's output, and where channels bypass it the whole gradient, both dense
  std::vector<const T*> mixed_grad, node_grad;
  std::vector<BatchView<T>> state_grad;
  // per BatchNorm: A, B, mean, C of its backward, see norm_backward
  std::vector<Coefficients<T>> norms;
  std::vector<double> edge_gradients;

  Backward(const Cell& cell, CellBackward<T, S>& back, const Parallel& parallel, const Allocate& allocate)
      : CellContext<T, S>(cell, back.forward, parallel, allocate), back(back), mixed_grad(cell.nodes),
        node_grad(cell.nodes), state_grad(cell.states()), norms(cell.norms),
        edge_gradients(cell.edges.size()) {
    for (int s = 0; s < cell.states(); s++)
      if (!cell.sources[s].edges.empty()) this->plan_dense(s, cell.K > 1 && back.grad_edge_weights);
    for (int i = 0; i < cell.nodes; i++) state_grad[cell.inputs + i] = back.grad_nodes[i];
    std::fill_n(back.grad_gamma, cell.norms * cm, T(0));
    std::fill_n(back.grad_beta, cell.norms * cm, T(0));
    std::fill_n(back.grad_op_weights, cell.edges.size() * cell.primitives, T(0));
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
    std::vector<int> kept, states;  // primitives, in the order of the streams
    Coefficients<T> kept_mean, states_mean;
    int first;  // of this edge's sums
    bool pools = false;
  };

  struct Node {
    int first = 0, count = 0, sums = 1;
    std::vector<NodeTerms> edges;
    int64_t widest = 0;  // of its inputs
    T *gathered = nullptr, *dense = nullptr;
    double* partials = nullptr;  // [images][sums][C/K]
  };
  Node plan_node(int i) {
    Node plan;
    plan.first = cell.first_edge(i), plan.count = cell.inputs + i, plan.edges.resize(plan.count);
    int s = cell.inputs + i;
    int64_t size = cell.pixels() * cm, c = cell.channels, full = cell.pixels() * c;
    for (int j = 0; j < plan.count; j++) {
      NodeTerms& t = plan.edges[j];
      const auto& branches = cell.edges[plan.first + j].branches;
      t.first = plan.sums;
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
      }
      plan.sums += t.kept.size() + t.states.size();
      plan.widest = std::max(plan.widest, cell.sources[j].w);
    }
    plan.partials = this->take_sums(cell.images * plan.sums * cm);
    const BatchView<T>& g = state_grad[s];
    bool ready = g.data && g.pixel == c && g.row == cell.ow * c && g.image == full;
    if (cell.K > 1 || !ready) plan.gathered = this->take(cell.images * size);
    mixed_grad[i] = plan.gathered ? plan.gathered : g.data;
    if (cell.K > 1) node_grad[i] = ready ? g.data : plan.dense = this->take(cell.images * full);
    return plan;
  }
  struct NodeRoom {
    T* scratch;
    typename CellContext<T, S>::PoolRoom pools;
    std::vector<const S*> kept;
    std::vector<const T*> from;
    NodeRoom(Scratch& room, const Backward& run, const Node& plan)
        : scratch(room.take<T>(4 * run.period)), pools(run.take_pool_room(room, plan.widest)) {}
  };
  // what `node` reads of image n, as far as the cache holds it
  void fetch_node(const Node& plan, int64_t n, Queue& queue) const {
    int64_t size = cell.pixels() * cm;
    for (int j = 0; j < plan.count && queue.bytes() < kFetchAtMost; j++) {
      const auto& branches = cell.edges[plan.first + j].branches;
      for (int p : plan.edges[j].kept) queue.add(this->branch_output(branches[p].output, n), size * sizeof(S));
      queue.add(this->mixed_image(j, n), size * sizeof(T));
    }
  }
  void node(int i, int64_t n, Node& plan, NodeRoom& room) {
    int64_t size = cell.pixels() * cm, c = cell.channels, full = cell.pixels() * c;
    double* sum = plan.partials + n * plan.sums * cm;
    std::fill_n(sum, plan.sums * cm, 0.0);
    ImageView<T> whole = state_grad[cell.inputs + i][n];
    if (plan.dense) {
      T* to = plan.dense + n * full;
      if (whole.data)
        k.pack(whole, cell.oh, cell.ow, c, to);
      else
        std::fill_n(to, full, T(0));
      whole = {to, cell.ow * c, c};
    }
    if (plan.gathered) {
      T* to = plan.gathered + n * size;
      if (!whole.data)
        std::fill_n(to, size, T(0));
      else if (cell.K > 1)
        k.take_mixed(whole, cell.oh, cell.ow, c, cell.K, to);
      else
        k.pack(whole, cell.oh, cell.ow, c, to);
    }
    const T* g = mixed_grad[i] + n * size;
    k.dot_states(g, 0, nullptr, nullptr, nullptr, sum, size, cm, room.scratch);
    for (int j = 0; j < plan.count; j++) {
      const NodeTerms& t = plan.edges[j];
      const Source& source = cell.sources[j];
      const auto& branches = cell.edges[plan.first + j].branches;
      double* to = sum + t.first * cm;
      room.kept.clear();
      for (int p : t.kept) room.kept.push_back(this->branch_output(branches[p].output, n));
      k.dot_kept(g, room.kept.size(), room.kept.data(), t.kept_mean.row(0), to, size, cm, room.scratch);
      const T* x = this->mixed_image(j, n);
      auto dot = [&](int64_t at, int64_t len, const T* max, const T* avg) {
        room.from.clear();
        for (int p : t.states) {
          Op op = branches[p].op;
          room.from.push_back(op == Op::MaxPool   ? max
                              : op == Op::AvgPool ? avg
                              : op == Op::Noise   ? data.noise[branches[p].noise] + n * size + at
                                                  : x + at);
        }
        k.dot_states(g + at, room.from.size(), room.from.data(), t.states_mean.row(0), to + t.kept.size() * cm, nullptr,
                     len, cm, room.scratch);
      };
      if (t.pools)
        this->each_pool_rows(source, x, room.pools, dot);
      else
        dot(0, size, nullptr, nullptr);
    }
  }
  void finish_node(Node& plan) {
    std::vector<double> sum(plan.sums * cm, 0.0);
    for (int64_t n = 0; n < cell.images; n++)
      for (int64_t v = 0; v < plan.sums * cm; v++) sum[v] += plan.partials[n * plan.sums * cm + v];
    for (int j = 0; j < plan.count; j++) {
      int e = plan.first + j;
      const NodeTerms& t = plan.edges[j];
      double edge_gradient = 0;
      const double* at = sum.data() + t.first * cm;
      for (const auto* list : {&t.kept, &t.states})
        for (int p : *list) {
          const Branch& b = cell.edges[e].branches[p];
          double gradient = 0;
          if (b.norm >= 0)
            gradient = norm_gradients(b.norm, this->term_weight(e, p), sum.data(), at);
          else
            for (int64_t ch = 0; ch < cm; ch++) gradient += at[ch];
          back.grad_op_weights[e * cell.primitives + p] = T(this->edge_weight(e) * gradient);
          edge_gradient += this->mix(e, p) * gradient;
          at += cm;
        }
      edge_gradients[e] = edge_gradient;
    }
  }

  // Second halves of the edges that enter node i. What reaches the inner BatchNorm's output replaces the kept
  // output of the second half, which is not needed any more.
  void stage2(int i) {
    std::vector<const Branch*> branches;
    int64_t work = 0;
    int first = cell.first_edge(i);
    for (int e = first; e < first + cell.inputs + i; e++)
      for (const Branch& b : cell.edges[e].branches)
        if (b.op == Op::SepConv) branches.push_back(&b), work += this->work(b);
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
    double* partials = this->take_sums(cell.images * count * 2 * cm);
    Frame frame = k.frame(h, w, cm, 1);
    this->parallel(cell.images, [&](ImageQueue& images) {
      Scratch room;
      T* e = room.take<T>(frame.size, true);
      T* dx = room.take<T>(size);
      T* scratch = room.take<T>(w * cm + 8 * cm + 16384);
      Queue queue;
      int64_t bytes = size * sizeof(S);
      images.each([&](int64_t n, int64_t next) {
        queue.clear();
        for (int64_t j = 0; j < count; j++) {
          queue.add(this->branch_output(branches[j]->inner_output, n), bytes);
          if (j + 1 < count) queue.add(this->branch_output(branches[j + 1]->output, n), bytes);
        }
        if (next >= 0) {
          queue.add(mixed_grad[i] + next * size, size * sizeof(T));
          queue.add(this->branch_output(branches[0]->output, next), bytes);
        }
        Ahead ahead = queue.over(work);
        for (int64_t j = 0; j < count; j++) {
          const Branch& b = *branches[j];
          auto p = this->pair(b, true, 1);
          S* y = this->branch_output(b.output, n);
          k.conv_backward(mixed_grad[i] + n * size, y, norms[b.norm].row(0), h, w, cm, p.conv, p.dw, p.pw_t, frame,
                          e, false, dx, scratch, ahead);
          double* sums = partials + (n * count + j) * 2 * cm;
          std::fill_n(sums, 2 * cm, 0.0);
          k.relu_backward_inner(dx, this->branch_output(b.inner_output, n), affine[j].row(0), affine[j].row(1),
                                affine[j].row(2), y, sums, sums + cm, size, cm, scratch);
        }
      });
    });
    std::vector<double> sum(count * 2 * cm, 0.0);
    for (int64_t n = 0; n < cell.images; n++)
      for (size_t v = 0; v < sum.size(); v++) sum[v] += partials[n * sum.size() + v];
    for (int64_t j = 0; j < count; j++)
      norm_gradients(branches[j]->inner_norm, 1, sum.data() + j * 2 * cm, sum.data() + (j * 2 + 1) * cm);
  }

  // Stage 1: the gradient of a state, from every edge that leaves it, and from outside the cell.
  struct Stage1 {
    struct Term {
      const Branch* branch;
      int node;
    };
    int count = 0;
    int64_t work = 0;
    std::vector<Term> convs;
    std::vector<const T*> grads, around;
    std::vector<T> scale;
    // a pool is the stream after the gradients
    Coefficients<T> identity, max_coef, avg_coef, max_bias, avg_bias, max_mean, avg_mean, zero;
    bool has_identity = false;
    BatchView<T> outer;
    T* whole = nullptr;
    Frame frame{};
    std::vector<double> dots;  // of each edge's gradient with what bypassed it, per image
  };
  Stage1 plan_stage1(int s, T* whole) {
    const Source& source = cell.sources[s];
    int count = source.edges.size();
    Stage1 plan;
    plan.count = count;
    plan.identity = Coefficients<T>(count, cm, period);
    plan.max_coef = plan.avg_coef = Coefficients<T>(count + 1, cm, period);
    plan.max_bias = plan.avg_bias = Coefficients<T>(1, cm, period);
    plan.max_mean = plan.avg_mean = plan.zero = Coefficients<T>(count + 1, cm, period);
    plan.outer = state_grad[s];
    plan.whole = whole;
    plan.frame = k.frame(cell.oh, cell.ow, cm, source.stride);
    if (cell.K > 1 && back.grad_edge_weights) plan.dots.resize(cell.images * count);
    // pools of all edges share their input's statistics, so their gradients add up before the pool's backward
    auto pool = [&](int j, const Branch& b, Coefficients<T>& coef, Coefficients<T>& mean, std::vector<double>& slope,
                    std::vector<double>& constant) {
      const Coefficients<T>& norm = norms[b.norm];
      for (int64_t ch = 0; ch < cm; ch++) {
        coef.set(j, ch, norm.row(0)[ch]);
        slope[ch] += norm.row(1)[ch];
        constant[ch] += norm.row(3)[ch];
        mean.set(count, ch, this->mean(b.norm, ch));
      }
    };
    std::vector<double> slopes[2], constants[2];
    for (int m : {0, 1}) slopes[m].assign(cm, 0.0), constants[m].assign(cm, 0.0);
    for (int j = 0; j < count; j++) {
      int e = source.edges[j];
      plan.grads.push_back(mixed_grad[cell.edges[e].node]);
      if (cell.K > 1) plan.around.push_back(node_grad[cell.edges[e].node]);
      plan.scale.push_back(T(this->edge_weight(e)));
      double through = 0;
      for (int p = 0; p < cell.primitives; p++) {
        const Branch& b = cell.edges[e].branches[p];
        if (b.convolves()) plan.convs.push_back({&b, cell.edges[e].node}), plan.work += this->work(b);
        if (b.op == Op::MaxPool) pool(j, b, plan.max_coef, plan.max_mean, slopes[0], constants[0]);
        if (b.op == Op::AvgPool) pool(j, b, plan.avg_coef, plan.avg_mean, slopes[1], constants[1]);
        if (b.op == Op::Identity) through += this->term_weight(e, p), plan.has_identity = true;
      }
      plan.identity.set(j, through);
    }
    for (int64_t ch = 0; ch < cm; ch++) {
      plan.max_coef.set(count, ch, slopes[0][ch]);
      plan.avg_coef.set(count, ch, slopes[1][ch]);
      plan.max_bias.set(0, ch, constants[0][ch]);
      plan.avg_bias.set(0, ch, constants[1][ch]);
    }
    return plan;
  }
  struct Stage1Room {
    T *e, *dx, *rest, *scratch, *d_max, *d_avg, *pool_scratch, *summed, *rows;
    typename CellContext<T, S>::PoolRoom pools;
    std::vector<const T*> from, around;
    Queue extra;
    Stage1Room(Scratch& room, const Backward& run, const Stage1& plan, const Source& source) {
      const Cell& cell = run.cell;
      int64_t in = source.h * source.w * cell.mixed_channels, size = cell.pixels() * cell.mixed_channels;
      e = room.take<T>(plan.frame.size, true);
      dx = room.take<T>(in);
      rest = room.take<T>(in);
      scratch = room.take<T>(4 * (source.w + 2) * cell.mixed_channels + 16384);
      for (T** p : {&d_max, &d_avg}) *p = room.take<T>(source.pools ? size : 0);
      pool_scratch = room.take<T>(source.pools ? 8 * (source.w * cell.mixed_channels + 96) : 0);
      pools = run.take_pool_room(room, source.w);
      summed = room.take<T>(cell.K > 1 && source.stride == 2 ? cell.pixels() * cell.channels : 0);
      rows = room.take<T>((2 * source.w + 1) * cell.channels);
    }
  };
  // `queue`: what follows the convolutions; returned with what they read themselves in between
  void fetch_stage1(int s, const Stage1& plan, int64_t n, int64_t next, Stage1Room& room, Queue& queue) {
    int64_t size = cell.pixels() * cm, full = cell.pixels() * cell.channels;
    room.extra.clear();
    room.extra.add(plan.outer[n], cell.sources[s].h * cell.sources[s].w, cell.channels);
    if (!plan.dots.empty()) room.extra.add(bypass[s][n], cell.pixels(), cell.channels);
    for (const T* p : plan.around) room.extra.add(p + n * full, full * sizeof(T));
    room.extra.append(queue);
    queue.clear();
    int node = -1;
    auto conv = [&](const typename Stage1::Term& t, int64_t n) {
      bool sep = t.branch->op == Op::SepConv;
      queue.add(this->branch_output(sep ? t.branch->inner_output : t.branch->output, n), size * sizeof(S));
      if (sep)
        queue.add(this->branch_output(t.branch->output, n), size * sizeof(S));
      else if (t.node != node)
        queue.add(mixed_grad[node = t.node] + n * size, size * sizeof(T));
    };
    int64_t count = plan.convs.size();
    for (int64_t i = 0; i < count; i++) {
      if (i + 1 < count) conv(plan.convs[i + 1], n);
      queue.add_share(room.extra, i, count);
    }
    if (next >= 0 && count) conv(plan.convs[0], next);
  }
  void stage1(int s, int64_t n, Stage1& plan, Stage1Room& room, Queue& queue) {
    const Source& source = cell.sources[s];
    int64_t h = source.h, w = source.w, in = h * w * cm, size = cell.pixels() * cm, c = cell.channels;
    int64_t full = cell.pixels() * c;
    const T* x = this->mixed_image(s, n);
    // the first of them writes what the others add to
    bool add = plan.convs.empty() || plan.convs[0].branch->op == Op::Reduce;
    if (add) std::fill_n(room.dx, in, T(0));
    Ahead ahead = queue.over(plan.work);
    for (const auto& t : plan.convs) {
      const Branch& b = *t.branch;
      auto p = this->pair(b, false, source.stride);
      const T* g = mixed_grad[t.node] + n * size;
      const T* coef = norms[b.op == Op::SepConv ? b.inner_norm : b.norm].row(0);
      if (b.op == Op::Reduce)
        k.reduce_backward(g, this->branch_output(b.output, n), coef, h, w, cm, data.conv_weights + b.weight + 2 * cm * cm, room.dx,
                          room.scratch, ahead);
      else if (b.op == Op::SepConv)
        k.conv_backward_kept(this->branch_output(b.output, n), this->branch_output(b.inner_output, n), coef, h, w, cm, p.conv, p.dw, p.pw_t,
                             plan.frame, room.e, add, room.dx, room.scratch, ahead);
      else
        k.conv_backward(g, this->branch_output(b.output, n), coef, h, w, cm, p.conv, p.dw, p.pw_t, plan.frame, room.e, add,
                        room.dx, room.scratch, ahead);
      add = true;
    }
    auto& from = room.from;
    from.clear();
    for (const T* g : plan.grads) from.push_back(g + n * size);
    if (plan.has_identity)
      k.sum_states(room.rest, true, plan.count, from.data(), plan.identity.row(0), plan.zero.row(0), nullptr, in,
                   period);
    else
      std::fill_n(room.rest, in, T(0));
    if (source.pools) {
      this->each_pool_rows(source, x, room.pools, [&](int64_t at, int64_t len, const T* max, const T* avg) {
        from.clear();
        for (const T* g : plan.grads) from.push_back(g + n * size + at);
        from.push_back(max);
        k.sum_states(room.d_max + at, true, plan.count + 1, from.data(), plan.max_coef.row(0), plan.max_mean.row(0),
                     plan.max_bias.row(0), len, period);
        from.back() = avg;
        k.sum_states(room.d_avg + at, true, plan.count + 1, from.data(), plan.avg_coef.row(0), plan.avg_mean.row(0),
                     plan.avg_bias.row(0), len, period);
      });
      k.divide_by_window(room.d_avg, h, w, cm, source.stride);
      k.pool_backward(x, room.d_max, room.d_avg, h, w, cm, source.stride, room.rest, room.pool_scratch);
    }
    k.relu_backward_add(room.dx, x, room.rest, in, cm);
    auto& around = room.around;
    around.clear();
    for (const T* p : plan.around) around.push_back(p + n * full);
    const T* scale = plan.scale.data();
    T* dst = plan.whole + n * h * w * c;
    double* dots = plan.dots.empty() ? nullptr : plan.dots.data() + n * plan.count;
    ImageView<T> none{nullptr, 0, 0}, x_around = dots ? bypass[s][n] : none;
    int count = around.size();
    if (count && source.stride == 2) {
      k.join(nullptr, count, around.data(), scale, none, x_around, cell.oh, cell.ow, c, cell.K, room.summed, dots,
             room.rows);
      k.join(room.rest, 0, nullptr, nullptr, plan.outer[n], none, h, w, c, cell.K, dst, nullptr, room.rows);
      k.half_pool_backward(states[s][n], room.summed, h, w, c, dst);
    } else {
      k.join(room.rest, count, around.data(), scale, plan.outer[n], x_around, h, w, c, cell.K, dst, dots, room.rows);
    }
  }
  void finish_stage1(int s, const Stage1& plan) {
    if (plan.dots.empty()) return;
    for (int64_t n = 0; n < cell.images; n++)
      for (int j = 0; j < plan.count; j++) edge_gradients[cell.sources[s].edges[j]] += plan.dots[n * plan.count + j];
  }

  // The gradient of state s, and the dot products of the edges that enter it.
  void state(int s) {
    int i = s - cell.inputs;
    bool leaves = !cell.sources[s].edges.empty();
    Stage1 stage;
    Node plan;
    if (leaves) {
      int64_t row = cell.ow * cell.channels, full = cell.oh * row;
      T* given = i < 0 ? back.grad_inputs[s] : nullptr;
      const Source& source = cell.sources[s];
      stage = plan_stage1(s, given ? given : this->take(cell.images * source.h * source.w * cell.channels));
      if (i >= 0) state_grad[s] = {stage.whole, full, row, cell.channels};
    }
    if (i >= 0) plan = plan_node(i);
    this->parallel(cell.images, [&](ImageQueue& images) {
      Scratch room;
      Stage1Room stage_room(room, *this, stage, cell.sources[s]);
      NodeRoom node_room(room, *this, plan);
      Queue queue;
      images.each([&](int64_t n, int64_t next) {
        queue.clear();
        // the first pass reads all states
        if (i == cell.nodes - 1)
          for (int j = 0; j < plan.count; j++) this->make_dense(j, n);
        if (leaves) {
          if (i >= 0) fetch_node(plan, n, queue);
          fetch_stage1(s, stage, n, next, stage_room, queue);
          stage1(s, n, stage, stage_room, queue);
        }
        if (i >= 0) node(i, n, plan, node_room);
      });
    });
    if (leaves) finish_stage1(s, stage);
    if (i >= 0) finish_node(plan);
  }
};
}  // namespace

template <class T, class S>
void cell_backward(const Cell& cell, CellBackward<T, S>& data, const Parallel& parallel, const Allocate& allocate) {
  Backward<T, S> run(cell, data, parallel, allocate);
  for (int i = cell.nodes - 1; i >= 0; i--) {
    run.state(cell.inputs + i);
    run.stage2(i);
  }
  for (int s = 0; s < cell.inputs; s++)
    if (data.grad_inputs[s] || data.grad_edge_weights) run.state(s);
  if (data.grad_edge_weights)
    for (size_t e = 0; e < cell.edges.size(); e++) data.grad_edge_weights[e] = T(run.edge_gradients[e]);
}
template void cell_backward(const Cell&, CellBackward<float, float>&, const Parallel&, const Allocate&);
template void cell_backward(const Cell&, CellBackward<float, bf16>&, const Parallel&, const Allocate&);
template void cell_backward(const Cell&, CellBackward<double, double>&, const Parallel&, const Allocate&);
}  // namespace rfdarts
