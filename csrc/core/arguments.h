// Checks of the ops' arguments, the same on every device, before a pointer is taken. They throw std::invalid_argument
// "argument: expected ..., got ...". csrc/README.md has the table of arguments that they follow.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/cell.h"
#include "core/running_stats.h"

namespace rfdarts {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Ints = std::vector<int64_t>;
// that a device computes in
using DTypes = std::initializer_list<ScalarType>;

enum class Layout {
  Contiguous,
  // [N, C, H, W] with consecutive channels and any other strides
  ChannelsInside,
  // dense NHWC
  ChannelsLast,
};

inline std::string text(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Long: return "int64";
    default: return torch::headeronly::toString(dtype);
  }
}
template <class Sizes>
std::string text(const Sizes& sizes) {
  std::string list;
  for (int64_t size : sizes) list += (list.empty() ? "" : ", ") + std::to_string(size);
  return "[" + list + "]";
}
inline std::string text(Layout layout) {
  switch (layout) {
    case Layout::ChannelsInside: return "with consecutive channels";
    case Layout::ChannelsLast: return "in channels_last order";
    default: return "contiguous";
  }
}

// A tensor's name in messages: that of an argument, or of one of its elements.
struct Name {
  const char* argument;
  int64_t index = -1;
  Name(const char* argument, int64_t index = -1) : argument(argument), index(index) {}
};
[[noreturn]] inline void refuse(Name name, const std::string& expected, const std::string& got) {
  std::string element = name.index < 0 ? "" : "[" + std::to_string(name.index) + "]";
  throw std::invalid_argument(name.argument + element + ": expected " + expected + ", got " + got);
}
inline void expect_count(const char* argument, size_t got, int64_t expected) {
  if (int64_t(got) != expected) refuse(argument, std::to_string(expected) + " tensors", std::to_string(got));
}

inline bool has_layout(const Tensor& t, Layout layout) {
  if (layout == Layout::Contiguous) return t.is_contiguous();
  if (layout == Layout::ChannelsInside) return t.stride(1) == 1 || t.size(1) == 1;
  int64_t stride = 1;
  for (int dim : {1, 3, 2, 0}) {
    // where there is one element, its stride says nothing
    if (t.size(dim) != 1 && t.stride(dim) != stride) return false;
    stride *= t.size(dim);
  }
  return true;
}
// on the device of `like`
inline void expect_tensor(Name name, const Tensor& t, std::initializer_list<int64_t> shape, ScalarType dtype,
                          Layout layout, const Tensor& like) {
  auto sizes = t.sizes();
  bool same_shape = std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end());
  if (same_shape && t.scalar_type() == dtype && has_layout(t, layout) && t.device() == like.device()) return;
  refuse(name, text(shape) + " " + text(dtype) + " " + text(layout) + " on the device of the inputs",
         text(t.sizes()) + " " + text(t.scalar_type()) + " with strides " + text(t.strides()) +
             (t.device() == like.device() ? "" : " on another device"));
}
// A tensor whose sizes are not known yet: [N, C, H, W] with something in it.
inline void expect_images(Name name, const Tensor& t, DTypes dtypes) {
  if (t.dim() != 4 || t.numel() == 0) refuse(name, "[N, C, H, W], not empty", text(t.sizes()));
  if (!has_layout(t, Layout::ChannelsInside))
    refuse(name, text(Layout::ChannelsInside), "strides " + text(t.strides()));
  if (std::find(dtypes.begin(), dtypes.end(), t.scalar_type()) != dtypes.end()) return;
  std::string names;
  for (ScalarType dtype : dtypes) names += (names.empty() ? "" : " or ") + text(dtype);
  refuse(name, names, text(t.scalar_type()));
}
// different indices below `count`
inline void expect_indices(const char* argument, const Ints& indices, int64_t count) {
  std::vector<bool> seen(count);
  for (int64_t i : indices) {
    if (i < 0 || i >= count || seen[i])
      refuse(argument, "different indices below " + std::to_string(count), text(indices));
    seen[i] = true;
  }
}

