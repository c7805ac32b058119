// What the ops hand to a device's kernels: pointers of tensors that were checked. No torch here.
#pragma once
#include <cstdint>
#include <functional>
#include <vector>

namespace rfdarts {

// How branch outputs are stored. States are too on CUDA; on the CPU they are float or double. Arithmetic, parameters and
// weights are double for Double, else float.
enum class Storage { Float, Double, BFloat16, Half };

// Memory that lives until the op's end.
using Allocate = std::function<void*(int64_t bytes)>;

// Sums numbers in a device's memory over all processes of a run, in place. None: this process is alone.
using SumOverProcesses = std::function<void(double* sums, int64_t count)>;

// Whose images the statistics of BatchNorms in training mode are of: this call's, or those of the same call in every
// process.
struct Processes {
  SumOverProcesses sum;
  int64_t images = 0;  // of all, where there is a sum
};

// N images, NHWC with consecutive channels and any image, row and pixel stride; null data: none.
struct States {
  void* data = nullptr;
  int64_t image = 0, row = 0, pixel = 0;
};

struct CellForward {
  std::vector<States> inputs;
  std::vector<const void*> noise;
  const void *conv_weights, *gamma, *beta;
  const void *op_weights, *edge_weights;  // [edges][primitives], [edges] or null
  void* branch_outputs;                   // [outputs][images][image_size()]
  double* moments;                        // [2][norms][C/K] mean and variance; read, not written, where not training
  // CPU: the matrices in conv_weights are pairs (cpu/kernels.h), and products of bfloat16 numbers
  bool bfloat16_products = false;
  std::vector<States> nodes;              // written in the forward, dense on the CPU; read again in any order
  void* concat = nullptr;                 // CPU: [images][oh][ow][nodes * channels] or null
  Processes processes;
};

struct CellBackward {
  CellForward forward;                          // branch_outputs is used up
  std::vector<States> grad_nodes;               // null: no gradient
  std::vector<void*> grad_inputs;               // [images][h][w][channels] or null
  void *grad_gamma, *grad_beta;                 // [norms][C/K]
  void *grad_op_weights, *grad_edge_weights;    // [edges][primitives], [edges] or null
};

// ReLU, frozen 1x1 convolution, BatchNorm: the preprocessing of a cell, and FactorizedReduce (`reduce`). Several such
// layers that read the same state share one read of it.
struct ReLUConvBN {
  struct Layer {
    int64_t co;
    // [ci][co] and its transpose
    const void *conv_weights, *gamma, *beta;
    void* y;          // [images][oh][ow][co], before the BatchNorm
    double* moments;  // [2][co]; read, not written, where not training
    // of the forward; of the backward
    void* output = nullptr;
    const void* g = nullptr;
    void *grad_gamma = nullptr, *grad_beta = nullptr;
  };
  int64_t images, h, w, ci;  // of x
  bool reduce, training;
  double eps;
  States x;
  std::vector<Layer> layers;
  void* grad_x = nullptr;    // [images][h][w][ci] or null
  bool bfloat16_products = false;  // CPU; as of a cell
  Processes processes;

  int64_t oh() const { return reduce ? h / 2 : h; }
  int64_t ow() const { return reduce ? w / 2 : w; }
};

// A BatchNorm by itself, with `relu` the ReLU behind it too. All images are dense, [images][pixels][c].
struct BatchNorm {
  int64_t images, pixels, c;
  bool relu, training;
  double eps;
  const void *x, *gamma, *beta;
  double* moments;  // [2][c]; read, not written, where not training
  // of the forward; of the backward, grad_x null: not wanted
  void* output = nullptr;
  const void* g = nullptr;
  void *grad_x = nullptr, *grad_gamma = nullptr, *grad_beta = nullptr;
};

}  // namespace rfdarts
