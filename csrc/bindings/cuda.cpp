// The ops of every device for CUDA tensors, beside a torch with or without CUDA. Torch's stable ABI only. With
// RFDARTS_EMULATION: the same kernels on CPU tensors, as a library of its own.
#ifndef RFDARTS_EMULATION
#include <Python.h>

#define USE_CUDA
#include <cuda_runtime.h>
#endif
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/schemas.h"
#include "core/arguments.h"
#include "cuda/cell.h"
#include "cuda/relu_conv_bn.h"

#ifdef RFDARTS_EMULATION
#include "emulation/cuda.h"
#else
// absent from a torch without CUDA
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
#endif

namespace rfdarts::cuda {
namespace {
#ifdef RFDARTS_EMULATION
struct Device {
  explicit Device(const Tensor&) {}
  void* stream() const { return nullptr; }
};
#else
// the tensor's device is current while this lives
struct Device {
  int32_t index;
  torch::stable::accelerator::DeviceGuard guard;
  explicit Device(const Tensor& x) : index(x.get_device_index()), guard(index) {}
  void* stream() const {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "this torch was built without CUDA");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
    return stream;
  }
};
#endif

constexpr DTypes kDTypes = {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half};

// of a tensor that was checked to have one of these dtypes
Storage storage_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Double: return Storage::Double;
    case ScalarType::BFloat16: return Storage::BFloat16;
    case ScalarType::Half: return Storage::Half;
    default: return Storage::Float;
  }
}
States states(const Tensor& x) {
  // kernels count within an image in 32 bits
  if (std::max(x.stride(2), x.stride(3)) > INT32_MAX) refuse("states", "strides below 2^31", text(x.strides()));
  return {x.data_ptr(), x.stride(0), x.stride(2), x.stride(3)};
}
// [N, C, H, W], channels last
Tensor empty_state(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w) {
  Tensor x = torch::stable::new_empty(like, {n, h, w, c});
  return torch::stable::transpose(torch::stable::transpose(x, 1, 3), 2, 3);
}

Cell check(const CellArguments& arguments, const Ints& encoded, bool training, double eps, bool bfloat16) {
  if (bfloat16) refuse("bfloat16", "false on CUDA, where branch outputs have the dtype of the inputs", "true");
  return arguments.check(encoded, training, eps, kDTypes);
}
CellForward forward_data(const CellArguments& a, const Tensor& branch_outputs, const Tensor& moments,
                         const Tensors& nodes) {
  CellForward data;
  for (const Tensor& x : a.inputs) data.inputs.push_back(states(x));
  if (a.noise)
    for (const Tensor& z : *a.noise) data.noise.push_back(z.data_ptr());
  data.conv_weights = a.conv_weights.data_ptr();
  data.gamma = a.gamma.data_ptr();
  data.beta = a.beta.data_ptr();
  data.op_weights = a.op_weights.data_ptr();
  data.edge_weights = a.edge_weights && *a.edge_weights ? (**a.edge_weights).data_ptr() : nullptr;
  data.branch_outputs = branch_outputs.data_ptr();
  data.moments = static_cast<double*>(moments.data_ptr());
  for (const Tensor& node : nodes) data.nodes.push_back(states(node));
  return data;
}

// tensors that live until the op's end; the allocator reuses them in the stream's order
struct Room {
  const Tensor& like;
  Tensors taken;
  void* operator()(int64_t bytes) {
    taken.push_back(torch::stable::new_empty(like, {bytes}, ScalarType::Byte));
    return taken.back().data_ptr();
  }
};

