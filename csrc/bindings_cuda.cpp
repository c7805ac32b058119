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
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "rfdarts/cuda_cell.h"
#include "rfdarts/cuda_conv_bn.h"
#include "rfdarts/schemas.h"

#ifdef RFDARTS_EMULATION
#include "emulation/cuda.h"
#else
// absent from a torch without CUDA
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
#endif

namespace rfdarts::cuda {
namespace {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Ints = std::vector<int64_t>;

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

Storage storage_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Storage::Float;
    case ScalarType::Double: return Storage::Double;
    case ScalarType::BFloat16: return Storage::BFloat16;
    case ScalarType::Half: return Storage::Half;
    default: STD_TORCH_CHECK(false, "inputs: expected float32, float64, bfloat16 or float16");
  }
}
States states(const Tensor& x, const Tensor& like) {
  STD_TORCH_CHECK(x.dim() == 4 && (x.stride(1) == 1 || x.size(1) == 1) && x.scalar_type() == like.scalar_type(),
                  "states: expected [N, C, H, W] of one dtype in channels_last order");
  return {x.data_ptr(), x.stride(0), x.stride(2), x.stride(3)};
}
const void* pointer(const Tensor& x) {
  STD_TORCH_CHECK(x.is_contiguous(), "expected a contiguous tensor");
  return x.data_ptr();
}
// [N, C, H, W], channels last
Tensor new_state(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w) {
  Tensor x = torch::stable::new_empty(like, {n, h, w, c});
  return torch::stable::transpose(torch::stable::transpose(x, 1, 3), 2, 3);
}

struct CellArguments {
  const Tensors &inputs, &noise;
  const Tensor &weights, &gamma, &beta, &mix;
  const std::optional<Tensor>& edge_weights;
  const Ints& spec;
  double eps;
  bool bfloat16;

  Cell cell() const {
    const Tensor& x = inputs.at(0);
    STD_TORCH_CHECK(!bfloat16, "bfloat16: on CUDA, branch outputs have the dtype of the inputs");
    Ints sizes;
    for (const Tensor& t : inputs) {
      STD_TORCH_CHECK(t.size(0) == x.size(0) && t.size(1) == x.size(1),
                      "inputs: expected one batch size and number of channels");
      sizes.push_back(t.size(2)), sizes.push_back(t.size(3));
    }
    Cell c(spec, x.size(0), x.size(1), eps, sizes);
    STD_TORCH_CHECK(int64_t(inputs.size()) == c.inputs, "inputs: expected as many as the cell has");
    STD_TORCH_CHECK(gamma.numel() == c.norms * c.mixed && beta.numel() == gamma.numel(),
                    "gamma, beta: expected [norms, C / K]");
    STD_TORCH_CHECK(mix.numel() == int64_t(c.edges.size()) * c.primitives, "mix: expected [edges, primitives]");
    for (const Tensor* t : {&weights, &gamma, &beta, &mix})
      STD_TORCH_CHECK(t->scalar_type() == parameters(), "parameters: expected float64 beside float64, else float32");
    return c;
  }
  ScalarType parameters() const {
    return inputs[0].scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  }
  CellForward forward(const Tensor& kept, const Tensor& moments, const Tensors& nodes) const {
    CellForward f;
    for (const Tensor& x : inputs) f.inputs.push_back(states(x, inputs[0]));
    for (const Tensor& z : noise) f.noise.push_back(states(z, inputs[0]).data);
    f.weights = pointer(weights);
    f.gamma = pointer(gamma);
    f.beta = pointer(beta);
    f.mix = pointer(mix);
    f.edge_weights = edge_weights ? pointer(*edge_weights) : nullptr;
    f.kept = kept.data_ptr();
    f.moments = static_cast<double*>(moments.data_ptr());
    for (const Tensor& t : nodes) f.nodes.push_back(states(t, inputs[0]));
    return f;
  }
};

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
    const Tensors& inputs, const Tensors& noise, const Tensor& weights, const Tensor& gamma, const Tensor& beta,
    const Tensor& mix, std::optional<Tensor> edge_weights, std::optional<Tensor> moments, const Ints& spec, double eps,
    bool bfloat16, bool together) {
  CellArguments arguments{inputs, noise, weights, gamma, beta, mix, edge_weights, spec, eps, bfloat16};
  Cell cell = arguments.cell();
  STD_TORCH_CHECK(cell.training == !moments.has_value(), "moments: expected in evaluation mode, and only there");
  const Tensor& x = inputs[0];
  Device device(x);
  Tensors nodes;
  // together, nodes are where their concatenation has them
  int64_t c = cell.channels;
  auto empty = [&](int64_t channels) { return new_state(x, cell.images, channels, cell.oh, cell.ow); };
  Tensor all = together ? empty(cell.nodes * c) : torch::stable::new_empty(x, {0});
  for (int i = 0; i < cell.nodes; i++)
    nodes.push_back(together ? torch::stable::narrow(all, 1, i * c, c) : empty(c));
  Tensor kept = torch::stable::new_empty(x, {cell.kept_size()});
  Tensor used = moments ? torch::stable::clone(*moments)
                        : torch::stable::new_empty(x, {2, cell.norms, cell.mixed}, ScalarType::Double);
  Room room{x, {}};
  cell_forward(storage_of(x), cell, arguments.forward(kept, used, nodes), true, device.stream(), std::ref(room));
  return {nodes, all, kept, used};
}

