// A cell of mixed ops: its description, and the memory that its forward and backward work on. No torch here.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <vector>

#include "rfdarts/kernels.h"

namespace rfdarts {

// The numbers are shared with rfdarts_fast/ops/compiled/plan.py.
enum class Op : int64_t { None, MaxPool, AvgPool, Identity, Reduce, SepConv, DilConv, Noise };

struct Branch {
  Op op;
  int kernel, dilation;
  // where its packed weights begin: depthwise [K*K][C], 1x1 [C][C], its transpose; twice for SepConv
  int64_t weight;
  // BatchNorms: the last one (-1: none), and the one between SepConv's halves
  int norm, inner_norm;
  int noise;
  // kept outputs: what the last BatchNorm sees, and what the inner one sees
  int slot = -1, inner_slot = -1;

  bool convolves() const { return op == Op::SepConv || op == Op::DilConv || op == Op::Reduce; }
  bool pools() const { return op == Op::MaxPool || op == Op::AvgPool; }
};

struct Edge {
  int source, node, stride;
  std::vector<Branch> branches;
};

// A state and the edges that leave it; all of one stride.
struct Source {
  int64_t h, w;
  int stride = 1;
  bool pools = false;
  std::vector<int> edges;
};

struct Cell {
  int inputs, nodes, primitives, norms;
  int64_t K, images, channels, mixed, oh, ow;
  bool training;
  double eps;
  std::vector<Edge> edges;
  std::vector<Source> sources;
  int slots = 0;

  // spec: inputs, nodes, primitives, norms, K, training, then per edge: stride and per primitive
  // (op, kernel, dilation, weight, norm, inner norm, noise); sizes: H, W of every input
  Cell(const std::vector<int64_t>& spec, int64_t images, int64_t channels, double eps,
       const std::vector<int64_t>& sizes);
  // elements of one image in one slot: whole vectors, so that every image is aligned
  int64_t image() const { return (oh * ow * mixed + 31) / 32 * 32; }
  int64_t pixels() const { return oh * ow; }
  int64_t kept_size() const { return slots * images * image(); }
  int first_edge(int node) const { return node * inputs + node * (node - 1) / 2; }
};

// States are NHWC with any image, row and pixel stride; null where there is none.
template <class T>
struct Batch {
  const T* data = nullptr;
  int64_t image = 0, row = 0, pixel = 0;
  View<T> operator[](int64_t n) const { return {data ? data + n * image : nullptr, row, pixel}; }
};

// The images of one thread. It takes a few more whenever it gets to its last, so that a thread that is held up does
// not hold up the others. The results do not depend on it: every image has its own sums.
class Images {
 public:
  Images(std::atomic<int64_t>& taken, int64_t count, int64_t threads)
      : taken_(taken), count_(count), few_(std::max<int64_t>(1, count / (8 * threads))) {}
  // f(image, the one after it or -1): what that one needs can be fetched meanwhile
  template <class F>
  void each(F&& f) {
    for (int64_t n = after(-1), next; n >= 0; n = next) f(n, next = after(n));
  }

 private:
  int64_t after(int64_t n) {
    if (++n < end_) return n;
    n = taken_.fetch_add(few_);
    end_ = std::min(n + few_, count_);
    return n < count_ ? n : -1;
  }
  std::atomic<int64_t>& taken_;
  int64_t count_, few_, end_ = 0;
};
// calls f in every thread
using Parallel = std::function<void(int64_t count, const std::function<void(Images&)>& f)>;
using Allocate = std::function<void*(int64_t bytes)>;

template <class T, class S>
struct CellForward {
  std::vector<Batch<T>> inputs;
  std::vector<const T*> noise;
  const T *weights, *gamma, *beta;
  int64_t weights_size;
  const T* mix;           // [edges][primitives]
  const T* edge_weights;  // [edges] or null
  S* kept;                // [slots][images][image()]
  double* moments;        // [2][norms][C/K] mean and variance; read instead of written where not training
  // written forward: [images][oh][ow][channels]; read again: in any order
  std::vector<T*> nodes;
  std::vector<Batch<T>> node_states;
  T* together = nullptr;  // [images][oh][ow][nodes * channels], or null
};

template <class T, class S>
struct CellBackward {
  CellForward<T, S> forward;         // kept is used up
  std::vector<Batch<T>> grad_nodes;  // null: no gradient
  std::vector<T*> grad_inputs;       // [images][h][w][channels] or null
  T *grad_gamma, *grad_beta;         // [norms][C/K]
  T *grad_mix, *grad_edge_weights;   // [edges][primitives], [edges]
};

// `allocate` gives memory for as long as the call lasts. nodes: false leaves the node passes out, which fills `kept`
// again.
template <class T, class S>
void cell_forward(const Cell& cell, CellForward<T, S>& data, bool nodes, const Parallel& parallel,
                  const Allocate& allocate);
template <class T, class S>
void cell_backward(const Cell& cell, CellBackward<T, S>& data, const Parallel& parallel, const Allocate& allocate);

// Seconds spent per phase since the process began, for benchmarks.
struct Phase {
  const char* name;
  double seconds;
};
const std::vector<Phase>& profile();

}  // namespace rfdarts