std::tuple<Tensors, Tensor, Tensor, Tensor> cell_forward_op(
    const Tensors& inputs, const Tensors& noise, const Tensor& conv_weights, const Tensor& gamma, const Tensor& beta,
    const Tensor& op_weights, std::optional<Tensor> edge_weights, std::optional<Tensor> moments, const Ints& encoded,
    double eps, bool bfloat16, bool concat) {
  CellArguments arguments{inputs, conv_weights, gamma, beta, op_weights, nullptr, &noise, &edge_weights,
                          moments ? &*moments : nullptr};
  Cell cell = check(arguments, encoded, !moments, eps, bfloat16);
  const Tensor& x = inputs[0];
  Device device(x);
  Tensors nodes;
  // nodes are where their concatenation has them
  int64_t c = cell.channels;
  auto empty = [&](int64_t channels) { return empty_state(x, cell.images, channels, cell.oh, cell.ow); };
  Tensor whole = concat ? empty(cell.nodes * c) : torch::stable::new_empty(x, {0});
  for (int i = 0; i < cell.nodes; i++)
    nodes.push_back(concat ? torch::stable::narrow(whole, 1, i * c, c) : empty(c));
  Tensor branch_outputs = torch::stable::new_empty(x, {cell.branch_outputs_size()});
  Tensor used_moments =
      moments ? torch::stable::clone(*moments)
              : torch::stable::new_empty(x, {2, cell.norms, cell.mixed_channels}, ScalarType::Double);
  Room room{x, {}};
  cell_forward(storage_of(x), cell, forward_data(arguments, branch_outputs, used_moments, nodes), device.stream(),
               std::ref(room));
  return {nodes, whole, branch_outputs, used_moments};
}

Tensor cell_branch_outputs_op(const Tensors& inputs, const Tensors& nodes, const Tensor& conv_weights,
                              const Tensor& gamma, const Tensor& beta, const Tensor& op_weights, const Tensor& moments,
                              const Ints& encoded, double eps, bool bfloat16) {
  CellArguments arguments{inputs, conv_weights, gamma, beta, op_weights, &nodes, nullptr, nullptr, &moments};
  Cell cell = check(arguments, encoded, false, eps, bfloat16);
  const Tensor& x = inputs[0];
  Device device(x);
  Tensor branch_outputs = torch::stable::new_empty(x, {cell.branch_outputs_size()});
  Room room{x, {}};
  cell_branch_outputs(storage_of(x), cell, forward_data(arguments, branch_outputs, moments, nodes), device.stream(),
                      std::ref(room));
  return branch_outputs;
}

std::tuple<Tensors, Tensor, Tensor, Tensor, Tensor> cell_backward_op(
    const Tensors& grads, const Ints& grad_nodes, const Tensors& inputs, const Tensors& nodes, const Tensors& noise,
    const Tensor& conv_weights, const Tensor& gamma, const Tensor& beta, const Tensor& op_weights,
    std::optional<Tensor> edge_weights, const Tensor& moments, Tensor branch_outputs, const Ints& encoded,
    bool training, double eps, bool bfloat16, const Ints& needs_input_grad) {
  CellArguments arguments{inputs, conv_weights, gamma, beta, op_weights, &nodes, &noise, &edge_weights, &moments};
  Cell cell = check(arguments, encoded, training, eps, bfloat16);
  const Tensor& x = inputs[0];
  arguments.check_backward(cell, grads, grad_nodes, branch_outputs, x.scalar_type(), needs_input_grad);
  Device device(x);
  Tensors grad_inputs;
  for (int64_t j : needs_input_grad)
    grad_inputs.push_back(empty_state(x, cell.images, cell.channels, inputs[j].size(2), inputs[j].size(3)));
  int64_t edges = cell.edges.size();
  Tensor grad_gamma = torch::stable::new_empty(gamma, {cell.norms, cell.mixed_channels});
  Tensor grad_beta = torch::stable::new_empty(gamma, {cell.norms, cell.mixed_channels});
  Tensor grad_op_weights = torch::stable::new_empty(op_weights, {edges, cell.primitives});
  Tensor grad_edge_weights = torch::stable::new_empty(op_weights, {edge_weights ? edges : 0});
  CellBackward data;
  data.forward = forward_data(arguments, branch_outputs, moments, nodes);
  data.grad_nodes.resize(cell.nodes);
  for (size_t i = 0; i < grads.size(); i++) data.grad_nodes[grad_nodes[i]] = states(grads[i]);
  data.grad_inputs.resize(cell.inputs, nullptr);
  for (size_t i = 0; i < grad_inputs.size(); i++) data.grad_inputs[needs_input_grad[i]] = grad_inputs[i].data_ptr();
  data.grad_gamma = grad_gamma.data_ptr();
  data.grad_beta = grad_beta.data_ptr();
  data.grad_op_weights = grad_op_weights.data_ptr();
  data.grad_edge_weights = edge_weights ? grad_edge_weights.data_ptr() : nullptr;
  Room room{x, {}};
  cell_backward(storage_of(x), cell, data, device.stream(), std::ref(room));
  return {grad_inputs, grad_gamma, grad_beta, grad_op_weights, grad_edge_weights};
}