Tensor cell_kept_op(const Tensors& inputs, const Tensors& nodes, const Tensor& weights, const Tensor& gamma,
                    const Tensor& beta, const Tensor& mix, const Tensor& moments, const Ints& spec, double eps,
                    bool bfloat16) {
  std::optional<Tensor> none;
  CellArguments arguments{inputs, {}, weights, gamma, beta, mix, none, spec, eps, bfloat16};
  Cell cell = arguments.cell();
  const Tensor& x = inputs[0];
  Device device(x);
  Tensor kept = torch::stable::new_empty(x, {cell.kept_size()});
  Room room{x, {}};
  cell_forward(storage_of(x), cell, arguments.forward(kept, moments, nodes), false, device.stream(), std::ref(room));
  return kept;
}

std::tuple<Tensors, Tensor, Tensor, Tensor, Tensor> cell_backward_op(
    const Tensors& grads, const Ints& grad_nodes, const Tensors& inputs, const Tensors& nodes, const Tensors& noise,
    const Tensor& weights, const Tensor& gamma, const Tensor& beta, const Tensor& mix,
    std::optional<Tensor> edge_weights, const Tensor& moments, Tensor kept, const Ints& spec, double eps,
    bool bfloat16, const Ints& wanted) {
  CellArguments arguments{inputs, noise, weights, gamma, beta, mix, edge_weights, spec, eps, bfloat16};
  Cell cell = arguments.cell();
  const Tensor& x = inputs[0];
  Device device(x);
  STD_TORCH_CHECK(grads.size() == grad_nodes.size(), "grads: expected one for each of grad_nodes");
  STD_TORCH_CHECK(kept.numel() == cell.kept_size(), "kept: not what the forward of this cell returned");
  Tensors grad_inputs;
  for (int64_t j : wanted)
    grad_inputs.push_back(new_state(x, cell.images, cell.channels, inputs.at(j).size(2), inputs.at(j).size(3)));
  Tensor grad_gamma = torch::stable::new_empty(gamma, {cell.norms, cell.mixed});
  Tensor grad_beta = torch::stable::new_empty(gamma, {cell.norms, cell.mixed});
  int64_t edges = cell.edges.size();
  Tensor grad_mix = torch::stable::new_empty(mix, {edges, cell.primitives});
  Tensor grad_edges = torch::stable::new_empty(mix, {edge_weights ? edges : 0});
  CellBackward data;
  data.forward = arguments.forward(kept, moments, nodes);
  data.grad_nodes.resize(cell.nodes);
  for (size_t i = 0; i < grads.size(); i++) data.grad_nodes.at(grad_nodes[i]) = states(grads[i], x);
  data.grad_inputs.resize(cell.inputs, nullptr);
  for (size_t i = 0; i < wanted.size(); i++) data.grad_inputs.at(wanted[i]) = grad_inputs[i].data_ptr();
  data.grad_gamma = grad_gamma.data_ptr();
  data.grad_beta = grad_beta.data_ptr();
  data.grad_mix = grad_mix.data_ptr();
  data.grad_edge_weights = edge_weights ? grad_edges.data_ptr() : nullptr;
  Room room{x, {}};
  cell_backward(storage_of(x), cell, data, device.stream(), std::ref(room));
  return {grad_inputs, grad_gamma, grad_beta, grad_mix, grad_edges};
}

void update_running_op(Tensors means, Tensors variances, Tensors counts, const Tensor& moments, double momentum,
                       int64_t count) {
  STD_TORCH_CHECK(moments.is_contiguous() && moments.size(1) == int64_t(means.size()),
                  "moments: expected [2, norms, C], as many as there are means");
  Device device(moments);
  std::vector<Running> running;
  for (size_t i = 0; i < means.size(); i++) {
    STD_TORCH_CHECK(means[i].scalar_type() == means[0].scalar_type() && means[i].numel() == moments.size(2),
                    "running statistics: expected one dtype, and C values each");
    auto batches = static_cast<int64_t*>(counts.at(i).data_ptr());
    running.push_back({means[i].data_ptr(), variances.at(i).data_ptr(), batches});
  }
  if (means.empty()) return;
  STD_TORCH_CHECK(means[0].scalar_type() == ScalarType::Double || means[0].scalar_type() == ScalarType::Float,
                  "running statistics: expected float32 or float64");
  auto data = static_cast<const double*>(moments.data_ptr());
  update_running(storage_of(means[0]), running, data, moments.size(2), momentum, count, device.stream());
}

