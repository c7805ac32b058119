// A cell backward, from the last state to the first. Per state two passes over the images: one gathers the gradients of
// all edges that leave it and takes the dot products of the edges that enter it with its own gradient (for BatchNorms,
// op weights and edge weights); one goes through the second halves of its separable convolutions. The gradient at a
// BatchNorm's input is never stored: see NormBackward.
#include "cpu/cell_backward.h"

#include <optional>

#include "cpu/node_backward.h"
#include "cpu/state_backward.h"

namespace rfdarts {
namespace {

// The gradient of state s, if edges leave it, and the sums of the edges that enter it, if it is a node.
template <class T, class S>
void state_backward(BackwardContext<T, S>& run, int s) {
  const Cell& cell = run.cell;
  int i = s - cell.inputs;
  std::optional<StateBackward<T, S>> state;
  std::optional<NodeBackward<T, S>> node;
  if (const Source& source = cell.sources[s]; !source.edges.empty()) {
    int64_t h = source.h, w = source.w, c = cell.channels;
    T* dx = i < 0 ? static_cast<T*>(run.gradients.grad_inputs[s]) : nullptr;
    state.emplace(run, s, dx ? dx : run.take(cell.images * h * w * c));
    run.state_grad[s] = {state->dx, h * w * c, w * c, c};
  }
  if (i >= 0) node.emplace(run, i);
  run.parallel(cell.images, [&](ImageQueue& images) {
    Scratch scratch;
    std::optional<typename StateBackward<T, S>::Room> state_room;
    std::optional<typename NodeBackward<T, S>::Room> node_room;
    if (state) state_room.emplace(scratch, *state);
    if (node) node_room.emplace(scratch, *node);
    FetchQueue queue;
    images.each([&](int64_t n, int64_t next) {
      queue.clear();
      // the first pass reads all states
      if (i == cell.nodes - 1)
        for (int j = 0; j < cell.incoming(i); j++) run.make_dense(j, n);
      if (state) {
        if (node) node->fetch(n, queue);
        state->fetch(n, next, *state_room, queue);
        state->image(n, *state_room, queue);
      }
      if (node) node->image(n, *node_room);
    });
  });
  if (state) state->finish();
  if (node) node->finish();
}

// The second halves of the separable convolutions of the edges that enter node i. The gradient at the inner BatchNorm's
// output replaces the branch output of the second half, which is not needed any more.
template <class T, class S>
void second_convs_backward(BackwardContext<T, S>& run, int i) {
  const Cell& cell = run.cell;
  const Kernels<T, S>& k = run.k;
  std::vector<const Branch*> branches;
  int64_t work = 0;
  for (int e = cell.first_edge(i); e < cell.first_edge(i + 1); e++)
    for (const Branch& b : cell.edges[e].branches)
      if (b.op == Op::SepConv) branches.push_back(&b), work += run.work(b);
  if (branches.empty()) return;
  int64_t count = branches.size(), cm = run.cm, bytes = run.mixed_size * sizeof(S);
  std::vector<Coefficients<T>> affine;
  for (const Branch* b : branches) affine.push_back(run.affine(b->inner_norm));
  double* partials = run.take_sums(cell.images * count * 2 * cm);
  Size size = run.output_size();
  Frame frame = k.frame(size, 1);
  run.parallel(cell.images, [&](ImageQueue& images) {
    Scratch room;
    T* framed = room.take<T>(frame.size, true);
    T* dx = room.take<T>(run.mixed_size);
    T* scratch = room.take<T>(std::max(ScratchSize<T>::conv_backward(size.w, cm), ScratchSize<T>::sums(cm)));
    FetchQueue queue;
    images.each([&](int64_t n, int64_t next) {
      queue.clear();
      for (int64_t j = 0; j < count; j++) {
        queue.add(run.branch_output(branches[j]->inner_output, n), bytes);
        if (j + 1 < count) queue.add(run.branch_output(branches[j + 1]->output, n), bytes);
      }
      if (next >= 0) {
        queue.add(run.mixed_grad[i] + next * run.mixed_size, run.mixed_size * sizeof(T));
        queue.add(run.branch_output(branches[0]->output, next), bytes);
      }
      Ahead ahead = queue.over(work);
      for (int64_t j = 0; j < count; j++) {
        const Branch& b = *branches[j];
        S* y = run.branch_output(b.output, n);
        k.conv_backward(run.norm_backward(b.norm, run.mixed_grad[i] + n * run.mixed_size, y), size,
                        run.conv(b, true, 1), frame, framed, false, dx, scratch, ahead);
        double* sums = partials + (n * count + j) * 2 * cm;
        std::fill_n(sums, 2 * cm, 0.0);
        k.relu_backward_inner(dx, run.branch_output(b.inner_output, n), affine[j].row(0), affine[j].row(1),
                              affine[j].row(2), y, sums, sums + cm, run.mixed_size, cm, scratch);
      }
    });
  });
  std::vector<double> sum(count * 2 * cm, 0.0);
  for (int64_t n = 0; n < cell.images; n++)
    for (size_t v = 0; v < sum.size(); v++) sum[v] += partials[n * sum.size() + v];
  std::vector<double> all = run.over_processes(sum);
  for (int64_t j = 0; j < count; j++) {
    const double *own = sum.data() + j * 2 * cm, *of_all = all.data() + j * 2 * cm;
    run.finish_norm(branches[j]->inner_norm, 1, {own, own + cm}, {of_all, of_all + cm});
  }
}
}  // namespace

void cpu::cell_backward(Storage storage, const Cell& cell, const CellBackward& data, const Parallel& parallel,
                        const Allocate& allocate) {
  with_types(storage, [&]<class T, class S>() {
    BackwardContext<T, S> run(cell, data, parallel, allocate);
    for (int i = cell.nodes - 1; i >= 0; i--) {
      state_backward(run, cell.inputs + i);
      second_convs_backward(run, i);
    }
    for (int s = 0; s < cell.inputs; s++)
      if (data.grad_inputs[s] || run.wants_dots()) state_backward(run, s);
    if (!data.grad_edge_weights) return;
    for (size_t e = 0; e < cell.edges.size(); e++)
      static_cast<T*>(data.grad_edge_weights)[e] = T(run.grad_edge_weights[e]);
  });
}
}  // namespace rfdarts
