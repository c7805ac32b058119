// All ops: schemas, and the way from torch tensors to raw pointers. Torch's stable ABI only.
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "rfdarts/cell.h"
#include "rfdarts/conv_bn.h"
#include "rfdarts/memory.h"
#include "rfdarts/schemas.h"

namespace rfdarts {
namespace {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Ints = std::vector<int64_t>;

// a tensor on pooled memory
Tensor take(const Ints& sizes, const Ints& strides, ScalarType type, int64_t item,
            Lifetime lifetime = Lifetime::State) {
  int64_t count = 1;
  for (int64_t size : sizes) count *= size;
  void* data = pool_take(count * item, lifetime);
  return torch::stable::from_blob(data, sizes, strides, torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                  type, [](void* p) { pool_give(p); });
}
// [N, C, H, W], channels last
Tensor take_state(int64_t n, int64_t c, int64_t h, int64_t w, const Tensor& like) {
  return take({n, c, h, w}, {h * w * c, 1, w * c, c}, like.scalar_type(), like.element_size());
}
Tensor take_vector(int64_t n, ScalarType type, int64_t item) { return take({n}, {1}, type, item); }
Tensor take_matrix(int64_t rows, int64_t columns, const Tensor& like) {
  return take({rows, columns}, {columns, 1}, like.scalar_type(), like.element_size());
}

template <class T>
Batch<T> batch(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4 && (x.stride(1) == 1 || x.size(1) == 1),
                  "states: expected [N, C, H, W] in channels_last order");
  return {static_cast<const T*>(x.data_ptr()), x.stride(0), x.stride(2), x.stride(3)};
}
template <class T>
const T* pointer(const Tensor& x) {
  STD_TORCH_CHECK(x.is_contiguous(), "expected a contiguous tensor");
  return static_cast<const T*>(x.data_ptr());
}

void parallel(int64_t count, const std::function<void(Images&)>& f) {
  int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  std::atomic<int64_t> taken{0};
  auto run = [&](int64_t, int64_t) {
    Images images(taken, count, std::max<int64_t>(threads, 1));
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

struct CellArguments {
  const Tensors &inputs, &noise;
  const Tensor &weights, &gamma, &beta, &mix;
  const std::optional<Tensor>& edge_weights;
  const Ints& spec;
  double eps;

  Cell cell() const {
    const Tensor& x = inputs.at(0);
    Ints sizes;
    for (const Tensor& t : inputs) {
      STD_TORCH_CHECK(t.scalar_type() == x.scalar_type() && t.size(0) == x.size(0) && t.size(1) == x.size(1),
                      "inputs: expected one dtype, batch size and number of channels");
      sizes.push_back(t.size(2)), sizes.push_back(t.size(3));
    }
    Cell c(spec, x.size(0), x.size(1), eps, sizes);
    STD_TORCH_CHECK(int64_t(inputs.size()) == c.inputs, "inputs: expected as many as the cell has");
    STD_TORCH_CHECK(gamma.numel() == c.norms * c.mixed && beta.numel() == gamma.numel(),
                    "gamma, beta: expected [norms, C / K]");
    STD_TORCH_CHECK(mix.numel() == int64_t(c.edges.size()) * c.primitives, "mix: expected [edges, primitives]");
    for (const Tensor* t : {&weights, &gamma, &beta, &mix})
      STD_TORCH_CHECK(t->scalar_type() == x.scalar_type(), "expected the dtype of the inputs everywhere");
    return c;
  }
  template <class T, class S>
  CellForward<T, S> forward(const Tensor& kept, const Tensor& moments, const Tensors& nodes) const {
    CellForward<T, S> f;
    for (const Tensor& x : inputs) f.inputs.push_back(batch<T>(x));
    for (const Tensor& z : noise) {
      STD_TORCH_CHECK(z.stride(1) == 1 || z.size(1) == 1, "noise: expected channels_last order");
      f.noise.push_back(static_cast<const T*>(z.data_ptr()));
    }
    f.weights = pointer<T>(weights);
    f.weights_size = weights.numel();
    f.gamma = pointer<T>(gamma);
    f.beta = pointer<T>(beta);
    f.mix = pointer<T>(mix);
    f.edge_weights = edge_weights ? pointer<T>(*edge_weights) : nullptr;
    f.kept = static_cast<S*>(kept.data_ptr());
    f.moments = static_cast<double*>(moments.data_ptr());
    for (const Tensor& t : nodes) f.node_states.push_back(batch<T>(t));
    return f;
  }
};

// f(T, S): the types of arithmetic and of what is kept
template <class F>
void with_types(const Tensor& x, bool bfloat16, F&& f) {
  if (x.scalar_type() == ScalarType::Double)
    f(double(), double());
  else if (bfloat16)
    f(float(), bf16());
  else
    f(float(), float());
}

Tensor take_kept(const Cell& cell, const Tensor& x, bool bfloat16) {
  bool half = bfloat16 && x.scalar_type() != ScalarType::Double;
  ScalarType type = half ? ScalarType::BFloat16 : x.scalar_type();
  return take({cell.kept_size()}, {1}, type, half ? 2 : x.element_size(), Lifetime::Kept);
}

std::tuple<Tensors, Tensor, Tensor, Tensor> cell_forward_op(const Tensors& inputs, const Tensors& noise,
                                                            const Tensor& weights, const Tensor& gamma,
                                                            const Tensor& beta, const Tensor& mix,
                                                            std::optional<Tensor> edge_weights,
                                                            std::optional<Tensor> moments, const Ints& spec,
                                                            double eps, bool bfloat16, bool together) {
  CellArguments arguments{inputs, noise, weights, gamma, beta, mix, edge_weights, spec, eps};
  Cell cell = arguments.cell();
  STD_TORCH_CHECK(cell.training == !moments.has_value(), "moments: expected in evaluation mode, and only there");
  const Tensor& x = inputs[0];
  Tensors nodes;
  for (int i = 0; i < cell.nodes; i++) nodes.push_back(take_state(cell.images, cell.channels, cell.oh, cell.ow, x));
  Tensor all = together ? take_state(cell.images, cell.nodes * cell.channels, cell.oh, cell.ow, x)
                        : take_vector(0, x.scalar_type(), x.element_size());
  Tensor kept = take_kept(cell, x, bfloat16);
  Tensor used = take({2, cell.norms, cell.mixed}, {cell.norms * cell.mixed, cell.mixed, 1}, ScalarType::Double, 8);
  if (moments) {
    const double* from = pointer<double>(*moments);
    std::copy_n(from, used.numel(), static_cast<double*>(used.data_ptr()));
  }
  with_types(x, bfloat16, [&](auto t, auto s) {
    auto data = arguments.forward<decltype(t), decltype(s)>(kept, used, {});
    for (const Tensor& node : nodes) data.nodes.push_back(static_cast<decltype(t)*>(node.data_ptr()));
    if (together) data.together = static_cast<decltype(t)*>(all.data_ptr());
    Blocks blocks;
    cell_forward(cell, data, true, parallel, blocks.allocate);
  });
  return {nodes, all, kept, used};
}

Tensor cell_kept_op(const Tensors& inputs, const Tensors& nodes, const Tensor& weights, const Tensor& gamma,
                    const Tensor& beta, const Tensor& mix, const Tensor& moments, const Ints& spec, double eps,
                    bool bfloat16) {
  std::optional<Tensor> none;
  CellArguments arguments{inputs, {}, weights, gamma, beta, mix, none, spec, eps};
  Cell cell = arguments.cell();
  Tensor kept = take_kept(cell, inputs[0], bfloat16);
  Tensor again = torch::stable::clone(moments);
  with_types(inputs[0], bfloat16, [&](auto t, auto s) {
    auto data = arguments.forward<decltype(t), decltype(s)>(kept, again, nodes);
    Blocks blocks;
    cell_forward(cell, data, false, parallel, blocks.allocate);
  });
  return kept;
}

std::tuple<Tensors, Tensor, Tensor, Tensor, Tensor> cell_backward_op(
    const Tensors& grads, const Ints& grad_nodes, const Tensors& inputs, const Tensors& nodes, const Tensors& noise,
    const Tensor& weights, const Tensor& gamma, const Tensor& beta, const Tensor& mix,
    std::optional<Tensor> edge_weights, const Tensor& moments, Tensor kept, const Ints& spec, double eps,
    bool bfloat16, const Ints& wanted) {
  CellArguments arguments{inputs, noise, weights, gamma, beta, mix, edge_weights, spec, eps};
  Cell cell = arguments.cell();
  const Tensor& x = inputs[0];
  STD_TORCH_CHECK(grads.size() == grad_nodes.size(), "grads: expected one for each of grad_nodes");
  STD_TORCH_CHECK(kept.numel() == cell.kept_size(), "kept: not what the forward of this cell returned");
  Tensors grad_inputs;
  for (int64_t j : wanted)
    grad_inputs.push_back(take_state(cell.images, cell.channels, inputs.at(j).size(2), inputs.at(j).size(3), x));
  Tensor grad_gamma = take_matrix(cell.norms, cell.mixed, x), grad_beta = take_matrix(cell.norms, cell.mixed, x);
  int64_t edges = cell.edges.size();
  Tensor grad_mix = take_matrix(edges, cell.primitives, x);
  Tensor grad_edges = take_vector(edge_weights ? edges : 0, x.scalar_type(), x.element_size());
  with_types(x, bfloat16, [&](auto t, auto s) {
    using T = decltype(t);
    CellBackward<T, decltype(s)> data;
    data.forward = arguments.forward<T, decltype(s)>(kept, moments, nodes);
    data.grad_nodes.resize(cell.nodes);
    for (size_t i = 0; i < grads.size(); i++) data.grad_nodes.at(grad_nodes[i]) = batch<T>(grads[i]);
    data.grad_inputs.resize(cell.inputs, nullptr);
    for (size_t i = 0; i < wanted.size(); i++)
      data.grad_inputs.at(wanted[i]) = static_cast<T*>(grad_inputs[i].data_ptr());
    data.grad_gamma = static_cast<T*>(grad_gamma.data_ptr());
    data.grad_beta = static_cast<T*>(grad_beta.data_ptr());
    data.grad_mix = static_cast<T*>(grad_mix.data_ptr());
    data.grad_edge_weights = edge_weights ? static_cast<T*>(grad_edges.data_ptr()) : nullptr;
    Blocks blocks;
    cell_backward(cell, data, parallel, blocks.allocate);
  });
  return {grad_inputs, grad_gamma, grad_beta, grad_mix, grad_edges};
}

// running statistics as BatchNorm2d updates them, from moments [2, norms, C]
template <class T>
void update_running(const Tensors& means, const Tensors& variances, const double* moments, int64_t c, double momentum,
                    double unbias) {
  int64_t norms = means.size();
  for (int64_t i = 0; i < norms; i++) {
    T *mean = static_cast<T*>(means[i].data_ptr()), *variance = static_cast<T*>(variances[i].data_ptr());
    for (int64_t j = 0; j < c; j++) {
      mean[j] = T((1 - momentum) * mean[j] + momentum * moments[i * c + j]);
      variance[j] = T((1 - momentum) * variance[j] + momentum * unbias * moments[(norms + i) * c + j]);
    }
  }
}
void update_running_op(Tensors means, Tensors variances, Tensors counts, const Tensor& moments, double momentum,
                       int64_t count) {
  int64_t c = moments.size(2);
  STD_TORCH_CHECK(means.size() == variances.size() && int64_t(means.size()) == moments.size(1),
                  "running statistics: expected one mean and one variance for each row of moments");
  for (const Tensors* list : {&means, &variances})
    for (const Tensor& t : *list)
      STD_TORCH_CHECK(t.numel() == c && t.is_contiguous() && t.scalar_type() == means[0].scalar_type(),
                      "running statistics: expected contiguous [C] of one dtype");
  double unbias = double(count) / (count > 1 ? count - 1 : 1);
  if (means[0].scalar_type() == ScalarType::Double)
    update_running<double>(means, variances, pointer<double>(moments), c, momentum, unbias);
  else
    update_running<float>(means, variances, pointer<double>(moments), c, momentum, unbias);
  for (const Tensor& t : counts) ++*static_cast<int64_t*>(t.data_ptr());
}

template <class T>
ConvNorm<T> conv_norm(const Tensor& x, const Tensors& weights, const Tensors& gammas, const Tensors& betas,
                      const Tensors& ys, const Tensors& moments, double eps, bool training, bool reduce) {
  ConvNorm<T> a{x.size(0), x.size(2), x.size(3), x.size(1), reduce, training, eps, batch<T>(x), {}};
  STD_TORCH_CHECK(!weights.empty() && weights.size() == gammas.size() && gammas.size() == betas.size(),
                  "weights, gammas, betas: expected as many of each");
  for (size_t i = 0; i < weights.size(); i++) {
    for (const Tensor* t : {&weights[i], &gammas[i], &betas[i]})
      STD_TORCH_CHECK(t->scalar_type() == x.scalar_type(), "expected the dtype of the input everywhere");
    int64_t co = gammas[i].numel();
    STD_TORCH_CHECK(weights[i].numel() == 2 * a.wide() * co, "weights: expected the matrix and its transpose");
    a.parts.push_back({co, pointer<T>(weights[i]), pointer<T>(gammas[i]), pointer<T>(betas[i]),
                       static_cast<T*>(ys.at(i).data_ptr()), nullptr, static_cast<double*>(moments.at(i).data_ptr())});
  }
  return a;
}

std::tuple<Tensors, Tensors, Tensors> conv_bn_forward_op(const Tensor& x, const Tensors& weights,
                                                         const Tensors& gammas, const Tensors& betas,
                                                         const Tensors& moments, double eps, bool reduce) {
  bool training = moments.empty();
  int64_t half = reduce ? 2 : 1;
  Tensors outs, ys, used;
  for (size_t i = 0; i < gammas.size(); i++) {
    int64_t co = gammas[i].numel();
    for (Tensors* list : {&outs, &ys})
      list->push_back(take_state(x.size(0), co, x.size(2) / half, x.size(3) / half, x));
    used.push_back(take({2, co}, {co, 1}, ScalarType::Double, 8));
    if (!training) std::copy_n(pointer<double>(moments.at(i)), 2 * co, static_cast<double*>(used[i].data_ptr()));
  }
  with_types(x, false, [&](auto t, auto) {
    using T = decltype(t);
    auto a = conv_norm<T>(x, weights, gammas, betas, ys, used, eps, training, reduce);
    for (size_t i = 0; i < outs.size(); i++) a.parts[i].out = static_cast<T*>(outs[i].data_ptr());
    conv_norm_forward(a, parallel);
  });
  return {outs, ys, used};
}

std::tuple<Tensor, Tensors, Tensors> conv_bn_backward_op(const Tensors& grads, const Tensor& x, const Tensors& ys,
                                                         const Tensors& weights, const Tensors& gammas,
                                                         const Tensors& betas, const Tensors& moments, double eps,
                                                         bool training, bool reduce, bool wanted) {
  Tensor dx = wanted ? take_state(x.size(0), x.size(1), x.size(2), x.size(3), x) : take_state(0, 1, 1, 1, x);
  Tensors grad_gammas, grad_betas;
  for (const Tensor& gamma : gammas)
    for (Tensors* list : {&grad_gammas, &grad_betas})
      list->push_back(take_vector(gamma.numel(), x.scalar_type(), x.element_size()));
  with_types(x, false, [&](auto t, auto) {
    using T = decltype(t);
    auto a = conv_norm<T>(x, weights, gammas, betas, ys, moments, eps, training, reduce);
    std::vector<ConvNormGradients<T>> gradients;
    for (size_t i = 0; i < a.parts.size(); i++) {
      const Tensor& g = grads.at(i);
      STD_TORCH_CHECK(g.stride(1) == 1 && g.stride(3) == a.parts[i].co && g.stride(2) == a.parts[i].co * g.size(3),
                      "grads: expected channels_last order");
      gradients.push_back({static_cast<const T*>(g.data_ptr()), static_cast<T*>(grad_gammas[i].data_ptr()),
                           static_cast<T*>(grad_betas[i].data_ptr())});
    }
    conv_norm_backward(a, gradients, wanted ? static_cast<T*>(dx.data_ptr()) : nullptr, parallel);
  });
  return {dx, grad_gammas, grad_betas};
}

std::string isa_op() { return isa_name(); }
std::string isa_best_op() { return isa_best(); }
void pool_release_op() { pool_release(); }
int64_t pool_cached_op() { return pool_cached(); }
void pool_poison_op(bool on) { pool_poison(on); }
std::string profile_op() {
  std::string text;
  for (const Phase& p : profile()) text += std::string(p.name) + "=" + std::to_string(p.seconds) + ";";
  return text;
}
}  // namespace
}  // namespace rfdarts

STABLE_TORCH_LIBRARY(rfdarts, m) {
  define_shared_ops(m);
  m.def("isa() -> str");
  m.def("isa_best() -> str");
  m.def("pool_release() -> ()");
  m.def("pool_cached() -> int");
  m.def("pool_poison(bool on) -> ()");
  m.def("profile() -> str");
}
STABLE_TORCH_LIBRARY_IMPL(rfdarts, CPU, m) {
  m.impl("cell_forward", TORCH_BOX(&rfdarts::cell_forward_op));
  m.impl("cell_kept", TORCH_BOX(&rfdarts::cell_kept_op));
  m.impl("cell_backward", TORCH_BOX(&rfdarts::cell_backward_op));
  m.impl("update_running", TORCH_BOX(&rfdarts::update_running_op));
  m.impl("conv_bn_forward", TORCH_BOX(&rfdarts::conv_bn_forward_op));
  m.impl("conv_bn_backward", TORCH_BOX(&rfdarts::conv_bn_backward_op));
}
STABLE_TORCH_LIBRARY_IMPL(rfdarts, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&rfdarts::isa_op));
  m.impl("isa_best", TORCH_BOX(&rfdarts::isa_best_op));
  m.impl("pool_release", TORCH_BOX(&rfdarts::pool_release_op));
  m.impl("pool_cached", TORCH_BOX(&rfdarts::pool_cached_op));
  m.impl("pool_poison", TORCH_BOX(&rfdarts::pool_poison_op));
  m.impl("profile", TORCH_BOX(&rfdarts::profile_op));
}

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
