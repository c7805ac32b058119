// A cell forward. Per state two passes over the images: one makes the state, summing the edges that enter it, and runs
// all first halves of the edges that leave it (stage 1); one runs their second halves (stage 2). In between lie the
// batch statistics. Threads split the images; statistics are summed in the images' order.
#include <algorithm>

#include "cpu/cell_context.h"

namespace rfdarts {
namespace {

template <class T, class S>
struct Forward : CellContext<T, S> {
  using CellContext<T, S>::CellContext;
  using CellContext<T, S>::cell;
  using CellContext<T, S>::data;
  using CellContext<T, S>::k;
  using CellContext<T, S>::cm;
  using CellContext<T, S>::period;
  using CellContext<T, S>::states;
  using CellContext<T, S>::mixed;
  using CellContext<T, S>::bypass;

  void merge(const Moments& moments, int64_t i, const std::vector<int>& norms) {
    double *mean = data.moments + norms[0] * cm, *variance = data.moments + (cell.norms + norms[0]) * cm;
    moments.merge(i, cell.images, cell.pixels(), mean, variance);
    for (int norm : norms) {
      std::copy_n(mean, cm, data.moments + norm * cm);
      std::copy_n(variance, cm, data.moments + (cell.norms + norm) * cm);
    }
  }
  bool bypasses(int64_t branches) const {
    return branches * cell.images * cell.image_size() * int64_t(sizeof(S)) > kBypassCache;
  }

  struct Stage1 {
    std::vector<const Branch*> branches;
    std::vector<int> max_norms, avg_norms;
    bool pools;
    int64_t work;
    Moments moments;
    Frame frame;
  };
  Stage1 plan_stage1(int s) const {
    const Source& source = cell.sources[s];
    Stage1 plan{{}, {}, {}, cell.training && source.pools, 0, {}, k.frame(source.h, source.w, cm, source.stride)};
    for (int e : source.edges)
      for (const Branch& b : cell.edges[e].branches) {
        if (b.convolves()) plan.branches.push_back(&b), plan.work += this->work(b);
        if (b.pools()) (b.op == Op::MaxPool ? plan.max_norms : plan.avg_norms).push_back(b.norm);
      }
    plan.moments = this->take_moments(plan.branches.size() + 2);
    return plan;
  }
  struct Stage1Room {
    T *x, *scratch, *shift;
    typename CellContext<T, S>::PoolRoom pools;
    Stage1Room(Scratch& room, const Forward& run, const Stage1& plan, const Source& source)
        : x(room.take<T>(plan.frame.size, true)), scratch(room.take<T>(3 * (source.w + 2) * run.cm + 16384)),
          shift(room.take<T>(4 * run.period)), pools(run.take_pool_room(room, source.w)) {}
  };
  void stage1(int s, int64_t n, Stage1& plan, const Stage1Room& room, Queue& queue) {
    const Source& source = cell.sources[s];
    int64_t h = source.h, w = source.w, count = plan.branches.size();
    const T* in = this->mixed_image(s, n);
    if (plan.pools) {
      double *mean[2], *deviation[2];
      for (int i : {0, 1}) {
        mean[i] = plan.moments.mean_of(n, count + i);
        deviation[i] = plan.moments.deviation_of(n, count + i);
      }
      T* sums = room.shift + 2 * period;
      this->each_pool_rows(source, in, room.pools, [&](int64_t at, int64_t size, const T* max, const T* avg) {
        k.add_moments(max, size / cm, cm, at == 0, room.shift, mean[0], deviation[0], sums);
        k.add_moments(avg, size / cm, cm, at == 0, room.shift + period, mean[1], deviation[1], sums);
      });
      for (int i : {0, 1}) k.finish_moments(room.shift + i * period, cell.pixels(), cm, mean[i], deviation[i]);
    }
    if (!count) return;
    k.frame_relu({in, w * cm, cm}, h, w, cm, plan.frame, room.x);
    Ahead ahead = queue.over(plan.work);
    bool bypass_cache = bypasses(count);
    for (int64_t i = 0; i < count; i++) {
      const Branch& b = *plan.branches[i];
      S* y = this->branch_output(b.op == Op::SepConv ? b.inner_output : b.output, n);
      double *mean = plan.moments.mean_of(n, i), *deviation = plan.moments.deviation_of(n, i);
      if (b.op == Op::Reduce) {
        k.reduce_forward(room.x, plan.frame, h, w, cm, data.conv_weights + b.weight, y, mean, deviation, room.scratch,
                         ahead);
      } else {
        auto p = this->pair(b, false, source.stride);
        k.conv_forward(room.x, plan.frame, h, w, cm, p.conv, p.dw, p.pw, y, bypass_cache, mean, deviation,
                       room.scratch, ahead);
      }
    }
  }
  void finish_stage1(Stage1& plan) {
    if (!cell.training) return;
    int64_t count = plan.branches.size();
    for (int64_t i = 0; i < count; i++) {
      const Branch& b = *plan.branches[i];
      merge(plan.moments, i, {b.op == Op::SepConv ? b.inner_norm : b.norm});
    }
    if (!plan.max_norms.empty()) merge(plan.moments, count, plan.max_norms);
    if (!plan.avg_norms.empty()) merge(plan.moments, count + 1, plan.avg_norms);
  }