void update_running_stats_op(Tensors running_means, Tensors running_vars, Tensors num_batches_tracked,
                             const Tensor& moments, double momentum, int64_t count) {
  auto running = check_running_stats(running_means, running_vars, num_batches_tracked, moments, count);
  if (running.empty()) return;
  Device device(moments);
  update_running_stats(storage_of(running_means[0]), running, static_cast<const double*>(moments.data_ptr()),
                       moments.size(2), running_update(momentum, count), device.stream());
}

// The arguments of one layer, checked.
ReLUConvBN layer(const ReLUConvBNArguments& a, const Tensor& conv_output, const Tensor& moments, double eps,
                 bool training) {
  const Tensor& gamma = a.gammas[0];
  if (a.reduce && gamma.numel() % 2) refuse("gammas[0]", "an even number of outputs", std::to_string(gamma.numel()));
  return {a.x.size(0), a.x.size(2), a.x.size(3), a.x.size(1), gamma.numel(), a.reduce, training, eps, states(a.x),
          a.conv_weights[0].data_ptr(), gamma.data_ptr(), a.betas[0].data_ptr(), conv_output.data_ptr(),
          static_cast<double*>(moments.data_ptr())};
}
void check(const ReLUConvBNArguments& arguments, bool moments_given) {
  arguments.check(moments_given, kDTypes);
  if (arguments.gammas.size() != 1)
    refuse("gammas", "one layer at a time on CUDA", std::to_string(arguments.gammas.size()));
}

std::tuple<Tensors, Tensors, Tensors> relu_conv_bn_forward_op(const Tensor& x, const Tensors& conv_weights,
                                                              const Tensors& gammas, const Tensors& betas,
                                                              const Tensors& moments, double eps, bool reduce) {
  bool training = moments.empty();
  ReLUConvBNArguments arguments{x, conv_weights, gammas, betas, moments, reduce};
  check(arguments, !training);
  Device device(x);
  int64_t channels = gammas[0].numel();
  Tensor output = empty_state(x, x.size(0), channels, arguments.oh(), arguments.ow());
  Tensor conv_output = empty_state(x, x.size(0), channels, arguments.oh(), arguments.ow());
  Tensor used_moments = training ? torch::stable::new_empty(x, {2, channels}, ScalarType::Double)
                                 : torch::stable::clone(moments[0]);
  Room room{x, {}};
  relu_conv_bn_forward(storage_of(x), layer(arguments, conv_output, used_moments, eps, training), output.data_ptr(),
                       device.stream(), std::ref(room));
  return {Tensors{output}, Tensors{conv_output}, Tensors{used_moments}};
}

