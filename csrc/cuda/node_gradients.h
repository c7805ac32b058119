// From a node's sums: gradients of gamma, beta, op weights and edge weights, and the coefficients of NormBackward.
#pragma once
#include "cuda/node.h"

namespace rfdarts::cuda {

template <class T>
struct NodeGradients {
  Node<T> node;
  NormOutputs<T> outputs;
  const double* partial;  // as NodeBackward's
  int blocks, primitives;
  Acc<T>* grad_op_weights;
  double* edge_terms;  // [edges][primitives + 1]: what each term, and the bypass, gives to its edge weight; or null
};

// One block per row of terms, then one per bypass. The sum of g is added up beside each row's own: a block waits for
// both together.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) node_gradients_kernel(const __grid_constant__ NodeGradients<T> a) {
  RFDARTS_SHARED(shared);
  double* room = reinterpret_cast<double*>(shared);
  const Node<T>& node = a.node;
  int row = int(blockIdx.x), rows = node.rows(), c = node.cm, channels = min(c, kThreads);
  bool bypass = row >= rows;
  int edge = bypass ? node.in[row - rows].edge : node.term[row].edge;
  int norm = bypass ? -1 : node.term[row].norm, op = bypass ? -1 : node.term[row].op;
  if (!bypass && op < 0) return;
  double edge_weight = double(node.edge_weight(edge)), op_weight = bypass ? 1 : double(node.op_weights[op]);
  // of g x, or, where the row has a BatchNorm, of g z: of one channel, then of all
  double gradient[1] = {};
  for (int c0 = 0; c0 < c; c0 += channels) {
    int ch = c0 + int(threadIdx.x) % channels;
    bool owns = int(threadIdx.x) < channels && ch < c;
    // the sum of g has a row between the terms and the bypasses
    const double* dots = a.partial + int64_t(bypass ? row + 1 : row) * a.blocks * c + min(ch, c - 1);
    const double* gs = a.partial + int64_t(rows) * a.blocks * c + min(ch, c - 1);
    double sums[2];
    sum_items<2>(a.blocks, channels, room, sums, [&](int block, double(&of)[2]) {
      of[0] = dots[int64_t(block) * c];
      of[1] = norm < 0 ? 0 : gs[int64_t(block) * c];
    });
    if (owns)
      gradient[0] += norm < 0 ? sums[0] : a.outputs.write(norm, ch, edge_weight * op_weight, sums[1], sums[0]);
  }
  sum_parts(gradient, 1, room);
  if (threadIdx.x != 0) return;
  if (!bypass) a.grad_op_weights[op] = Acc<T>(edge_weight * gradient[0]);
  if (a.edge_terms)
    a.edge_terms[bypass ? edge * (a.primitives + 1) + a.primitives : op + edge] = op_weight * gradient[0];
}

// The gradients of all edge weights: one thread each.
template <class T>
struct EdgeGradients {
  const double* edge_terms;
  int edges, terms;
  Acc<T>* grad_edge_weights;
};
template <class T>
__global__ void __launch_bounds__(kThreads) edge_gradients_kernel(const __grid_constant__ EdgeGradients<T> a) {
  int edge = int(blockIdx.x) * kThreads + threadIdx.x;
  if (edge >= a.edges) return;
  double sum = 0;
  for (int i = 0; i < a.terms; i++) sum += a.edge_terms[edge * a.terms + i];
  a.grad_edge_weights[edge] = Acc<T>(sum);
}

}  // namespace rfdarts::cuda