  void stage2(int s) {
    std::vector<const Branch*> branches;
    int64_t work = 0;
    for (int e : cell.sources[s].edges)
      for (const Branch& b : cell.edges[e].branches)
        if (b.op == Op::SepConv) branches.push_back(&b), work += this->work(b);
    if (branches.empty()) return;
    int64_t count = branches.size(), h = cell.oh, w = cell.ow, bytes = h * w * cm * sizeof(S);
    std::vector<Coefficients<T>> affine;
    for (const Branch* b : branches) affine.push_back(this->affine(b->inner_norm));
    Moments moments = this->take_moments(count);
    Frame frame = k.frame(h, w, cm, 1);
    bool bypass_cache = bypasses(count);
    this->parallel(cell.images, [&](ImageQueue& images) {
      Scratch room;
      T* u = room.take<T>(frame.size, true);
      T* scratch = room.take<T>(w * cm + 4 * cm + 16384);
      Queue queue;
      images.each([&](int64_t n, int64_t next) {
        queue.clear();
        for (int64_t i = 1; i < count; i++) queue.add(this->branch_output(branches[i]->inner_output, n), bytes);
        if (next >= 0) queue.add(this->branch_output(branches[0]->inner_output, next), bytes);
        Ahead ahead = queue.over(work);
        for (int64_t i = 0; i < count; i++) {
          const Branch& b = *branches[i];
          k.frame_affine_relu(this->branch_output(b.inner_output, n), affine[i].row(0), affine[i].row(1), h, w, cm, frame, u);
          auto p = this->pair(b, true, 1);
          k.conv_forward(u, frame, h, w, cm, p.conv, p.dw, p.pw, this->branch_output(b.output, n), bypass_cache,
                         moments.mean_of(n, i), moments.deviation_of(n, i), scratch, ahead);
        }
      });
    });
    if (cell.training)
      for (int64_t i = 0; i < count; i++) merge(moments, i, {branches[i]->norm});
  }

