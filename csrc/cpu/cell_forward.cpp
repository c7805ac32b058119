// A cell forward. Per state two passes over the images: one makes the state, summing the edges that enter it, and runs
// the first convolutions of the edges that leave it; one runs the second halves of separable ones. In between lie the
// batch statistics, those of all processes where there are several. Threads split the images; statistics are summed in
// the images' order.
#include <optional>

#include "cpu/node_forward.h"

namespace rfdarts {
namespace {

// the batch's statistics from those of the images, to the rows of all BatchNorms that have the same input
template <class T, class S>
void merge(CellContext<T, S>& run, const ImageMoments& moments, int64_t i, const std::vector<int>& norms) {
  if (norms.empty()) return;
  int64_t cm = run.cm, variances = run.cell.norms * cm;
  double* first = run.data.moments + norms[0] * cm;
  moments.merge(i, run.cell.images, run.cell.pixels(), first, first + variances);
  for (size_t j = 1; j < norms.size(); j++) {
    double* other = run.data.moments + norms[j] * cm;
    std::copy_n(first, cm, other);
    std::copy_n(first + variances, cm, other + variances);
  }
  for (int norm : norms) {
    double* mean = run.data.moments + norm * cm;
    run.own_moments.push_back({mean, mean + variances, cm});
  }
}
template <class T, class S>
bool bypasses_cache(const CellContext<T, S>& run, int64_t branches) {
  return branches * run.cell.images * run.cell.image_size() * int64_t(sizeof(S)) > kBypassCache;
}

// The first convolutions of all edges that leave a state, and the statistics of its pools.
template <class T, class S>
struct FirstConvs : Phase<T, S, CellContext<T, S>> {
  using P = Phase<T, S, CellContext<T, S>>;
  using P::cell, P::cm, P::k, P::period, P::run;
  int s;
  const Source& source = cell.sources[s];
  Frame frame = k.frame(this->run.source_size(s), source.stride), nor_frame = k.nor_frame(this->run.source_size(s));
  // those of NAS-Bench-201 come last, 3x3 ones first
  std::vector<const Branch*> branches;
  int64_t nor_convs = 0;
  std::vector<int> max_norms, avg_norms;
  int64_t work = 0;
  ImageMoments moments;  // of the branch outputs, then of the pools

  FirstConvs(CellContext<T, S>& run, int s) : P{run}, s(s) {
    for (int e : source.edges)
      for (const Branch& b : cell.edges[e].branches) {
        if (b.convolves()) branches.push_back(&b), work += run.work(b), nor_convs += b.op == Op::NorConv;
        if (b.pools()) (b.op == Op::MaxPool ? max_norms : avg_norms).push_back(b.norm);
      }
    std::stable_sort(branches.begin(), branches.end(), [](const Branch* a, const Branch* b) {
      return a->nor_conv_rank() < b->nor_conv_rank();
    });
    moments = run.take_moments(branches.size() + 2);
  }

