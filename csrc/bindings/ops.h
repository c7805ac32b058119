// The ops of every device: arguments are checked, memory is taken, and pointers go to the device's kernels. Torch's
// stable ABI only.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/schemas.h"
#include "core/arguments.h"
#include "core/data.h"

namespace rfdarts {

// Device, made for one call beside a tensor x: its limits (dtypes, largest_stride, concat_views, branch_dtype, check),
// its memory (empty, empty_state, empty_branch_outputs), and what it runs (the rest).
template <class Device>
struct Ops {
  static std::tuple<Tensors, Tensor, Tensor, Tensor> cell_forward(
      const Tensors& inputs, const Tensors& noise, const Tensor& conv_weights, const Tensor& gamma, const Tensor& beta,
      const Tensor& op_weights, std::optional<Tensor> edge_weights, std::optional<Tensor> moments, const Ints& encoded,
      double eps, bool bfloat16, bool bfloat16_products, bool concat, int64_t all_images) {
    CellArguments arguments{inputs, conv_weights, gamma, beta, op_weights, nullptr, &noise, &edge_weights,
                            moments ? &*moments : nullptr};
    Cell cell = arguments.check(encoded, !moments, eps, Device::dtypes);
    const Tensor& x = inputs[0];
    Device::check_products(x, bfloat16_products, {cell.mixed_channels});
    Processes processes = processes_of(x, all_images, cell.training);
    ScalarType branch_dtype = Device::branch_dtype(x, bfloat16);
    Device device(x);
    int64_t n = cell.images, c = cell.channels;
    Tensor whole = concat ? device.empty_state(n, cell.nodes * c, cell.oh, cell.ow)
                                 : device.empty({0}, x.scalar_type());
    Tensors nodes;
    for (int i = 0; i < cell.nodes; i++)
      nodes.push_back(concat && Device::concat_views ? torch::stable::narrow(whole, 1, i * c, c)
                                                     : device.empty_state(n, c, cell.oh, cell.ow));
    Tensor branch_outputs = device.empty_branch_outputs(cell.branch_outputs_size(), branch_dtype);
    Tensor used_moments = moments ? torch::stable::clone(*moments)
                                  : device.empty({2, cell.norms, cell.mixed_channels}, ScalarType::Double);
    CellForward data = cell_data(arguments, branch_outputs, used_moments, nodes, bfloat16_products);
    data.processes = std::move(processes);
    if (concat && !Device::concat_views) data.concat = whole.data_ptr();
    device.cell_forward(storage_of(branch_dtype), cell, data);
    // its parts are no outputs of their own: those of an op may not share memory
    if (concat) nodes.clear();
    return {nodes, whole, branch_outputs, used_moments};
  }

  static Tensor cell_branch_outputs(const Tensors& inputs, const Tensors& nodes, const Tensor& conv_weights,
                                    const Tensor& gamma, const Tensor& beta, const Tensor& op_weights,
                                    const Tensor& moments, const Ints& encoded, double eps, bool bfloat16,
                                    bool bfloat16_products) {
    CellArguments arguments{inputs, conv_weights, gamma, beta, op_weights, &nodes, nullptr, nullptr, &moments};
    Cell cell = arguments.check(encoded, false, eps, Device::dtypes);
    Device::check_products(inputs[0], bfloat16_products, {cell.mixed_channels});
    ScalarType branch_dtype = Device::branch_dtype(inputs[0], bfloat16);
    Device device(inputs[0]);
    Tensor branch_outputs = device.empty_branch_outputs(cell.branch_outputs_size(), branch_dtype);
    device.cell_branch_outputs(storage_of(branch_dtype), cell,
                               cell_data(arguments, branch_outputs, moments, nodes, bfloat16_products));
    return branch_outputs;
  }