  // What one edge adds to its node: streams with a mean and a coefficient per channel each. The BatchNorms' betas go to
  // the node's bias.
  struct Terms {
    std::vector<int> slots;
    Coefficients<T> kept, states, kept_mean, states_mean;
    bool max = false, avg = false, identity = false;
    std::vector<int> noise;
    int64_t rows = 0;
  };
  Terms terms(int e, std::vector<double>& bias) {
    const Edge& edge = cell.edges[e];
    Terms t;
    t.kept = t.states = t.kept_mean = t.states_mean = Coefficients<T>(cell.primitives, cm, period);
    auto normalised = [&](Coefficients<T>& to, Coefficients<T>& mean, int64_t row, const Branch& b, double strength) {
      for (int64_t i = 0; i < cm; i++) {
        to.set(row, i, strength * this->gamma(b.norm, i) * this->rstd(b.norm, i));
        mean.set(row, i, this->mean(b.norm, i));
        bias[i] += strength * this->beta(b.norm, i);
      }
    };
    auto each = [&](auto&& wanted, auto&& add) {
      for (int p = 0; p < cell.primitives; p++)
        if (wanted(edge.branches[p])) add(edge.branches[p], this->term_weight(e, p));
    };
    each([](const Branch& b) { return b.convolves(); }, [&](const Branch& b, double strength) {
      normalised(t.kept, t.kept_mean, t.slots.size(), b, strength);
      t.slots.push_back(b.output);
    });
    // the order in which `node` lists the streams
    each([](const Branch& b) { return b.op == Op::MaxPool; }, [&](const Branch& b, double strength) {
      normalised(t.states, t.states_mean, t.rows++, b, strength), t.max = true;
    });
    each([](const Branch& b) { return b.op == Op::AvgPool; }, [&](const Branch& b, double strength) {
      normalised(t.states, t.states_mean, t.rows++, b, strength), t.avg = true;
    });
    each([](const Branch& b) { return b.op == Op::Identity; }, [&](const Branch&, double strength) {
      t.states.set(t.rows++, strength), t.identity = true;
    });
    each([](const Branch& b) { return b.op == Op::Noise; }, [&](const Branch& b, double strength) {
      t.states.set(t.rows++, strength), t.noise.push_back(b.noise);
    });
    return t;
  }

  struct Node {
    int first = 0, count = 0;
    std::vector<Terms> edges;
    Coefficients<T> bias;
    std::vector<T> scale;
    int64_t widest = 0;  // of its inputs
  };
  Node plan_node(int i) {
    Node plan;
    plan.first = cell.first_edge(i), plan.count = cell.inputs + i;
    std::vector<double> constant(cm, 0.0);
    for (int j = 0; j < plan.count; j++) {
      plan.edges.push_back(terms(plan.first + j, constant));
      plan.scale.push_back(T(this->edge_weight(plan.first + j)));
      plan.widest = std::max(plan.widest, cell.sources[j].w);
    }
    plan.bias = Coefficients<T>(1, cm, period);
    for (int64_t i = 0; i < cm; i++) plan.bias.set(0, i, constant[i]);
    int s = cell.inputs + i;
    if (cell.sources[s].edges.empty())
      mixed[s] = states[s].data;
    else
      this->plan_dense(s, false);
    return plan;
  }
  struct NodeRoom {
    T *scratch, *inner;
    typename CellContext<T, S>::PoolRoom pools;
    std::vector<ImageView<T>> around;
    std::vector<const S*> kept;
    std::vector<const T*> from;
    NodeRoom(Scratch& room, const Forward& run, const Node& plan)
        : scratch(room.take<T>(run.cell.ow * run.cell.channels)),
          inner(room.take<T>(run.cell.K > 1 ? run.cell.pixels() * run.cm : 0)),
          pools(run.take_pool_room(room, plan.widest)) {}
  };
  // what `node` reads of image n, as far as the cache holds it
  void fetch_node(const Node& plan, int64_t n, Queue& queue) const {
    int64_t size = cell.pixels() * cm, full = cell.pixels() * cell.channels;
    for (int j = 0; j < plan.count && queue.bytes() < kFetchAtMost; j++) {
      for (int s : plan.edges[j].slots) queue.add(this->branch_output(s, n), size * sizeof(S));
      queue.add(this->mixed_image(j, n), size * sizeof(T));
      if (cell.K > 1) queue.add(bypass[j][n].data, full * sizeof(T));
    }
  }
  void node(int i, int64_t n, const Node& plan, NodeRoom& room) {
    int64_t size = cell.pixels() * cm, c = cell.channels, full = cell.pixels() * c;
    T* out = data.nodes[i] + n * full;
    T* sum = cell.K > 1 ? room.inner : out;
    for (int j = 0; j < plan.count; j++) {
      const Source& source = cell.sources[j];
      const Terms& t = plan.edges[j];
      room.kept.clear();
      for (int s : t.slots) room.kept.push_back(this->branch_output(s, n));
      k.sum_kept(sum, j == 0, room.kept.size(), room.kept.data(), t.kept.row(0), t.kept_mean.row(0),
                 plan.bias.row(0), size, period);
      const T* x = this->mixed_image(j, n);
      auto add_states = [&](int64_t at, int64_t len, const T* max, const T* avg) {
        room.from.clear();
        if (t.max) room.from.push_back(max);
        if (t.avg) room.from.push_back(avg);
        if (t.identity) room.from.push_back(x + at);
        for (int z : t.noise) room.from.push_back(data.noise[z] + n * size + at);
        k.sum_states(sum + at, false, room.from.size(), room.from.data(), t.states.row(0), t.states_mean.row(0),
                     nullptr, len, period);
      };
      if (t.max || t.avg)
        this->each_pool_rows(source, x, room.pools, add_states);
      else
        add_states(0, size, nullptr, nullptr);
    }
    room.around.clear();
    for (int j = 0; j < plan.count; j++) room.around.push_back(bypass[j][n]);
    if (cell.K > 1)
      k.bypass_forward(plan.count, room.around.data(), plan.scale.data(), sum, cell.oh, cell.ow, c, cell.K, out,
                       room.scratch);
    if (data.concat)
      k.spread(out, cell.pixels(), c, data.concat + (n * cell.pixels() * cell.nodes + i) * c, cell.nodes * c);
  }

