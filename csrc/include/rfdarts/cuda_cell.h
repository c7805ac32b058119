// A cell of mixed ops on a CUDA device. No torch and no CUDA header here.
#pragma once
#include <functional>
#include <vector>

#include "rfdarts/cell.h"

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
  const void *weights, *gamma, *beta, *mix;
  const void* edge_weights;  // or null
  void* kept;                // [slots][images][image()]
  double* moments;           // [2][norms][C/K]
  std::vector<States> nodes;
};

struct CellBackward {
  CellForward forward;
  std::vector<States> grad_nodes;  // null: no gradient
  std::vector<void*> grad_inputs;  // or null
  void *grad_gamma, *grad_beta, *grad_mix;
  void* grad_edge_weights;         // or null
};

// Running statistics of BatchNorms as BatchNorm2d in training mode updates them; type as in CellForward.
struct Running {
  void *mean, *variance;
  int64_t* batches;
};
void update_running(Storage storage, const std::vector<Running>& running, const double* moments, int64_t channels,
                    double momentum, int64_t count, void* stream);

// Device memory that lives until the op's end.
using Allocate = std::function<void*(int64_t bytes)>;

// Both only launch kernels on `stream`: no synchronisation, no allocation of their own. They throw
// std::runtime_error where a launch fails, std::invalid_argument for a cell that the kernels have no room for.
// nodes: false leaves the node passes and the statistics out, which fills `kept` again.
void cell_forward(Storage storage, const Cell& cell, const CellForward& data, bool nodes, void* stream,
                  const Allocate& allocate);
void cell_backward(Storage storage, const Cell& cell, const CellBackward& data, void* stream,
                   const Allocate& allocate);

}  // namespace rfdarts::cuda