  static std::tuple<Tensors, Tensor, Tensor, Tensor, Tensor> cell_backward(
      const Tensors& grads, const Ints& grad_nodes, const Tensors& inputs, const Tensors& nodes, const Tensors& noise,
      const Tensor& conv_weights, const Tensor& gamma, const Tensor& beta, const Tensor& op_weights,
      std::optional<Tensor> edge_weights, const Tensor& moments, Tensor branch_outputs, const Ints& encoded,
      bool training, double eps, bool bfloat16, bool bfloat16_products, const Ints& needs_input_grad,
      int64_t all_images) {
    CellArguments arguments{inputs, conv_weights, gamma, beta, op_weights, &nodes, &noise, &edge_weights, &moments};
    Cell cell = arguments.check(encoded, training, eps, Device::dtypes);
    const Tensor& x = inputs[0];
    Device::check_products(x, bfloat16_products, {cell.mixed_channels});
    ScalarType branch_dtype = Device::branch_dtype(x, bfloat16), dtype = parameter_dtype(x);
    arguments.check_backward(cell, grads, grad_nodes, branch_outputs, branch_dtype, needs_input_grad);
    Processes processes = processes_of(x, all_images, training);
    Device device(x);
    int64_t edges = cell.edges.size();
    Tensor grad_gamma = device.empty({cell.norms, cell.mixed_channels}, dtype);
    Tensor grad_beta = device.empty({cell.norms, cell.mixed_channels}, dtype);
    Tensor grad_op_weights = device.empty({edges, cell.primitives}, dtype);
    Tensor grad_edge_weights = device.empty({edge_weights ? edges : 0}, dtype);
    Tensors grad_inputs;
    CellBackward data{cell_data(arguments, branch_outputs, moments, nodes, bfloat16_products), {}, {},
                      grad_gamma.data_ptr(), grad_beta.data_ptr(), grad_op_weights.data_ptr(),
                      edge_weights ? grad_edge_weights.data_ptr() : nullptr};
    data.forward.processes = std::move(processes);
    data.grad_nodes.resize(cell.nodes);
    for (size_t i = 0; i < grads.size(); i++) data.grad_nodes[grad_nodes[i]] = states(grads[i]);
    data.grad_inputs.resize(cell.inputs);
    for (int64_t j : needs_input_grad) {
      grad_inputs.push_back(device.empty_state(cell.images, cell.channels, inputs[j].size(2), inputs[j].size(3)));
      data.grad_inputs[j] = grad_inputs.back().data_ptr();
    }
    device.cell_backward(storage_of(branch_dtype), cell, data);
    return {grad_inputs, grad_gamma, grad_beta, grad_op_weights, grad_edge_weights};
  }

  static std::tuple<Tensors, Tensors, Tensors> relu_conv_bn_forward(const Tensor& x, const Tensors& conv_weights,
                                                                    const Tensors& gammas, const Tensors& betas,
                                                                    const Tensors& moments, double eps, bool reduce,
                                                                    bool bfloat16_products, int64_t all_images) {
    ReLUConvBNArguments arguments{x, conv_weights, gammas, betas, moments, reduce};
    arguments.check(!moments.empty(), Device::dtypes);
    Device::check(arguments);
    check_products(arguments, bfloat16_products);
    Processes processes = processes_of(x, all_images, moments.empty());
    Device device(x);
    Tensors outputs, conv_outputs, used_moments;
    for (size_t i = 0; i < gammas.size(); i++) {
      int64_t channels = gammas[i].numel();
      for (Tensors* list : {&outputs, &conv_outputs})
        list->push_back(device.empty_state(x.size(0), channels, arguments.oh(), arguments.ow()));
      used_moments.push_back(moments.empty() ? device.empty({2, channels}, ScalarType::Double)
                                             : torch::stable::clone(moments[i]));
    }
    ReLUConvBN data = layer_data(arguments, conv_outputs, used_moments, eps, moments.empty(), bfloat16_products);
    data.processes = std::move(processes);
    for (size_t i = 0; i < outputs.size(); i++) data.layers[i].output = outputs[i].data_ptr();
    device.relu_conv_bn_forward(storage_of(x.scalar_type()), data);
    return {outputs, conv_outputs, used_moments};
  }