  // Makes state s, if it is a node and wanted, and runs stage 1 of the edges that leave it.
  void state(int s, bool nodes) {
    bool sums = nodes && s >= cell.inputs, leaves = !cell.sources[s].edges.empty();
    if (!sums && !leaves) return;
    Node plan;
    if (sums)
      plan = plan_node(s - cell.inputs);
    else
      this->plan_dense(s, nodes && cell.K > 1);
    Stage1 stage = plan_stage1(s);
    this->parallel(cell.images, [&](ImageQueue& images) {
      Scratch room;
      NodeRoom node_room(room, *this, plan);
      Stage1Room stage_room(room, *this, stage, cell.sources[s]);
      Queue queue;
      images.each([&](int64_t n, int64_t next) {
        queue.clear();
        if (sums) {
          node(s - cell.inputs, n, plan, node_room);
          if (next >= 0) fetch_node(plan, next, queue);
        } else if (next >= 0) {
          queue.add(states[s][next], cell.sources[s].h * cell.sources[s].w, cell.channels);
        }
        if (!leaves) return;
        this->make_dense(s, n);
        stage1(s, n, stage, stage_room, queue);
      });
    });
    finish_stage1(stage);
  }

  // nodes: false where they are there already
  void run(bool nodes) {
    for (int s = 0; s < cell.states(); s++) {
      state(s, nodes);
      stage2(s);
    }
  }

  Coefficients<T> affine(int norm) {
    Coefficients<T> a(2, cm, period);
    for (int64_t i = 0; i < cm; i++) {
      double scale = this->gamma(norm, i) * this->rstd(norm, i);
      a.set(0, i, scale);
      a.set(1, i, this->beta(norm, i) - this->mean(norm, i) * scale);
    }
    return a;
  }
};
}  // namespace

template <class T, class S>
void cell_forward(const Cell& cell, CellForward<T, S>& data, const Parallel& parallel, const Allocate& allocate) {
  Forward<T, S>(cell, data, parallel, allocate).run(true);
}
template <class T, class S>
void cell_branch_outputs(const Cell& cell, CellForward<T, S>& data, const Parallel& parallel,
                         const Allocate& allocate) {
  Forward<T, S>(cell, data, parallel, allocate).run(false);
}
#define RF_CELL_FORWARD(T, S)                                                                       \
  template void cell_forward(const Cell&, CellForward<T, S>&, const Parallel&, const Allocate&); \
  template void cell_branch_outputs(const Cell&, CellForward<T, S>&, const Parallel&, const Allocate&);
RF_CELL_FORWARD(float, float)
RF_CELL_FORWARD(float, bf16)
RF_CELL_FORWARD(double, double)
}  // namespace rfdarts
