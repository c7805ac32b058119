// A cell forward: per state one pass of all first halves (stage 1), one of all second halves (stage 2); per node
// one pass that sums its edges. Threads split the images; statistics are summed in the images' order.
#include <algorithm>

#include "cell_parts.h"

namespace rfdarts {
namespace {

// beyond this a stage's outputs are gone from the caches before they are read
constexpr int64_t kBypassCache = 24 << 20;

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

  void merge(Moments& moments, int64_t i, const std::vector<int>& norms) {
    double *mean = data.moments + norms[0] * cm, *variance = data.moments + (cell.norms + norms[0]) * cm;
    moments.merge(i, cell.images, cell.pixels(), mean, variance);
    for (int norm : norms) {
      std::copy_n(mean, cm, data.moments + norm * cm);
      std::copy_n(variance, cm, data.moments + (cell.norms + norm) * cm);
    }
  }

  void stage1(int s) {
    Timed timed(kStage1);
    const Source& source = cell.sources[s];
    std::vector<const Branch*> branches;
    std::vector<int> max_norms, avg_norms;
    for (int e : source.edges)
      for (const Branch& b : cell.edges[e].branches) {
        if (b.convolves()) branches.push_back(&b);
        if (b.pools()) (b.op == Op::MaxPool ? max_norms : avg_norms).push_back(b.norm);
      }
    bool pools = cell.training && source.pools;
    if (branches.empty() && !pools) return;
    int64_t count = branches.size(), h = source.h, w = source.w;
    Moments moments(cell.images, count + 2, cm);
    Frame frame = k.frame(h, w, cm, source.stride);
    bool bypass = count * cell.images * cell.image() * int64_t(sizeof(S)) > kBypassCache;
    this->parallel(cell.images, [&](int64_t begin, int64_t end) {
      Scratch room;
      T* x = room.take<T>(frame.size, true);
      T* scratch = room.take<T>(2 * w * cm + 4 * cm + 16384);
      T* max = room.take<T>(pools ? cell.pixels() * cm : 0);
      T* avg = room.take<T>(pools ? cell.pixels() * cm : 0);
      for (int64_t n = begin; n < end; n++) {
        View<T> in{this->mixed_image(s, n), w * cm, cm};
        if (pools) {
          k.pool_forward(in.data, h, w, cm, source.stride, max, avg, scratch);
          k.moments(max, cell.pixels(), cm, moments.mean_of(n, count), moments.deviation_of(n, count));
          k.moments(avg, cell.pixels(), cm, moments.mean_of(n, count + 1), moments.deviation_of(n, count + 1));
        }
        if (count) k.frame_relu(in, h, w, cm, frame, x);
        for (int64_t i = 0; i < count; i++) {
          const Branch& b = *branches[i];
          S* y = this->slot(b.op == Op::SepConv ? b.inner_slot : b.slot, n);
          double *mean = moments.mean_of(n, i), *deviation = moments.deviation_of(n, i);
          if (b.op == Op::Reduce) {
            k.reduce_forward(x, frame, h, w, cm, data.weights + b.weight, y, mean, deviation, scratch);
          } else {
            auto p = this->pair(b, false, source.stride);
            k.conv_forward(x, frame, h, w, cm, p.conv, p.dw, p.pw, y, bypass, mean, deviation, scratch, Ahead());
          }
        }
      }
    });
    if (!cell.training) return;
    for (int64_t i = 0; i < count; i++)
      merge(moments, i, {branches[i]->op == Op::SepConv ? branches[i]->inner_norm : branches[i]->norm});
    if (!max_norms.empty()) merge(moments, count, max_norms);
    if (!avg_norms.empty()) merge(moments, count + 1, avg_norms);
  }

  void stage2(int s) {
    Timed timed(kStage2);
    std::vector<const Branch*> branches;
    for (int e : cell.sources[s].edges)
      for (const Branch& b : cell.edges[e].branches)
        if (b.op == Op::SepConv) branches.push_back(&b);
    if (branches.empty()) return;
    int64_t count = branches.size(), h = cell.oh, w = cell.ow;
    std::vector<Coefficients<T>> affine;
    for (const Branch* b : branches) affine.push_back(this->affine(b->inner_norm));
    Moments moments(cell.images, count, cm);
    Frame frame = k.frame(h, w, cm, 1);
    bool bypass = count * cell.images * cell.image() * int64_t(sizeof(S)) > kBypassCache;
    this->parallel(cell.images, [&](int64_t begin, int64_t end) {
      Scratch room;
      T* u = room.take<T>(frame.size, true);
      T* scratch = room.take<T>(w * cm + 4 * cm + 16384);
      for (int64_t n = begin; n < end; n++)
        for (int64_t i = 0; i < count; i++) {
          const Branch& b = *branches[i];
          k.frame_affine_relu(this->slot(b.inner_slot, n), affine[i].row(0), affine[i].row(1), h, w, cm, frame, u);
          auto p = this->pair(b, true, 1);
          bool last = i + 1 == count;
          Ahead ahead;
          if (!last || n + 1 < end)
            ahead = this->ahead(this->slot(branches[last ? 0 : i + 1]->inner_slot, n + last), h * w * cm * sizeof(S));
          k.conv_forward(u, frame, h, w, cm, p.conv, p.dw, p.pw, this->slot(b.slot, n), bypass,
                         moments.mean_of(n, i), moments.deviation_of(n, i), scratch, ahead);
        }
    });
    if (cell.training)
      for (int64_t i = 0; i < count; i++) merge(moments, i, {branches[i]->norm});
  }