ConvNorm conv_norm(const Tensor& x, const Tensor& weights, const Tensor& gamma, const Tensor& beta, const Tensor& y,
                   const Tensor& moments, double eps, bool training, bool reduce) {
  ScalarType parameters = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  for (const Tensor* t : {&weights, &gamma, &beta})
    STD_TORCH_CHECK(t->scalar_type() == parameters, "parameters: expected float64 beside float64, else float32");
  int64_t ci = x.size(1), co = gamma.numel();
  STD_TORCH_CHECK(weights.numel() == 2 * (reduce ? 2 : 1) * ci * co, "weights: expected the matrix and its transpose");
  STD_TORCH_CHECK(beta.numel() == co && moments.numel() == 2 * co, "gamma, beta, moments: expected [C], [C], [2, C]");
  STD_TORCH_CHECK(!reduce || (co % 2 == 0 && x.size(2) % 2 == 0 && x.size(3) % 2 == 0),
                  "x, gamma: a reduction needs an even height, width and number of outputs");
  return {x.size(0), x.size(2), x.size(3), ci, co, reduce, training, eps, states(x, x), pointer(weights),
          pointer(gamma), pointer(beta), y.data_ptr(), static_cast<double*>(moments.data_ptr())};
}

const Tensor& only(const Tensors& list) {
  STD_TORCH_CHECK(list.size() == 1, "weights: the CUDA kernels take one layer at a time");
  return list[0];
}

std::tuple<Tensors, Tensors, Tensors> conv_bn_forward_op(const Tensor& x, const Tensors& weights, const Tensors& gammas,
                                                         const Tensors& betas, const Tensors& moments, double eps,
                                                         bool reduce) {
  Device device(x);
  const Tensor& gamma = only(gammas);
  int64_t co = gamma.numel(), half = reduce ? 2 : 1;
  Tensor out = new_state(x, x.size(0), co, x.size(2) / half, x.size(3) / half);
  Tensor y = new_state(x, x.size(0), co, x.size(2) / half, x.size(3) / half);
  Tensor used =
      moments.empty() ? torch::stable::new_empty(x, {2, co}, ScalarType::Double) : torch::stable::clone(only(moments));
  ConvNorm a = conv_norm(x, only(weights), gamma, only(betas), y, used, eps, moments.empty(), reduce);
  Room room{x, {}};
  conv_norm_forward(storage_of(x), a, out.data_ptr(), device.stream(), std::ref(room));
  return {Tensors{out}, Tensors{y}, Tensors{used}};
}

std::tuple<Tensor, Tensors, Tensors> conv_bn_backward_op(const Tensors& grads, const Tensor& x, const Tensors& ys,
                                                         const Tensors& weights, const Tensors& gammas,
                                                         const Tensors& betas, const Tensors& moments, double eps,
                                                         bool training, bool reduce, bool wanted) {
  Device device(x);
  const Tensor &grad = only(grads), &y = only(ys), &gamma = only(gammas);
  int64_t co = gamma.numel();
  for (const Tensor* t : {&grad, &y})
    STD_TORCH_CHECK(t->scalar_type() == x.scalar_type() && t->stride(1) == 1 && t->stride(3) == co &&
                        t->stride(2) == co * t->size(3) && t->stride(0) == t->stride(2) * t->size(2),
                    "grad, y: expected the dtype of x in channels_last order");
  Tensor dx = wanted ? new_state(x, x.size(0), x.size(1), x.size(2), x.size(3)) : new_state(x, 0, 1, 1, 1);
  Tensor grad_gamma = torch::stable::new_empty(gamma, {co}), grad_beta = torch::stable::new_empty(gamma, {co});
  ConvNorm a = conv_norm(x, only(weights), gamma, only(betas), y, only(moments), eps, training, reduce);
  Room room{x, {}};
  conv_norm_backward(storage_of(x), a, grad.data_ptr(), wanted ? dx.data_ptr() : nullptr, grad_gamma.data_ptr(),
                     grad_beta.data_ptr(), device.stream(), std::ref(room));
  return {dx, Tensors{grad_gamma}, Tensors{grad_beta}};
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
  m.impl("cell_kept", TORCH_BOX(&rfdarts::cuda::cell_kept_op));
  m.impl("cell_backward", TORCH_BOX(&rfdarts::cuda::cell_backward_op));
  m.impl("conv_bn_forward", TORCH_BOX(&rfdarts::cuda::conv_bn_forward_op));
  m.impl("conv_bn_backward", TORCH_BOX(&rfdarts::cuda::conv_bn_backward_op));
  m.impl("update_running", TORCH_BOX(&rfdarts::cuda::update_running_op));
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