  // of one thread
  struct Room {
    T *framed, *nor_framed, *scratch, *shifts;
    std::vector<NorConv<T, S>> nor_convs;
    typename CellContext<T, S>::RowRoom pools;
    Room(Scratch& room, const FirstConvs& convs)
        : framed(room.take<T>(convs.depthwise() ? convs.frame.size : 0, true)),
          nor_framed(room.take<T>(convs.nor_convs ? convs.nor_frame.size : 0, true)),
          scratch(room.take<T>(std::max(
              {ScratchSize<T>::conv_forward(convs.cell.ow, convs.cm),
               ScratchSize<T>::conv1x1_forward(convs.cell.ow, convs.cm, 1, convs.cm), ScratchSize<T>::sums(convs.cm),
               convs.nor_convs ? ScratchSize<T>::nor_convs_forward(convs.cell.ow, convs.cm, convs.nor_convs) : 0}))),
          shifts(room.take<T>(2 * convs.period)), pools(room, convs.run, convs.source.w) {}
  };
  int64_t depthwise() const { return branches.size() - nor_convs; }
  void image(int64_t n, Room& room, FetchQueue& queue) const {
    const T* x = run.mixed_image(s, n);
    if (cell.training && source.pools) pool_moments(x, n, room);
    if (branches.empty()) return;
    Size size = run.source_size(s);
    ImageView<T> view{x, size.w * cm, cm};
    Ahead ahead = queue.over(work);
    bool bypass_cache = bypasses_cache(run, branches.size());
    if (depthwise()) k.frame_relu(view, size, frame, room.framed);
    room.nor_convs.clear();
    for (size_t i = 0; i < branches.size(); i++) {
      const Branch& b = *branches[i];
      // without batch statistics nothing is wanted of what is not stored
      if (b.remade() && !cell.training) continue;
      S* y = b.remade() ? nullptr : run.branch_output(b.op == Op::SepConv ? b.inner_output : b.output, n);
      ConvOutput<S> out{y, moments.mean_of(n, i), moments.deviation_of(n, i)};
      if (b.op == Op::NorConv) {
        out.bypass_cache = bypass_cache;
        auto [weights, transformed] = run.nor_conv(b, false);
        room.nor_convs.push_back({b.kernel, weights, transformed, out});
      } else if (b.op == Op::Reduce) {
        Conv1x1<T, S> conv{cm, run.conv_weights + b.weight, out};
        k.conv1x1_forward(view, cell.oh, cell.ow, cm, true, 1, &conv, room.scratch, ahead);
      } else {
        out.bypass_cache = bypass_cache;
        k.conv_forward(room.framed, frame, size, run.conv(b, false, source.stride), out, room.scratch, ahead);
      }
    }
    if (room.nor_convs.empty()) return;
    k.frame_relu(view, size, nor_frame, room.nor_framed);
    k.nor_convs_forward(room.nor_framed, nor_frame, size, room.nor_convs.size(), room.nor_convs.data(), room.scratch,
                        ahead);
  }
  void pool_moments(const T* x, int64_t n, const Room& room) const {
    int64_t max = branches.size(), avg = max + 1;
    T *max_shift = room.shifts, *avg_shift = room.shifts + period;
    run.each_rows(s, x, room.pools, true, nullptr, [&](int64_t at, int64_t count, const auto& rows) {
      k.add_moments(rows.max, count / cm, cm, at == 0, max_shift, moments.mean_of(n, max),
                    moments.deviation_of(n, max), room.scratch);
      k.add_moments(rows.avg, count / cm, cm, at == 0, avg_shift, moments.mean_of(n, avg),
                    moments.deviation_of(n, avg), room.scratch);
    });
    k.finish_moments(max_shift, cell.pixels(), cm, moments.mean_of(n, max), moments.deviation_of(n, max));
    k.finish_moments(avg_shift, cell.pixels(), cm, moments.mean_of(n, avg), moments.deviation_of(n, avg));
  }
  void finish() const {
    if (!cell.training) return;
    int64_t count = branches.size();
    for (int64_t i = 0; i < count; i++)
      merge(run, moments, i, {branches[i]->op == Op::SepConv ? branches[i]->inner_norm : branches[i]->norm});
    merge(run, moments, count, max_norms);
    merge(run, moments, count + 1, avg_norms);
  }
};

// Makes state s, if it is a node and `nodes`, and runs the first convolutions of the edges that leave it.
template <class T, class S>
void state_forward(CellContext<T, S>& run, int s, bool nodes) {
  const Cell& cell = run.cell;
  std::optional<NodeForward<T, S>> node;
  std::optional<FirstConvs<T, S>> convs;
  if (nodes && s >= cell.inputs) node.emplace(run, s - cell.inputs);
  if (!cell.sources[s].edges.empty()) {
    run.plan_dense(s, nodes && cell.K > 1);
    convs.emplace(run, s);
  }
  if (!node && !convs) return;
  run.parallel(cell.images, [&](ImageQueue& images) {
    Scratch scratch;
    std::optional<typename NodeForward<T, S>::Room> node_room;
    std::optional<typename FirstConvs<T, S>::Room> convs_room;
    if (node) node_room.emplace(scratch, *node);
    if (convs) convs_room.emplace(scratch, *convs);
    FetchQueue queue;
    images.each([&](int64_t n, int64_t next) {
      queue.clear();
      if (node) {
        node->image(n, *node_room);
        if (next >= 0) node->fetch(next, queue);
      } else if (next >= 0) {
        queue.add(run.states[s][next], cell.sources[s].h * cell.sources[s].w, cell.channels);
      }
      if (!convs) return;
      run.make_dense(s, n);
      convs->image(n, *convs_room, queue);
    });
  });
  if (convs) convs->finish();
}

// The second halves of the separable convolutions of the edges that leave state s.
template <class T, class S>
void second_convs_forward(CellContext<T, S>& run, int s) {
  const Cell& cell = run.cell;
  const Kernels<T, S>& k = run.k;
  std::vector<const Branch*> branches;
  int64_t work = 0;
  for (int e : cell.sources[s].edges)
    for (const Branch& b : cell.edges[e].branches)
      if (b.op == Op::SepConv) branches.push_back(&b), work += run.work(b);
  if (branches.empty()) return;
  int64_t count = branches.size(), bytes = run.mixed_size * sizeof(S);
  std::vector<Coefficients<T>> affine;
  for (const Branch* b : branches) affine.push_back(run.affine(b->inner_norm));
  ImageMoments moments = run.take_moments(count);
  Size size = run.output_size();
  Frame frame = k.frame(size, 1);
  bool bypass_cache = bypasses_cache(run, count);
  run.parallel(cell.images, [&](ImageQueue& images) {
    Scratch room;
    T* framed = room.take<T>(frame.size, true);
    T* scratch = room.take<T>(ScratchSize<T>::conv_forward(size.w, size.c));
    FetchQueue queue;
    images.each([&](int64_t n, int64_t next) {
      queue.clear();
      for (int64_t i = 1; i < count; i++) queue.add(run.branch_output(branches[i]->inner_output, n), bytes);
      if (next >= 0) queue.add(run.branch_output(branches[0]->inner_output, next), bytes);
      Ahead ahead = queue.over(work);
      for (int64_t i = 0; i < count; i++) {
        const Branch& b = *branches[i];
        k.frame_affine_relu(run.branch_output(b.inner_output, n), affine[i].row(0), affine[i].row(1), size, frame,
                            framed);
        ConvOutput<S> out{run.branch_output(b.output, n), moments.mean_of(n, i), moments.deviation_of(n, i),
                          bypass_cache};
        k.conv_forward(framed, frame, size, run.conv(b, true, 1), out, scratch, ahead);
      }
    });
  });
  if (cell.training)
    for (int64_t i = 0; i < count; i++) merge(run, moments, i, {branches[i]->norm});
}

void forward(Storage storage, const Cell& cell, const CellForward& data, bool nodes, const Parallel& parallel,
             const Allocate& allocate) {
  with_types(storage, [&]<class T, class S>() {
    CellContext<T, S> run(cell, data, parallel, allocate);
    for (int s = 0, next; s < cell.states(); s = next) {
      // one message for all inputs, which wait for nothing
      next = s == 0 && data.processes.sum ? cell.inputs : s + 1;
      for (int i = s; i < next; i++) state_forward(run, i, nodes);
      run.merge_over_processes();
      for (int i = s; i < next; i++) second_convs_forward(run, i);
      run.merge_over_processes();
    }
  });
}
}  // namespace

void cpu::cell_forward(Storage storage, const Cell& cell, const CellForward& data, const Parallel& parallel,
                       const Allocate& allocate) {
  forward(storage, cell, data, true, parallel, allocate);
}
void cpu::cell_branch_outputs(Storage storage, const Cell& cell, const CellForward& data, const Parallel& parallel,
                              const Allocate& allocate) {
  forward(storage, cell, data, false, parallel, allocate);
}
}  // namespace rfdarts