  static std::tuple<Tensor, Tensors, Tensors> relu_conv_bn_backward(
      const Tensors& grads, const Tensor& x, const Tensors& conv_outputs, const Tensors& conv_weights,
      const Tensors& gammas, const Tensors& betas, const Tensors& moments, double eps, bool training, bool reduce,
      bool bfloat16_products, bool needs_input_grad, int64_t all_images) {
    ReLUConvBNArguments arguments{x, conv_weights, gammas, betas, moments, reduce};
    arguments.check(true, Device::dtypes);
    arguments.check_outputs("grads", grads);
    arguments.check_outputs("conv_outputs", conv_outputs);
    Device::check(arguments);
    check_products(arguments, bfloat16_products);
    Processes processes = processes_of(x, all_images, training);
    Device device(x);
    Tensor grad_x = needs_input_grad ? device.empty_state(x.size(0), x.size(1), x.size(2), x.size(3))
                                     : device.empty_state(0, 1, 1, 1);
    Tensors grad_gammas, grad_betas;
    ReLUConvBN data = layer_data(arguments, conv_outputs, moments, eps, training, bfloat16_products);
    data.processes = std::move(processes);
    if (needs_input_grad) data.grad_x = grad_x.data_ptr();
    for (size_t i = 0; i < grads.size(); i++) {
      for (Tensors* list : {&grad_gammas, &grad_betas})
        list->push_back(device.empty({gammas[i].numel()}, parameter_dtype(x)));
      data.layers[i].g = grads[i].data_ptr();
      data.layers[i].grad_gamma = grad_gammas[i].data_ptr();
      data.layers[i].grad_beta = grad_betas[i].data_ptr();
    }
    device.relu_conv_bn_backward(storage_of(x.scalar_type()), data);
    return {grad_x, grad_gammas, grad_betas};
  }

  static std::tuple<Tensor, Tensor> batch_norm_forward(const Tensor& x, const Tensor& gamma, const Tensor& beta,
                                                       std::optional<Tensor> moments, double eps, bool relu) {
    BatchNormArguments arguments{x, gamma, beta, moments ? &*moments : nullptr};
    arguments.check(Device::dtypes);
    Device device(x);
    Tensor output = device.empty_state(x.size(0), x.size(1), x.size(2), x.size(3));
    Tensor used_moments = moments ? torch::stable::clone(*moments)
                                  : device.empty({2, x.size(1)}, ScalarType::Double);
    BatchNorm data = norm_data(arguments, used_moments, eps, relu, !moments);
    data.output = output.data_ptr();
    device.batch_norm_forward(storage_of(x.scalar_type()), data);
    return {output, used_moments};
  }

  static std::tuple<Tensor, Tensor, Tensor> batch_norm_backward(const Tensor& grad, const Tensor& x,
                                                                const Tensor& gamma, const Tensor& beta,
                                                                const Tensor& moments, double eps, bool training,
                                                                bool relu, bool needs_input_grad) {
    BatchNormArguments arguments{x, gamma, beta, &moments};
    arguments.check(Device::dtypes);
    expect_tensor("grad", grad, {x.size(0), x.size(1), x.size(2), x.size(3)}, x.scalar_type(), Layout::ChannelsLast, x);
    Device device(x);
    Tensor grad_x = needs_input_grad ? device.empty_state(x.size(0), x.size(1), x.size(2), x.size(3))
                                     : device.empty_state(0, 1, 1, 1);
    Tensor grad_gamma = device.empty({x.size(1)}, parameter_dtype(x));
    Tensor grad_beta = device.empty({x.size(1)}, parameter_dtype(x));
    BatchNorm data = norm_data(arguments, moments, eps, relu, training);
    data.g = grad.data_ptr();
    if (needs_input_grad) data.grad_x = grad_x.data_ptr();
    data.grad_gamma = grad_gamma.data_ptr(), data.grad_beta = grad_beta.data_ptr();
    device.batch_norm_backward(storage_of(x.scalar_type()), data);
    return {grad_x, grad_gamma, grad_beta};
  }

  static void update_running_stats(Tensors running_means, Tensors running_vars, Tensors num_batches_tracked,
                                   const Tensor& moments, double momentum, int64_t count) {
    auto running = check_running_stats(running_means, running_vars, num_batches_tracked, moments, count);
    if (running.empty()) return;
    Device(moments).update_running_stats(storage_of(running_means[0].scalar_type()), running,
                                         static_cast<const double*>(moments.data_ptr()), moments.size(2),
                                         running_update(momentum, count));
  }

