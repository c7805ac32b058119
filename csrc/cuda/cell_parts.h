// What a cell's forward and backward share on the host.
#pragma once
#include <algorithm>

#include "cuda/launch.h"

namespace rfdarts::cuda {

template <class T>
Images<T> images(const States& s) {
  return {static_cast<const T*>(s.data), s.image, int(s.row), int(s.pixel)};
}
// vectors of V elements are aligned at every pixel
template <class T>
bool aligned(const Images<T>& x, int v) {
  return reinterpret_cast<uintptr_t>(x.data) % (v * sizeof(T)) == 0 && x.image % v == 0 && x.row % v == 0 &&
         x.pixel % v == 0;
}

template <class T>
struct CellParts {
  const Cell& cell;
  const CellForward& data;
  cudaStream_t stream;
  const Allocate& allocate;
  int n = int(cell.images), c = int(cell.channels), cm = int(cell.mixed_channels), oh = int(cell.oh), ow = int(cell.ow);
  std::vector<Images<T>> states;
  Norms<T> norms;
  const Acc<T>*weights, *mix, *edge_weights;

  CellParts(const Cell& cell, const CellForward& data, cudaStream_t stream, const Allocate& allocate)
      : cell(cell), data(data), stream(stream), allocate(allocate) {
    for (const States& s : data.inputs) states.push_back(images<T>(s));
    for (const States& s : data.nodes) states.push_back(images<T>(s));
    auto params = [](const void* p) { return static_cast<const Acc<T>*>(p); };
    norms = {params(data.gamma), params(data.beta), data.moments, data.moments + int64_t(cell.norms) * cm,
             Acc<T>(cell.eps), cm};
    weights = params(data.conv_weights), mix = params(data.op_weights), edge_weights = params(data.edge_weights);
  }
  static Images<T> dense(const T* data, int h, int w, int channels) {
    return {data, int64_t(h) * w * channels, w * channels, channels};
  }
  T* branch_output(int s) const { return static_cast<T*>(data.branch_outputs) + s * cell.images * cell.image_size(); }
  Images<T> branch_output_images(int s) const { return {branch_output(s), cell.image_size(), ow * cm, cm}; }
  template <class U>
  U* take(int64_t count) const {
    return static_cast<U*>(allocate(count * int64_t(sizeof(U))));
  }
  // loads of 16 bytes along the mixed channels of x
  bool wide(const Images<T>& x) const { return cm % kWide<T> == 0 && aligned(x, kWide<T>); }
  int reach(const Branch& b) const { return b.op == Op::Reduce ? 1 : (b.kernel - 1) * b.dilation / 2; }
  dim3 grid(int64_t items) const { return dim3(unsigned(std::min(ceil_div<int64_t>(items, kThreads), kMaxBlocks))); }

  Node<T> node_of(int i) const {
    Node<T> p{};
    p.images = n, p.oh = oh, p.ow = ow, p.c = c, p.cm = cm;
    p.norms = norms, p.mix = mix, p.edge_weights = edge_weights;
    int first = cell.first_edge(i), count = cell.incoming(i);
    require(count <= kMaxIncoming, "edges of a node");
    for (int j = 0; j < count; j++) {
      int e = first + j;
      const Source& source = cell.sources[j];
      auto& in = p.in[p.incoming++];
      in = {states[j], int(source.h), int(source.w), source.stride, e, -1, -1, -1, -1, -1};
      for (int k = 0; k < cell.primitives; k++) {
        const Branch& b = cell.edges[e].branches[k];
        int at = e * cell.primitives + k;
        if (b.op == Op::MaxPool) in.max_norm = b.norm, in.max_mix = at;
        if (b.op == Op::AvgPool) in.avg_norm = b.norm, in.avg_mix = at;
        if (b.op == Op::Identity) in.identity_mix = at;
        if (!b.convolves() && b.op != Op::Noise) continue;
        require(p.streams < kMaxBranches, "branches of a node");
        if (b.convolves())
          p.stream[p.streams++] = {branch_output(b.output), cell.image_size(), b.norm, at, e};
        else
          p.stream[p.streams++] = {static_cast<const T*>(data.noise[b.noise]), cell.pixels() * cm, -1, at, e};
      }
    }
    return p;
  }
  // vectors of V are aligned in all that enters a node
  bool aligned_node(const Node<T>& p, int v) const {
    bool all = cm % v == 0;
    for (int j = 0; j < p.incoming; j++) all = all && aligned(p.in[j].x, v);
    return all;
  }
  static void require(bool room, const char* what) {
    if (!room) throw std::invalid_argument(std::string(what) + ": more than the CUDA kernels have room for");
  }
};

}  // namespace rfdarts::cuda