std::tuple<Tensor, Tensors, Tensors> relu_conv_bn_backward_op(const Tensors& grads, const Tensor& x,
                                                              const Tensors& conv_outputs, const Tensors& conv_weights,
                                                              const Tensors& gammas, const Tensors& betas,
                                                              const Tensors& moments, double eps, bool training,
                                                              bool reduce, bool needs_input_grad) {
  ReLUConvBNArguments arguments{x, conv_weights, gammas, betas, moments, reduce};
  check(arguments, true);
  arguments.check_outputs("grads", grads);
  arguments.check_outputs("conv_outputs", conv_outputs);
  Device device(x);
  Tensor grad_x = needs_input_grad ? empty_state(x, x.size(0), x.size(1), x.size(2), x.size(3))
                                   : empty_state(x, 0, 1, 1, 1);
  Tensor grad_gamma = torch::stable::new_empty(gammas[0], {gammas[0].numel()});
  Tensor grad_beta = torch::stable::new_empty(gammas[0], {gammas[0].numel()});
  Room room{x, {}};
  relu_conv_bn_backward(storage_of(x), layer(arguments, conv_outputs[0], moments[0], eps, training),
                        grads[0].data_ptr(), needs_input_grad ? grad_x.data_ptr() : nullptr, grad_gamma.data_ptr(),
                        grad_beta.data_ptr(), device.stream(), std::ref(room));
  return {grad_x, Tensors{grad_gamma}, Tensors{grad_beta}};
}

#ifdef RFDARTS_EMULATION
void shuffle_op(bool on) { emulation::shuffle(on); }
void record_op(bool on) { emulation::record(on); }
std::string recorded_op() { return emulation::recorded(); }
#else
// "" or why no device can be used
std::string cuda_missing_op() {
  if (!aoti_torch_get_current_cuda_stream) return "this torch was built without CUDA";
  int count = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  return error != cudaSuccess ? cudaGetErrorString(error) : count ? "" : "there is no CUDA device";
}
std::string cuda_archs_op() { return RFDARTS_CUDA_ARCHS; }
#endif
}  // namespace
}  // namespace rfdarts::cuda

#ifdef RFDARTS_EMULATION
STABLE_TORCH_LIBRARY(rfdarts_emulated, m) {
  define_shared_ops(m);
  m.def("shuffle(bool on) -> ()");
  m.def("record(bool on) -> ()");
  m.def("recorded() -> str");
}
STABLE_TORCH_LIBRARY_IMPL(rfdarts_emulated, CPU, m) {
#else
STABLE_TORCH_LIBRARY_FRAGMENT(rfdarts, m) {
  m.def("cuda_missing() -> str");
  m.def("cuda_archs() -> str");
}
STABLE_TORCH_LIBRARY_IMPL(rfdarts, CUDA, m) {
#endif
  m.impl("cell_forward", TORCH_BOX(&rfdarts::cuda::cell_forward_op));
  m.impl("cell_branch_outputs", TORCH_BOX(&rfdarts::cuda::cell_branch_outputs_op));
  m.impl("cell_backward", TORCH_BOX(&rfdarts::cuda::cell_backward_op));
  m.impl("relu_conv_bn_forward", TORCH_BOX(&rfdarts::cuda::relu_conv_bn_forward_op));
  m.impl("relu_conv_bn_backward", TORCH_BOX(&rfdarts::cuda::relu_conv_bn_backward_op));
  m.impl("update_running_stats", TORCH_BOX(&rfdarts::cuda::update_running_stats_op));
}
#ifdef RFDARTS_EMULATION
STABLE_TORCH_LIBRARY_IMPL(rfdarts_emulated, CompositeExplicitAutograd, m) {
  m.impl("shuffle", TORCH_BOX(&rfdarts::cuda::shuffle_op));
  m.impl("record", TORCH_BOX(&rfdarts::cuda::record_op));
  m.impl("recorded", TORCH_BOX(&rfdarts::cuda::recorded_op));
}
#else
STABLE_TORCH_LIBRARY_IMPL(rfdarts, CompositeExplicitAutograd, m) {
  m.impl("cuda_missing", TORCH_BOX(&rfdarts::cuda::cuda_missing_op));
  m.impl("cuda_archs", TORCH_BOX(&rfdarts::cuda::cuda_archs_op));
}
#endif
#ifndef RFDARTS_EMULATION
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__cuda(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
#endif
