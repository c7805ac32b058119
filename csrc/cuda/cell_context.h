// What a cell's forward and backward share on the host.
#pragma once
#include <algorithm>

#include "cuda/launch.h"
#include "cuda/node.h"
#include "cuda/processes.h"
#include "cuda/strips.h"

namespace rfdarts::cuda {

// A cell's ops for states stored as T: launches in a queue, in cell_forward.h and cell_backward.h.
template <class T>
struct CellRun {
  static void forward(const Cell&, const CellForward&, const Queue&, const Allocate&);
  static void branch_outputs(const Cell&, const CellForward&, const Queue&, const Allocate&);
  static void backward(const Cell&, const CellBackward&, const Queue&, const Allocate&);
};

template <class T>
ImageView<T> view(const States& s) {
  return {static_cast<const T*>(s.data), s.image, int(s.row), int(s.pixel)};
}
// vectors of V elements are aligned at every pixel
template <class T>
bool aligned(const ImageView<T>& x, int v) {
  return reinterpret_cast<uintptr_t>(x.data) % (v * sizeof(T)) == 0 && x.image % v == 0 && x.row % v == 0 &&
         x.pixel % v == 0;
}

template <class T>
struct CellContext {
  const Cell& cell;
  const CellForward& data;
  const Queue& queue;
  const Allocate& allocate;
  int n = int(cell.images), c = int(cell.channels), cm = int(cell.mixed_channels), oh = int(cell.oh), ow = int(cell.ow);
  std::vector<ImageView<T>> states;
  Norms<T> norms;
  const Acc<T>*conv_weights, *op_weights, *edge_weights;
  // per edge: outputs of its 1x1 convolution of NAS-Bench-201, in scratch, for they are not kept
  std::vector<T*> remade;
  // of the convolutions of NAS-Bench-201 what tensor cores take, in scratch (nor_conv_factors.h)
  T *factors = nullptr, *transposed_factors = nullptr;

  CellContext(const Cell& cell, const CellForward& data, const Queue& queue, const Allocate& allocate)
      : cell(cell), data(data), queue(queue), allocate(allocate), remade(cell.edges.size()) {
    for (const States& s : data.inputs) states.push_back(view<T>(s));
    for (const States& s : data.nodes) states.push_back(view<T>(s));
    auto params = [](const void* p) { return static_cast<const Acc<T>*>(p); };
    norms = {params(data.gamma), params(data.beta), data.moments, data.moments + int64_t(cell.norms) * cm,
             Acc<T>(cell.eps), cm};
    conv_weights = params(data.conv_weights), op_weights = params(data.op_weights);
    edge_weights = params(data.edge_weights);
  }
  static ImageView<T> dense(const T* data, int h, int w, int channels) {
    return {data, int64_t(h) * w * channels, w * channels, channels};
  }
  T* branch_output(int i) const { return static_cast<T*>(data.branch_outputs) + i * cell.images * cell.image_size(); }
  // what the last BatchNorm of edge e's branch reads
  T* output(int e, const Branch& b) const { return b.remade() ? remade[e] : branch_output(b.output); }
  // of all processes; see processes.h
  template <bool Moments, class U>
  void over_processes(const std::vector<Means<U>>& means) const {
    merge_over_processes<Moments>(data.processes, cell.images, cell.pixels(), means, queue, allocate);
  }
  // images as far apart as those of a branch output
  ImageView<T> mixed(const T* data) const { return {data, cell.image_size(), ow * cm, cm}; }
  template <class U>
  U* take(int64_t count) const {
    return static_cast<U*>(allocate(count * int64_t(sizeof(U))));
  }
  // loads of 16 bytes along the mixed channels of x
  bool wide(const ImageView<T>& x) const { return cm % kWide<T> == 0 && aligned(x, kWide<T>); }
  // Whether x is one for the kernels of strips: accesses of 4 channels, and offsets in an image of 31 bits.
  bool for_strips(const ImageView<T>& x, int h, int w) const {
    return aligned(x, 4) && int64_t(h) * x.row + int64_t(w) * x.pixel <= INT32_MAX;
  }
  // as SideBySide::group_of, or 0 where their weights or branch outputs are not ones for these kernels
  int strips_side_by_side() const {
    bool weights = reinterpret_cast<uintptr_t>(conv_weights) % 8 == 0;
    return weights && cell.image_size() <= INT32_MAX ? SideBySide::group_of(cm) : 0;
  }
  // whether products of the convolutions of NAS-Bench-201 are ones for them
  bool on_tensor_cores() const {
    return sizeof(T) == 2 && cm % 16 == 0 && reinterpret_cast<uintptr_t>(conv_weights) % 8 == 0;
  }
  int reach(const Branch& b) const { return b.op == Op::Reduce ? 1 : (b.kernel - 1) * b.dilation / 2; }
  // the second half of a separable convolution lies behind the first one's weights
  int64_t second_weight(const Branch& b) const { return b.weight + int64_t(b.kernel) * b.kernel * cm + 2ll * cm * cm; }
  dim3 grid(int64_t items) const { return dim3(unsigned(std::min(ceil_div<int64_t>(items, kThreads), kMaxBlocks))); }