// of parameters, their gradients and packed convolutions
inline ScalarType parameter_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// What the ops of a cell have in common; null where an op has no such argument.
struct CellArguments {
  const Tensors& inputs;
  const Tensor &conv_weights, &gamma, &beta, &op_weights;
  const Tensors* nodes = nullptr;
  const Tensors* noise = nullptr;
  const std::optional<Tensor>* edge_weights = nullptr;
  const Tensor* moments = nullptr;

  // the cell, with all of these checked
  Cell check(const Ints& encoded, bool training, double eps, DTypes dtypes) const {
    if (inputs.empty()) refuse("inputs", "at least one tensor", "none");
    const Tensor& x = inputs[0];
    Ints sizes;
    for (size_t i = 0; i < inputs.size(); i++) {
      const Tensor& t = inputs[i];
      expect_images({"inputs", int64_t(i)}, t, dtypes);
      expect_tensor({"inputs", int64_t(i)}, t, {x.size(0), x.size(1), t.size(2), t.size(3)}, x.scalar_type(),
                    Layout::ChannelsInside, x);
      sizes.push_back(t.size(2)), sizes.push_back(t.size(3));
    }
    Cell cell(encoded, x.size(0), x.size(1), training, eps, sizes);
    ScalarType dtype = parameter_dtype(x);
    int64_t edges = cell.edges.size();
    expect_tensor("conv_weights", conv_weights, {cell.conv_weights_size}, dtype, Layout::Contiguous, x);
    expect_tensor("gamma", gamma, {cell.norms, cell.mixed_channels}, dtype, Layout::Contiguous, x);
    expect_tensor("beta", beta, {cell.norms, cell.mixed_channels}, dtype, Layout::Contiguous, x);
    expect_tensor("op_weights", op_weights, {edges, cell.primitives}, dtype, Layout::Contiguous, x);
    if (edge_weights && *edge_weights)
      expect_tensor("edge_weights", **edge_weights, {edges}, dtype, Layout::Contiguous, x);
    if (moments)
      expect_tensor("moments", *moments, {2, cell.norms, cell.mixed_channels}, ScalarType::Double, Layout::Contiguous,
                    x);
    if (nodes) {
      expect_count("nodes", nodes->size(), cell.nodes);
      for (int i = 0; i < cell.nodes; i++)
        expect_tensor({"nodes", i}, (*nodes)[i], {cell.images, cell.channels, cell.oh, cell.ow}, x.scalar_type(),
                      Layout::ChannelsInside, x);
    }
    if (noise) {
      expect_count("noise", noise->size(), cell.noises);
      for (int i = 0; i < cell.noises; i++)
        expect_tensor({"noise", i}, (*noise)[i], {cell.images, cell.mixed_channels, cell.oh, cell.ow}, x.scalar_type(),
                      Layout::ChannelsLast, x);
    }
    return cell;
  }
  // and what cell_backward takes besides
  void check_backward(const Cell& cell, const Tensors& grads, const Ints& grad_nodes, const Tensor& branch_outputs,
                      ScalarType branch_dtype, const Ints& needs_input_grad) const {
    const Tensor& x = inputs[0];
    expect_count("grads", grads.size(), grad_nodes.size());
    for (size_t i = 0; i < grads.size(); i++)
      expect_tensor({"grads", int64_t(i)}, grads[i], {cell.images, cell.channels, cell.oh, cell.ow}, x.scalar_type(),
                    Layout::ChannelsInside, x);
    expect_indices("grad_nodes", grad_nodes, cell.nodes);
    expect_tensor("branch_outputs", branch_outputs, {cell.branch_outputs_size()}, branch_dtype, Layout::Contiguous, x);
    expect_indices("needs_input_grad", needs_input_grad, cell.inputs);
  }
};

// What the ops of ReLU-conv-BN layers have in common.
struct ReLUConvBNArguments {
  const Tensor& x;
  const Tensors &conv_weights, &gammas, &betas;
  // empty in training mode before the forward
  const Tensors& moments;
  bool reduce;