  // What one edge adds to its node: streams with a coefficient per channel each. Its constant
  // goes to the node's bias.
  struct Terms {
    std::vector<int> slots;
    Coefficients<T> kept, states;
    bool max = false, avg = false, identity = false;
    std::vector<int> noise;
    int64_t rows = 0;
  };
  Terms terms(int e, std::vector<double>& bias) {
    const Edge& edge = cell.edges[e];
    Terms t;
    t.kept = t.states = Coefficients<T>(cell.primitives, cm, period);
    auto normalised = [&](Coefficients<T>& to, int64_t row, const Branch& b, double strength) {
      for (int64_t i = 0; i < cm; i++) {
        double scale = this->gamma(b.norm, i) * this->rstd(b.norm, i);
        to.set(row, i, strength * scale);
        bias[i] += strength * (this->beta(b.norm, i) - this->mean(b.norm, i) * scale);
      }
    };
    auto each = [&](auto&& wanted, auto&& add) {
      for (int p = 0; p < cell.primitives; p++)
        if (wanted(edge.branches[p])) add(edge.branches[p], this->strength(e, p));
    };
    each([](const Branch& b) { return b.convolves(); }, [&](const Branch& b, double strength) {
      normalised(t.kept, t.slots.size(), b, strength);
      t.slots.push_back(b.slot);
    });
    // the order in which `node` lists the streams
    each([](const Branch& b) { return b.op == Op::MaxPool; }, [&](const Branch& b, double strength) {
      normalised(t.states, t.rows++, b, strength), t.max = true;
    });
    each([](const Branch& b) { return b.op == Op::AvgPool; }, [&](const Branch& b, double strength) {
      normalised(t.states, t.rows++, b, strength), t.avg = true;
    });
    each([](const Branch& b) { return b.op == Op::Identity; }, [&](const Branch&, double strength) {
      t.states.set(t.rows++, strength), t.identity = true;
    });
    each([](const Branch& b) { return b.op == Op::Noise; }, [&](const Branch& b, double strength) {
      t.states.set(t.rows++, strength), t.noise.push_back(b.noise);
    });
    return t;
  }

  void node(int i) {
    Timed timed(kNodes);
    int first = cell.first_edge(i), count = cell.inputs + i;
    int64_t size = cell.pixels() * cm, c = cell.channels, full = cell.pixels() * c;
    bool partial = cell.K > 1;
    std::vector<Terms> all;
    int64_t largest = 0;
    std::vector<double> constant(cm, 0.0);
    for (int e = first; e < first + count; e++) all.push_back(terms(e, constant));
    Coefficients<T> bias(1, cm, period);
    for (int64_t i = 0; i < cm; i++) bias.set(0, i, constant[i]);
    std::vector<T> scale;
    for (int j = 0; j < count; j++) {
      largest = std::max(largest, cell.sources[j].h * cell.sources[j].w);
      scale.push_back(T(this->edge_weight(first + j)));
    }
    int state = cell.inputs + i;
    T* packed = nullptr;
    mixed[state] = data.nodes[i];
    bypass[state] = states[state];
    if (partial && !cell.sources[state].edges.empty()) mixed[state] = packed = this->take(cell.images * size);
    this->parallel(cell.images, [&](int64_t begin, int64_t end) {
      Scratch room;
      T* scratch = room.take<T>(4 * (largest + 16) * cm + cell.ow * c);
      T* max = room.take<T>(size);
      T* avg = room.take<T>(size);
      T* inner = room.take<T>(partial ? size : 0);
      for (int64_t n = begin; n < end; n++) {
        T* out = data.nodes[i] + n * full;
        T* sum = partial ? inner : out;
        std::vector<View<T>> around;
        for (int j = 0; j < count; j++) {
          const Source& source = cell.sources[j];
          const Terms& t = all[j];
          std::vector<const S*> kept;
          for (int s : t.slots) kept.push_back(this->slot(s, n));
          k.sum_kept(sum, j == 0, kept.size(), kept.data(), t.kept.row(0), bias.row(0), size, period);
          std::vector<const T*> from;
          const T* x = this->mixed_image(j, n);
          if (t.max || t.avg) k.pool_forward(x, source.h, source.w, cm, source.stride, max, avg, scratch);
          if (t.max) from.push_back(max);
          if (t.avg) from.push_back(avg);
          if (t.identity) from.push_back(x);
          for (int z : t.noise) from.push_back(data.noise[z] + n * size);
          k.sum_states(sum, false, from.size(), from.data(), t.states.row(0), nullptr, size, period);
          around.push_back(bypass[j][n]);
        }
        if (partial) {
          k.bypass_forward(count, around.data(), scale.data(), inner, cell.oh, cell.ow, c, cell.K, out, scratch);
          if (packed) k.pack({out, cell.ow * c, c}, cell.oh, cell.ow, cm, packed + n * size);
        }
        if (data.together)
          k.spread(out, cell.pixels(), c, data.together + (n * cell.pixels() * cell.nodes + i) * c, cell.nodes * c);
      }
    });
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
void cell_forward(const Cell& cell, CellForward<T, S>& data, bool nodes, const Parallel& parallel,
                  const Allocate& allocate) {
  Forward<T, S> run(cell, data, parallel, allocate);
  for (int s = 0; s < cell.inputs + cell.nodes; s++) {
    if (nodes && s >= cell.inputs)
      run.node(s - cell.inputs);
    else
      run.prepare(s, nodes && cell.K > 1);
    if (cell.sources[s].edges.empty()) continue;
    run.stage1(s);
    run.stage2(s);
  }
}
template void cell_forward(const Cell&, CellForward<float, float>&, bool, const Parallel&, const Allocate&);
template void cell_forward(const Cell&, CellForward<float, bf16>&, bool, const Parallel&, const Allocate&);
template void cell_forward(const Cell&, CellForward<double, double>&, bool, const Parallel&, const Allocate&);
}  // namespace rfdarts