  template <class Library>
  static void implement(Library& m) {
    m.impl("cell_forward", TORCH_BOX(&cell_forward));
    m.impl("cell_branch_outputs", TORCH_BOX(&cell_branch_outputs));
    m.impl("cell_backward", TORCH_BOX(&cell_backward));
    m.impl("relu_conv_bn_forward", TORCH_BOX(&relu_conv_bn_forward));
    m.impl("relu_conv_bn_backward", TORCH_BOX(&relu_conv_bn_backward));
    m.impl("update_running_stats", TORCH_BOX(&update_running_stats));
  }
  template <class Library>
  static void implement_batch_norm(Library& m) {
    m.impl("batch_norm_forward", TORCH_BOX(&batch_norm_forward));
    m.impl("batch_norm_backward", TORCH_BOX(&batch_norm_backward));
  }

 private:
  static Processes processes_of(const Tensor& x, int64_t all_images, bool training) {
    if (all_images == 0) return {};
    if (!training) refuse("all_images", "0 in evaluation mode", std::to_string(all_images));
    if (all_images < x.size(0))
      refuse("all_images", "0, or at least the " + std::to_string(x.size(0)) + " of this process",
             std::to_string(all_images));
    auto sum = [device = x.device()](double* sums, int64_t count) {
      // an op of Python, which has the processes
      std::array<StableIValue, 1> stack{torch::stable::detail::from(
          torch::stable::from_blob(sums, {count}, {1}, device, ScalarType::Double))};
      STABLE_TORCH_ERROR_CODE_CHECK(
          torch_call_dispatcher("rfdarts::sum_over_processes", "", stack.data(), TORCH_ABI_VERSION));
    };
    return {sum, all_images};
  }
  static Storage storage_of(ScalarType dtype) {
    switch (dtype) {
      case ScalarType::Double: return Storage::Double;
      case ScalarType::BFloat16: return Storage::BFloat16;
      case ScalarType::Half: return Storage::Half;
      default: return Storage::Float;
    }
  }
  static void check_products(const ReLUConvBNArguments& a, bool bfloat16_products) {
    Ints channels{a.x.size(1)};
    for (const Tensor& gamma : a.gammas) channels.push_back(gamma.numel());
    Device::check_products(a.x, bfloat16_products, channels);
  }
  static States states(const Tensor& x) {
    if (std::max(x.stride(2), x.stride(3)) > Device::largest_stride)
      refuse("states", "strides up to " + std::to_string(Device::largest_stride), text(x.strides()));
    return {x.data_ptr(), x.stride(0), x.stride(2), x.stride(3)};
  }
  static CellForward cell_data(const CellArguments& a, const Tensor& branch_outputs, const Tensor& moments,
                               const Tensors& nodes, bool bfloat16_products) {
    CellForward data{};
    data.bfloat16_products = bfloat16_products;
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
  static BatchNorm norm_data(const BatchNormArguments& a, const Tensor& moments, double eps, bool relu, bool training) {
    const Tensor& x = a.x;
    return {x.size(0), x.size(2) * x.size(3), x.size(1), relu, training, eps, x.data_ptr(), a.gamma.data_ptr(),
            a.beta.data_ptr(), static_cast<double*>(moments.data_ptr())};
  }
  static ReLUConvBN layer_data(const ReLUConvBNArguments& a, const Tensors& conv_outputs, const Tensors& moments,
                               double eps, bool training, bool bfloat16_products) {
    const Tensor& x = a.x;
    ReLUConvBN data{x.size(0), x.size(2), x.size(3), x.size(1), a.reduce, training, eps, states(x), {}};
    data.bfloat16_products = bfloat16_products;
    for (size_t i = 0; i < a.gammas.size(); i++)
      data.layers.push_back({a.gammas[i].numel(), a.conv_weights[i].data_ptr(), a.gammas[i].data_ptr(),
                             a.betas[i].data_ptr(), conv_outputs[i].data_ptr(),
                             static_cast<double*>(moments[i].data_ptr())});
    return data;
  }
};

}  // namespace rfdarts
