// A node's incoming edges as kernels see them.
#pragma once
#include "cuda/batch_norm.h"
#include "cuda/bypass.h"
#include "cuda/pool.h"

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

template <class T, int V>
__device__ void pool_at(const typename Node<T>::Incoming& in, int n, int y, int x, int ch, Pooled<T, V>& pooled) {
  pooled.compute(y * in.stride, x * in.stride, in.h, in.w,
                 [&](int v, int u, Acc<T>(&value)[V]) { load<V>(in.x.at(n, v, u) + ch, value); });
}

}  // namespace rfdarts::cuda
