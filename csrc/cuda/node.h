// A node's incoming edges as kernels see them.
#pragma once
#include <algorithm>
#include <cmath>

#include "cuda/batch_norm.h"
#include "cuda/bypass.h"
#include "cuda/pool_column.h"

namespace rfdarts::cuda {

// A node is a sum of terms. Rows of terms: first the streams, which are read (branch outputs and noise), then of each
// incoming edge the max pool, the average pool and the identity, which are computed again from its input.
template <class T>
struct Node {
  int images, oh, ow, cm;  // cm: mixed channels
  Norms<T> norms;
  const Acc<T>*op_weights, *edge_weights;  // edge_weights: or null
  int streams, incoming;
  struct Stream {
    const T* data;  // dense [oh][ow][cm]
    int64_t image;
  } stream[kMaxBranches];
  struct Incoming {
    ImageView<T> x;
    int h, w, stride, edge;
    bool max, avg, identity;  // the terms that the edge has
  } in[kMaxIncoming];
  struct Term {
    int norm, op, edge;  // norm: -1 where it has none; op: place in op_weights, -1 where the edge has no such term
  } term[kMaxBranches + 3 * kMaxIncoming];

  __host__ __device__ int rows() const { return streams + 3 * incoming; }
  __device__ Acc<T> edge_weight(int edge) const { return edge_weights ? edge_weights[edge] : Acc<T>(1); }
  __device__ Acc<T> term_weight(const Term& t) const {
    return edge_weights ? edge_weights[t.edge] * op_weights[t.op] : op_weights[t.op];
  }
};

// channels of a lane: more would cost registers, not save loads
template <class T>
constexpr int kNarrow = kWide<T> < 4 ? kWide<T> : 4;

// The tile of a block that sums over a node: whole rows of an image, or a part of one row. The more there is to sum,
// the more blocks, and the larger ones: sqrt(values) / 2 of them have 2 sqrt(values) each. What is summed must not
// depend on the device.
template <class T>
Tiling node_tiling(int images, int h, int w, int c) {
  constexpr int least = 512, most = (32 << 10) / int(sizeof(Acc<T>));
  int goal = int(std::clamp(2 * std::sqrt(double(images) * h * w * c), double(least), double(most)));
  int tw = std::clamp(goal / c, 1, w), th = tw < w ? 1 : std::clamp(goal / (w * c), 1, h);
  // as many, but equal ones
  return Tiling(ceil_div(h, ceil_div(h, th)), ceil_div(w, ceil_div(w, tw)), 0, images, h, w);
}

}  // namespace rfdarts::cuda
