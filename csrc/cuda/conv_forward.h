// The first convolutions of all branches that read a tile, or the second ones of separable convolutions, from one load
// of it: y = pointwise(depthwise(relu(x))) per branch, and its statistics. States that are there at once share a launch.
#pragma once
#include "cuda/batch_norm.h"
#include "cuda/depthwise.h"
#include "cuda/moments.h"
#include "cuda/pointwise.h"
#include "cuda/pool.h"

namespace rfdarts::cuda {

// x: [h][w], of stride 2 if S = 2
template <class T>
struct ConvForward {
  Tiling tiling;
  int h, w, oh, ow, c, reach;
  int64_t image;    // of y
  bool wide;        // 16-byte loads and stores are aligned
  double* partial;  // [branches][2][tiles][c] mean and squared deviations, or null
  const Acc<T>* conv_weights;
  Norms<T> norms;
  int branches;
  struct Branch {
    ImageView<T> x;
    T* y;  // null: pools, whose outputs are not kept
    int64_t weight;
    int norm;  // x = norm's scale x + shift; -1: x itself
    int16_t op;
    int8_t kernel, dilation;

    __device__ bool pools() const { return op == int(Op::MaxPool) || op == int(Op::AvgPool); }
    __device__ bool reduces() const { return op == int(Op::Reduce); }
  } branch[kMaxBranches];
  // A state's branches, a row of the grid: [begin, pools) convolve, [pools, end) are pools.
  struct State {
    int begin, pools, end;
  } state[kMaxStates];
};

// A block's shared memory: xs, the input with its halo; ds, depthwise outputs; ys, branch outputs; sums for statistics.
template <class T>
struct ForwardTile {
  int th, tw, ck, reach;
  int rows, columns, pitch;  // of xs
  int pixels, ld;            // of ds [pixels][ld]; ys is [pixels][c]
  int ds, ys, sums, bytes;   // offsets in bytes

  __host__ __device__ ForwardTile(const Tiling& t, int c, int reach, int stride)
      : th(t.th), tw(t.tw), ck(t.ck), reach(reach) {
    rows = (th - 1) * stride + 1 + 2 * reach;
    columns = (tw - 1) * stride + 1 + 2 * reach;
    pitch = tile_pitch(columns, ck, sizeof(T));
    pixels = th * tw;
    // four consecutive rows of ds lie in different banks
    ld = round_up(c, 4) + 4;
    ds = round_up(rows * pitch * int(sizeof(T)), 16);
    ys = ds + pixels * ld * int(sizeof(Acc<T>));
    sums = round_up(ys + pixels * c * int(sizeof(T)), 16);
    bytes = sums + OutputTile<T>::room(c);
  }
};

// A block's phases, each for channels [c0, c0 + count) or all.
template <class T, int S>
struct ForwardBlock {
  using A = Acc<T>;
  using Branch = typename ConvForward<T>::Branch;
  const ConvForward<T>& a;
  unsigned char* shared;

  ForwardTile<T> tile{a.tiling, a.c, a.reach, S};
  T *xs = reinterpret_cast<T*>(shared), *ys = reinterpret_cast<T*>(shared + tile.ys);
  A* ds = reinterpret_cast<A*>(shared + tile.ds);
  Corner corner = a.tiling.corner(blockIdx.x);
  // vh x vw pixels of the tile are valid
  int c = a.c, vh = min(tile.th, a.oh - corner.y), vw = min(tile.tw, a.ow - corner.x);
  OutputTile<T> outputs{c, tile.tw, vh, vw, ys, reinterpret_cast<A*>(shared + tile.sums)};

