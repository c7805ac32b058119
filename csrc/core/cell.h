// A cell of mixed ops, decoded from the integers that the ops take; csrc/README.md has a picture. No torch here.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace rfdarts {

// The numbers are shared with rfdarts_fast/ops/contract.py.
enum class Op : int64_t { None, MaxPool, AvgPool, Identity, Reduce, SepConv, DilConv, Noise, NorConv };

// One candidate operation of an edge.
struct Branch {
  Op op;
  // of depthwise convolutions and NorConv, which has no dilation, else 0
  int kernel, dilation;
  // where its packed convolutions begin in conv_weights: depthwise [kernel^2][C], 1x1 [C in][C out] and its transpose,
  // twice for SepConv; for Reduce 1x1 and its transpose alone; for NorConv [kernel^2][C in][C out],
  // [kernel^2][C out][C in] with its taps from last to first, and of 3x3 ones both transformed (cpu/nor_conv.h), to
  // [16][C in][C out] and [16][C out][C in]. C: mixed channels
  int64_t weight;
  // rows of gamma, beta and moments: of the last BatchNorm, which an average pool may lack, and of the one between
  // SepConv's halves; -1: none
  int norm, inner_norm;
  // which tensor of `noise`; -1: none
  int noise;
  // numbers of its branch outputs: what the last BatchNorm reads, and what the inner one reads; -1: none
  int output = -1, inner_output = -1;

  bool convolves() const { return op == Op::SepConv || op == Op::DilConv || op == Op::Reduce || op == Op::NorConv; }
  bool pools() const { return op == Op::MaxPool || (op == Op::AvgPool && norm >= 0); }
  // its output is not kept but made again
  bool remade() const { return op == Op::NorConv && kernel == 1; }
  // an average pool without BatchNorm: linear, so that those of all edges are one pool of a weighted sum
  bool averages() const { return op == Op::AvgPool && norm < 0; }
  // kernels take the convolutions of NAS-Bench-201 that leave a state together, 3x3 ones first: 0 for others
  int nor_conv_rank() const { return op != Op::NorConv ? 0 : kernel == 3 ? 1 : 2; }
  // numbers in its packed convolutions
  int64_t weight_size(int64_t channels) const;
};

struct Edge {
  int source, node, stride;
  std::vector<Branch> branches;
};

// What the integers say: inputs, nodes, primitives, norms, K, then per edge its stride and per primitive op, kernel,
// dilation, weight, norm, inner norm, noise. Edges are ordered by node, then by source; every node has one from each
// earlier state. Throws std::invalid_argument where a number is out of its range.
struct CellDescription {
  int inputs, nodes, primitives, norms;
  int64_t K;
  std::vector<Edge> edges;

  explicit CellDescription(const std::vector<int64_t>& encoded);
  // one line for the cell, each edge and each branch
  std::string text() const;
  int states() const { return inputs + nodes; }
  // how many edges enter a node, and the first of them; edge first_edge(node) + s comes from state s
  int incoming(int node) const { return inputs + node; }
  int first_edge(int node) const { return node * inputs + node * (node - 1) / 2; }
};

// A state and the edges that leave it; all of one stride.
struct Source {
  int64_t h, w;
  int stride = 1;
  bool pools = false;
  std::vector<int> edges;
};

// A cell and the sizes of its states. images: N; oh, ow: of the nodes.
struct Cell : CellDescription {
  int64_t images, channels, mixed_channels, oh = 0, ow = 0;
  // BatchNorms use the batch's statistics
  bool training;
  double eps;
  std::vector<Source> sources;
  // counts of branch outputs, of noise tensors, and of numbers in conv_weights
  int outputs = 0, noises = 0;
  int64_t conv_weights_size = 0;

  // sizes: H, W of every input. Throws std::invalid_argument where they do not fit the description.
  Cell(const std::vector<int64_t>& encoded, int64_t images, int64_t channels, bool training, double eps,
       const std::vector<int64_t>& sizes);
  int64_t pixels() const { return oh * ow; }
  // elements of one image in one branch output: whole vectors, so that every image is aligned
  int64_t image_size() const { return (pixels() * mixed_channels + 31) / 32 * 32; }
  int64_t branch_outputs_size() const { return outputs * images * image_size(); }
};

}  // namespace rfdarts
