// A cell of mixed ops, and its preprocessing, on a CUDA device. No torch and no CUDA header here.
#pragma once
#include <vector>

#include "core/cell.h"
#include "core/data.h"
#include "core/running_stats.h"

namespace rfdarts::cuda {

// layers of one op, which share its launches
constexpr int kMaxLayers = 8;

// storage: Double where running statistics are double, else Float; moments [2][norms][channels]
void update_running_stats(Storage storage, const std::vector<RunningStats>& running, const double* moments,
                          int64_t channels, const RunningUpdate& update, void* stream);

// All only launch kernels on `stream`: no synchronisation, no allocation of their own. They throw
// std::runtime_error where a launch fails, std::invalid_argument for a cell that the kernels have no room for.
void cell_forward(Storage storage, const Cell& cell, const CellForward& data, void* stream, const Allocate& allocate);
// fills branch_outputs again, for a cell in evaluation mode
void cell_branch_outputs(Storage storage, const Cell& cell, const CellForward& data, void* stream,
                         const Allocate& allocate);
void cell_backward(Storage storage, const Cell& cell, const CellBackward& data, void* stream,
                   const Allocate& allocate);
void relu_conv_bn_forward(Storage storage, const ReLUConvBN& a, void* stream, const Allocate& allocate);
void relu_conv_bn_backward(Storage storage, const ReLUConvBN& a, void* stream, const Allocate& allocate);

}  // namespace rfdarts::cuda