  // xs = x, or the BatchNorm `norm` of it; 0 outside the image
  template <int V>
  __device__ void load_input(const ImageView<T>& x, int norm, int c0, int count) const {
    Lanes<V> lane(count);
    const Norms<T>& norms = a.norms;
    int y0 = corner.y * S - tile.reach, x0 = corner.x * S - tile.reach;
    A scale[V], shift[V];
    if (norm >= 0) {
#pragma unroll
      for (int i = 0; i < V; i++) {
        int ch = c0 + lane.channel + i;
        scale[i] = norms.scale(norm, ch);
        shift[i] = norms.beta[norm * norms.c + ch] - norms.mean(norm, ch) * scale[i];
      }
    }
    for (int p = lane.pixel; p < tile.rows * tile.columns; p += lane.step) {
      int row = p / tile.columns, column = p % tile.columns;
      A v[V] = {};
      if (unsigned(y0 + row) < unsigned(a.h) && unsigned(x0 + column) < unsigned(a.w)) {
        load<V>(x.at(corner.n, y0 + row, x0 + column) + c0 + lane.channel, v);
        if (norm >= 0) {
#pragma unroll
          for (int i = 0; i < V; i++) v[i] = scale[i] * v[i] + shift[i];
        }
      }
      store<V>(xs + row * tile.pitch + column * tile.ck + lane.channel, v);
    }
  }
  // ys = a 3x3 pool of xs
  __device__ void pool(bool max, int c0, int count) const {
    for (int i = threadIdx.x; i < vh * vw * count; i += kThreads) {
      int ch = i % count, q = i / count % vw, r = i / (count * vw);
      Pooled<T, 1> pooled;
      pooled.compute((corner.y + r) * S, (corner.x + q) * S, a.h, a.w, [&](int y, int x, A(&v)[1]) {
        int row = y - corner.y * S + tile.reach, column = x - corner.x * S + tile.reach;
        v[0] = widen(xs[row * tile.pitch + column * tile.ck + ch]);
      });
      ys[(r * tile.tw + q) * c + c0 + ch] = narrow<T>(max ? pooled.max[0] : pooled.avg[0]);
    }
  }
  // ds = relu of the pixels that a convolution of FactorizedReduce reads: the second one's lie one further on
  __device__ void reduce(int second, int c0, int count) const {
    for (int i = threadIdx.x; i < tile.pixels * count; i += kThreads) {
      int ch = i % count, p = i / count, ahead = tile.reach + second;
      int from = (p / tile.tw * S + ahead) * tile.pitch + (p % tile.tw * S + ahead) * tile.ck + ch;
      ds[p * tile.ld + c0 + ch] = relu(widen(xs[from]));
    }
  }
  // ys = the branch's outputs; branches of one source find it still in xs, if all its channels are there
  __device__ void compute(const Branch& branch, bool in_xs) const {
    bool pools = branch.pools(), reduces = branch.reduces();
    const A* weights = a.conv_weights + branch.weight;
    for (int pass = 0; pass < (reduces ? 2 : 1); pass++) {
      for (int c0 = 0; c0 < c; c0 += tile.ck) {
        int count = min(tile.ck, c - c0);
        if (tile.ck < c || !in_xs) {
          // nobody reads xs any more
          __syncthreads();
          with_width<T>(a.wide, [&]<int V>() { load_input<V>(branch.x, branch.norm, c0, count); });
          // xs is complete
          __syncthreads();
        }
        if (pools)
          pool(branch.op == int(Op::MaxPool), c0, count);
        else if (reduces)
          reduce(pass, c0, count);
        else
          with_kernel(branch.kernel, branch.dilation,
                      [&]<int K, int D>() { depthwise<K, D, S>(tile, xs, weights, c, c0, count, ds); });
      }
      // ds is complete, or ys of pools
      __syncthreads();
      if (pools) continue;
      int taps = branch.kernel * branch.kernel, half = c / 2;
      int begin = reduces && pass ? half : 0, end = reduces && !pass ? half : c;
      pointwise<T>(ds, tile.ld, tile.pixels, weights + taps * c, c, begin, end, ys);
      // ys is complete
      __syncthreads();
    }
  }
};

// Blocks: tiles x states.
template <class T, int S>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    conv_forward_kernel(const __grid_constant__ ConvForward<T> a) {
  RFDARTS_SHARED(shared);
  ForwardBlock<T, S> block{a, shared};
  const auto& state = a.state[blockIdx.y];
  for (int b = state.begin; b < state.end; b++) {
    const auto& branch = a.branch[b];
    block.compute(branch, b > state.begin && branch.x.data == a.branch[b - 1].x.data);
    if (branch.y)
      block.outputs.store(branch.y + block.corner.n * a.image, block.corner.y, block.corner.x, a.ow, a.wide);
    if (!a.partial) continue;
    block.outputs.moments(a.partial + int64_t(b) * 2 * a.tiling.count * a.c, a.tiling.count);
    // convolutions overwrite ys and sums only after the barrier that follows their depthwise part; pools have none
    if (b + 1 < state.end && a.branch[b + 1].pools()) __syncthreads();
  }
}

}  // namespace rfdarts::cuda