  int64_t stride() const { return reduce ? 2 : 1; }
  int64_t oh() const { return x.size(2) / stride(); }
  int64_t ow() const { return x.size(3) / stride(); }
  void check(bool moments_given, DTypes dtypes) const {
    expect_images("x", x, dtypes);
    if (x.size(2) % stride() || x.size(3) % stride())
      refuse("x", "an even height and width for a reduction", text(x.sizes()));
    int64_t count = gammas.size();
    if (!count) refuse("gammas", "at least one tensor", "none");
    expect_count("conv_weights", conv_weights.size(), count);
    expect_count("betas", betas.size(), count);
    expect_count("moments", moments.size(), moments_given ? count : 0);
    for (int64_t i = 0; i < count; i++) {
      int64_t channels = gammas[i].numel();
      ScalarType dtype = parameter_dtype(x);
      expect_tensor({"gammas", i}, gammas[i], {std::max<int64_t>(channels, 1)}, dtype, Layout::Contiguous, x);
      expect_tensor({"betas", i}, betas[i], {channels}, dtype, Layout::Contiguous, x);
      expect_tensor({"conv_weights", i}, conv_weights[i], {2 * x.size(1) * channels}, dtype, Layout::Contiguous, x);
      if (moments_given)
        expect_tensor({"moments", i}, moments[i], {2, channels}, ScalarType::Double, Layout::Contiguous, x);
    }
  }
  // grads or conv_outputs: one for each layer, of the size of its output
  void check_outputs(const char* argument, const Tensors& list) const {
    expect_count(argument, list.size(), gammas.size());
    for (size_t i = 0; i < list.size(); i++)
      expect_tensor({argument, int64_t(i)}, list[i], {x.size(0), gammas[i].numel(), oh(), ow()}, x.scalar_type(),
                    Layout::ChannelsLast, x);
  }
};

// What the ops of a BatchNorm have in common.
struct BatchNormArguments {
  const Tensor &x, &gamma, &beta;
  // null in training mode before the forward
  const Tensor* moments;

  void check(DTypes dtypes) const {
    expect_images("x", x, dtypes);
    int64_t c = x.size(1);
    expect_tensor("x", x, {x.size(0), c, x.size(2), x.size(3)}, x.scalar_type(), Layout::ChannelsLast, x);
    expect_tensor("gamma", gamma, {c}, parameter_dtype(x), Layout::Contiguous, x);
    expect_tensor("beta", beta, {c}, parameter_dtype(x), Layout::Contiguous, x);
    if (moments) expect_tensor("moments", *moments, {2, c}, ScalarType::Double, Layout::Contiguous, x);
  }
};

// The arguments of update_running_stats, one for each BatchNorm.
inline std::vector<RunningStats> check_running_stats(const Tensors& means, const Tensors& variances,
                                                     const Tensors& num_batches, const Tensor& moments, int64_t count) {
  int64_t norms = means.size();
  expect_count("running_vars", variances.size(), norms);
  expect_count("num_batches_tracked", num_batches.size(), norms);
  if (moments.dim() != 3) refuse("moments", "[2, norms, C]", text(moments.sizes()));
  if (count < 1) refuse("count", "at least 1", std::to_string(count));
  int64_t channels = moments.size(2);
  expect_tensor("moments", moments, {2, norms, channels}, ScalarType::Double, Layout::Contiguous, moments);
  std::vector<RunningStats> running;
  for (int64_t i = 0; i < norms; i++) {
    ScalarType dtype = parameter_dtype(means[0]);
    expect_tensor({"running_means", i}, means[i], {channels}, dtype, Layout::Contiguous, moments);
    expect_tensor({"running_vars", i}, variances[i], {channels}, dtype, Layout::Contiguous, moments);
    expect_tensor({"num_batches_tracked", i}, num_batches[i], {}, ScalarType::Long, Layout::Contiguous, moments);
    running.push_back({means[i].data_ptr(), variances[i].data_ptr(),
                       static_cast<int64_t*>(num_batches[i].data_ptr())});
  }
  return running;
}

}  // namespace rfdarts