  Node<T> node_of(int i) const {
    Node<T> p{};
    p.images = n, p.oh = oh, p.ow = ow, p.cm = cm;
    p.norms = norms, p.op_weights = op_weights, p.edge_weights = edge_weights;
    p.incoming = cell.incoming(i);
    require(p.incoming <= kMaxIncoming, "edges of a node");
    // offsets in an image are of 31 bits
    require(cell.image_size() <= INT32_MAX, "pixels of an image");
    // f(j, branch, its term) for the branches of every incoming edge j
    auto each_branch = [&](auto&& f) {
      for (int j = 0; j < p.incoming; j++)
        for (int k = 0, e = cell.first_edge(i) + j; k < cell.primitives; k++) {
          const Branch& b = cell.edges[e].branches[k];
          f(j, b, typename Node<T>::Term{b.norm, e * cell.primitives + k, e});
        }
    };
    each_branch([&](int j, const Branch& b, const auto& term) {
      if (!b.convolves() && b.op != Op::Noise) return;
      require(p.streams < kMaxBranches, "branches of a node");
      p.term[p.streams] = term;
      if (b.convolves())
        p.stream[p.streams++] = {output(cell.first_edge(i) + j, b), cell.image_size()};
      else
        p.stream[p.streams++] = {static_cast<const T*>(data.noise[b.noise]), cell.pixels() * cm};
    });
    for (int j = 0; j < p.incoming; j++) {
      const Source& source = cell.sources[j];
      p.in[j] = {states[j], int(source.h), int(source.w), source.stride, cell.first_edge(i) + j, false, false, false};
    }
    for (int row = p.streams; row < p.rows(); row++) p.term[row] = {-1, -1, -1};
    each_branch([&](int j, const Branch& b, const auto& term) {
      auto *terms = p.term + p.streams + 3 * j;
      if (b.op == Op::MaxPool) terms[0] = term, p.in[j].max = true;
      if (b.op == Op::AvgPool) terms[1] = term, p.in[j].avg = true;
      if (b.op == Op::Identity) terms[2] = term, p.in[j].identity = true;
    });
    return p;
  }
  // f(K), for those that kernels are compiled for
  template <class F>
  void with_partial_channels(F&& f) const {
    switch (cell.K) {
      case 1: return f.template operator()<1>();
      case 2: return f.template operator()<2>();
      case 4: return f.template operator()<4>();
      case 8: return f.template operator()<8>();
    }
    throw std::invalid_argument("K: the CUDA kernels know 1, 2, 4 and 8");
  }
  // vectors of V are aligned in all that enters a node
  bool aligned_node(const Node<T>& p, int v) const {
    bool all = cm % v == 0;
    for (int j = 0; j < p.incoming; j++) all = all && aligned(p.in[j].x, v);
    return all;
  }
};

}  // namespace rfdarts::cuda
