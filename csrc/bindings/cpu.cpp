// The ops for CPU tensors: from torch tensors to raw pointers. Torch's stable ABI only.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/schemas.h"
#include "core/arguments.h"
#include "core/memory.h"
#include "cpu/cell.h"
#include "cpu/relu_conv_bn.h"

namespace rfdarts {
namespace {
constexpr DTypes kDTypes = {ScalarType::Float, ScalarType::Double};

// a tensor on pooled memory
Tensor empty(const Ints& sizes, const Ints& strides, ScalarType dtype, Lifetime lifetime = Lifetime::State) {
  int64_t count = dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
  for (int64_t size : sizes) count *= size;
  void* data = pool_take(count, lifetime);
  return torch::stable::from_blob(data, sizes, strides, torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                  dtype, [](void* p) { pool_give(p); });
}
// [N, C, H, W], channels last
Tensor empty_state(int64_t n, int64_t c, int64_t h, int64_t w, ScalarType dtype) {
  return empty({n, c, h, w}, {h * w * c, 1, w * c, c}, dtype);
}
Tensor empty_vector(int64_t n, ScalarType dtype) { return empty({n}, {1}, dtype); }
Tensor empty_matrix(int64_t rows, int64_t columns, ScalarType dtype) {
  return empty({rows, columns}, {columns, 1}, dtype);
}

template <class T>
T* pointer(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}
template <class T>
BatchView<T> view(const Tensor& x) {
  return {pointer<T>(x), x.stride(0), x.stride(2), x.stride(3)};
}

void parallel(int64_t count, const std::function<void(ImageQueue&)>& f) {
  int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  std::atomic<int64_t> taken{0};
  auto run = [&](int64_t, int64_t) {
    ImageQueue images(taken, count, std::max<int64_t>(threads, 1));
    f(images);
  };
  if (threads < 2) return run(0, 1);
  torch::stable::parallel_for(0, threads, 1, run);
}

// memory for one call
struct Blocks {
  std::vector<void*> blocks;
  Allocate allocate = [this](int64_t bytes) { return blocks.emplace_back(pool_take(bytes)); };
  ~Blocks() {
    for (void* block : blocks) pool_give(block);
  }
};

// f(T, S): the types of arithmetic and of branch outputs
template <class F>
void with_types(const Tensor& x, bool bfloat16, F&& f) {
  if (x.scalar_type() == ScalarType::Double)
    f(double(), double());
  else if (bfloat16)
    f(float(), bf16());
  else
    f(float(), float());
}
ScalarType branch_dtype(const Tensor& x, bool bfloat16) {
  return bfloat16 && x.scalar_type() == ScalarType::Float ? ScalarType::BFloat16 : x.scalar_type();
}
Tensor empty_branch_outputs(const Cell& cell, ScalarType dtype) {
  return empty({cell.branch_outputs_size()}, {1}, dtype, Lifetime::BranchOutputs);
}

template <class T, class S>
CellForward<T, S> forward_data(const CellArguments& a, const Tensor& branch_outputs, const Tensor& moments) {
  CellForward<T, S> data{};
  for (const Tensor& x : a.inputs) data.inputs.push_back(view<T>(x));
  if (a.noise)
    for (const Tensor& z : *a.noise) data.noise.push_back(pointer<T>(z));
  if (a.nodes)
    for (const Tensor& node : *a.nodes) data.node_states.push_back(view<T>(node));
  data.conv_weights = pointer<T>(a.conv_weights);
  data.gamma = pointer<T>(a.gamma);
  data.beta = pointer<T>(a.beta);
  data.op_weights = pointer<T>(a.op_weights);
  data.edge_weights = a.edge_weights && *a.edge_weights ? pointer<T>(**a.edge_weights) : nullptr;
  data.branch_outputs = pointer<S>(branch_outputs);
  data.moments = pointer<double>(moments);
  return data;
}

std::tuple<Tensors, Tensor, Tensor, Tensor> cell_forward_op(
    const Tensors& inputs, const Tensors& noise, const Tensor& conv_weights, const Tensor& gamma, const Tensor& beta,
    const Tensor& op_weights, std::optional<Tensor> edge_weights, std::optional<Tensor> moments, const Ints& encoded,
    double eps, bool bfloat16, bool concat) {
  CellArguments arguments{inputs, conv_weights, gamma, beta, op_weights, nullptr, &noise, &edge_weights,
                          moments ? &*moments : nullptr};
  Cell cell = arguments.check(encoded, !moments, eps, kDTypes);
  ScalarType dtype = inputs[0].scalar_type();
  Tensors nodes;
  for (int i = 0; i < cell.nodes; i++)
    nodes.push_back(empty_state(cell.images, cell.channels, cell.oh, cell.ow, dtype));
  Tensor whole = concat ? empty_state(cell.images, cell.nodes * cell.channels, cell.oh, cell.ow, dtype)
                               : empty_vector(0, dtype);
  Tensor branch_outputs = empty_branch_outputs(cell, branch_dtype(inputs[0], bfloat16));
  int64_t c = cell.mixed_channels;
  Tensor used_moments = empty({2, cell.norms, c}, {cell.norms * c, c, 1}, ScalarType::Double);
  if (moments) std::copy_n(pointer<double>(*moments), used_moments.numel(), pointer<double>(used_moments));
  with_types(inputs[0], bfloat16, [&](auto t, auto s) {
    using T = decltype(t);
    auto data = forward_data<T, decltype(s)>(arguments, branch_outputs, used_moments);
    for (const Tensor& node : nodes) data.nodes.push_back(pointer<T>(node));
    if (concat) data.concat = pointer<T>(whole);
    Blocks blocks;
    cell_forward(cell, data, parallel, blocks.allocate);
  });
  return {nodes, whole, branch_outputs, used_moments};
}

Tensor cell_branch_outputs_op(const Tensors& inputs, const Tensors& nodes, const Tensor& conv_weights,
                              const Tensor& gamma, const Tensor& beta, const Tensor& op_weights, const Tensor& moments,
                              const Ints& encoded, double eps, bool bfloat16) {
  CellArguments arguments{inputs, conv_weights, gamma, beta, op_weights, &nodes, nullptr, nullptr, &moments};
  Cell cell = arguments.check(encoded, false, eps, kDTypes);
  Tensor branch_outputs = empty_branch_outputs(cell, branch_dtype(inputs[0], bfloat16));
  with_types(inputs[0], bfloat16, [&](auto t, auto s) {
    auto data = forward_data<decltype(t), decltype(s)>(arguments, branch_outputs, moments);
    Blocks blocks;
    cell_branch_outputs(cell, data, parallel, blocks.allocate);
  });
  return branch_outputs;
}

std::tuple<Tensors, Tensor, Tensor, Tensor, Tensor> cell_backward_op(
    const Tensors& grads, const Ints& grad_nodes, const Tensors& inputs, const Tensors& nodes, const Tensors& noise,
    const Tensor& conv_weights, const Tensor& gamma, const Tensor& beta, const Tensor& op_weights,
    std::optional<Tensor> edge_weights, const Tensor& moments, Tensor branch_outputs, const Ints& encoded,
    bool training, double eps, bool bfloat16, const Ints& needs_input_grad) {
  CellArguments arguments{inputs, conv_weights, gamma, beta, op_weights, &nodes, &noise, &edge_weights, &moments};
  Cell cell = arguments.check(encoded, training, eps, kDTypes);
  arguments.check_backward(cell, grads, grad_nodes, branch_outputs, branch_dtype(inputs[0], bfloat16),
                           needs_input_grad);
  ScalarType dtype = inputs[0].scalar_type();
  Tensors grad_inputs;
  for (int64_t j : needs_input_grad)
    grad_inputs.push_back(empty_state(cell.images, cell.channels, inputs[j].size(2), inputs[j].size(3), dtype));
  Tensor grad_gamma = empty_matrix(cell.norms, cell.mixed_channels, dtype);
  Tensor grad_beta = empty_matrix(cell.norms, cell.mixed_channels, dtype);
  int64_t edges = cell.edges.size();
  Tensor grad_op_weights = empty_matrix(edges, cell.primitives, dtype);
  Tensor grad_edge_weights = empty_vector(edge_weights ? edges : 0, dtype);
  with_types(inputs[0], bfloat16, [&](auto t, auto s) {
    using T = decltype(t);
    CellBackward<T, decltype(s)> data;
    data.forward = forward_data<T, decltype(s)>(arguments, branch_outputs, moments);
    data.grad_nodes.resize(cell.nodes);
    for (size_t i = 0; i < grads.size(); i++) data.grad_nodes[grad_nodes[i]] = view<T>(grads[i]);
    data.grad_inputs.resize(cell.inputs, nullptr);
    for (size_t i = 0; i < grad_inputs.size(); i++)
      data.grad_inputs[needs_input_grad[i]] = pointer<T>(grad_inputs[i]);
    data.grad_gamma = pointer<T>(grad_gamma);
    data.grad_beta = pointer<T>(grad_beta);
    data.grad_op_weights = pointer<T>(grad_op_weights);
    data.grad_edge_weights = edge_weights ? pointer<T>(grad_edge_weights) : nullptr;
    Blocks blocks;
    cell_backward(cell, data, parallel, blocks.allocate);
  });
  return {grad_inputs, grad_gamma, grad_beta, grad_op_weights, grad_edge_weights};
}

template <class A>
void update(const std::vector<RunningStats>& running, const Tensor& moments, const RunningUpdate& update) {
  int64_t channels = moments.size(2), norms = running.size();
  const double *mean = pointer<double>(moments), *variance = mean + norms * channels;
  for (const RunningStats& r : running) {
    for (int64_t c = 0; c < channels; c++)
      update(static_cast<A*>(r.mean)[c], static_cast<A*>(r.variance)[c], *mean++, *variance++);
    ++*r.num_batches;
  }
}
void update_running_stats_op(Tensors running_means, Tensors running_vars, Tensors num_batches_tracked,
                             const Tensor& moments, double momentum, int64_t count) {
  auto running = check_running_stats(running_means, running_vars, num_batches_tracked, moments, count);
  bool wide = !running.empty() && running_means[0].scalar_type() == ScalarType::Double;
  (wide ? update<double> : update<float>)(running, moments, running_update(momentum, count));
}

template <class T>
ReLUConvBN<T> layers(const ReLUConvBNArguments& a, const Tensors& conv_outputs, const Tensors& moments, double eps,
                     bool training) {
  ReLUConvBN<T> data{a.x.size(0), a.x.size(2), a.x.size(3), a.x.size(1), a.reduce, training, eps, view<T>(a.x), {}};
  for (size_t i = 0; i < a.gammas.size(); i++)
    data.layers.push_back({a.gammas[i].numel(), pointer<T>(a.conv_weights[i]), pointer<T>(a.gammas[i]),
                           pointer<T>(a.betas[i]), pointer<T>(conv_outputs[i]), nullptr, pointer<double>(moments[i])});
  return data;
}

std::tuple<Tensors, Tensors, Tensors> relu_conv_bn_forward_op(const Tensor& x, const Tensors& conv_weights,
                                                              const Tensors& gammas, const Tensors& betas,
                                                              const Tensors& moments, double eps, bool reduce) {
  bool training = moments.empty();
  ReLUConvBNArguments arguments{x, conv_weights, gammas, betas, moments, reduce};
  arguments.check(!training, kDTypes);
  Tensors outputs, conv_outputs, used_moments;
  for (size_t i = 0; i < gammas.size(); i++) {
    int64_t channels = gammas[i].numel();
    for (Tensors* list : {&outputs, &conv_outputs})
      list->push_back(empty_state(x.size(0), channels, arguments.oh(), arguments.ow(), x.scalar_type()));
    used_moments.push_back(empty_matrix(2, channels, ScalarType::Double));
    if (!training) std::copy_n(pointer<double>(moments[i]), 2 * channels, pointer<double>(used_moments[i]));
  }
  with_types(x, false, [&](auto t, auto) {
    using T = decltype(t);
    auto data = layers<T>(arguments, conv_outputs, used_moments, eps, training);
    for (size_t i = 0; i < outputs.size(); i++) data.layers[i].output = pointer<T>(outputs[i]);
    relu_conv_bn_forward(data, parallel);
  });
  return {outputs, conv_outputs, used_moments};
}

std::tuple<Tensor, Tensors, Tensors> relu_conv_bn_backward_op(const Tensors& grads, const Tensor& x,
                                                              const Tensors& conv_outputs, const Tensors& conv_weights,
                                                              const Tensors& gammas, const Tensors& betas,
                                                              const Tensors& moments, double eps, bool training,
                                                              bool reduce, bool needs_input_grad) {
  ReLUConvBNArguments arguments{x, conv_weights, gammas, betas, moments, reduce};
  arguments.check(true, kDTypes);
  arguments.check_outputs("grads", grads);
  arguments.check_outputs("conv_outputs", conv_outputs);
  ScalarType dtype = x.scalar_type();
  Tensor grad_x = needs_input_grad ? empty_state(x.size(0), x.size(1), x.size(2), x.size(3), dtype)
                                   : empty_state(0, 1, 1, 1, dtype);
  Tensors grad_gammas, grad_betas;
  for (const Tensor& gamma : gammas)
    for (Tensors* list : {&grad_gammas, &grad_betas}) list->push_back(empty_vector(gamma.numel(), dtype));
  with_types(x, false, [&](auto t, auto) {
    using T = decltype(t);
    auto data = layers<T>(arguments, conv_outputs, moments, eps, training);
    std::vector<ReLUConvBNGradients<T>> gradients;
    for (size_t i = 0; i < grads.size(); i++)
      gradients.push_back({pointer<T>(grads[i]), pointer<T>(grad_gammas[i]), pointer<T>(grad_betas[i])});
    relu_conv_bn_backward(data, gradients, needs_input_grad ? pointer<T>(grad_x) : nullptr, parallel);
  });
  return {grad_x, grad_gammas, grad_betas};
}

std::string cell_text_op(const Ints& encoded) { return CellDescription(encoded).text(); }
std::string isa_op() { return isa_name(); }
std::string isa_best_op() { return isa_best(); }
void pool_release_op() { pool_release(); }
int64_t pool_cached_op() { return pool_cached(); }
void pool_poison_op(bool on) { pool_poison(on); }
}  // namespace
}  // namespace rfdarts

