// A cell of mixed ops on a CUDA device. No torch and no CUDA header here.
#pragma once
#include <functional>
#include <vector>

#include "core/cell.h"
#include "core/running_stats.h"

namespace rfdarts::cuda {

// How states and branch outputs are stored. Parameters and weights are double for Double, else float.
enum class Storage { Float, Double, BFloat16, Half };

struct States {
  const void* data = nullptr;
  int64_t image = 0, row = 0, pixel = 0;
};

struct CellForward {
  std::vector<States> inputs;
  std::vector<const void*> noise;
  const void *conv_weights, *gamma, *beta, *op_weights;
  const void* edge_weights;  // or null
  void* branch_outputs;      // [outputs][images][image_size()]
  double* moments;           // [2][norms][C/K]
  std::vector<States> nodes;
};

struct CellBackward {
  CellForward forward;
  std::vector<States> grad_nodes;  // null: no gradient
  std::vector<void*> grad_inputs;  // or null
  void *grad_gamma, *grad_beta, *grad_op_weights;
  void* grad_edge_weights;         // or null
};

// storage: Double where running statistics are double, else Float; moments [2][norms][channels]
void update_running_stats(Storage storage, const std::vector<RunningStats>& running, const double* moments,
                          int64_t channels, const RunningUpdate& update, void* stream);

// Device memory that lives until the op's end.
using Allocate = std::function<void*(int64_t bytes)>;

// All only launch kernels on `stream`: no synchronisation, no allocation of their own. They throw
// std::runtime_error where a launch fails, std::invalid_argument for a cell that the kernels have no room for.
void cell_forward(Storage storage, const Cell& cell, const CellForward& data, void* stream, const Allocate& allocate);
// fills branch_outputs again, for a cell in evaluation mode
void cell_branch_outputs(Storage storage, const Cell& cell, const CellForward& data, void* stream,
                         const Allocate& allocate);
void cell_backward(Storage storage, const Cell& cell, const CellBackward& data, void* stream,
                   const Allocate& allocate);

}  // namespace rfdarts::cuda