STABLE_TORCH_LIBRARY(rfdarts, m) {
  define_shared_ops(m);
  m.def("cell_text(int[] cell) -> str");
  m.def("isa() -> str");
  m.def("isa_best() -> str");
  m.def("pool_release() -> ()");
  m.def("pool_cached() -> int");
  m.def("pool_poison(bool on) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(rfdarts, CPU, m) {
  m.impl("cell_forward", TORCH_BOX(&rfdarts::cell_forward_op));
  m.impl("cell_branch_outputs", TORCH_BOX(&rfdarts::cell_branch_outputs_op));
  m.impl("cell_backward", TORCH_BOX(&rfdarts::cell_backward_op));
  m.impl("relu_conv_bn_forward", TORCH_BOX(&rfdarts::relu_conv_bn_forward_op));
  m.impl("relu_conv_bn_backward", TORCH_BOX(&rfdarts::relu_conv_bn_backward_op));
  m.impl("update_running_stats", TORCH_BOX(&rfdarts::update_running_stats_op));
}
STABLE_TORCH_LIBRARY_IMPL(rfdarts, CompositeExplicitAutograd, m) {
  m.impl("cell_text", TORCH_BOX(&rfdarts::cell_text_op));
  m.impl("isa", TORCH_BOX(&rfdarts::isa_op));
  m.impl("isa_best", TORCH_BOX(&rfdarts::isa_best_op));
  m.impl("pool_release", TORCH_BOX(&rfdarts::pool_release_op));
  m.impl("pool_cached", TORCH_BOX(&rfdarts::pool_cached_op));
  m.impl("pool_poison", TORCH_BOX(&rfdarts::pool_poison_op));
}

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
