// The ops of every device for CUDA tensors, beside a torch with or without CUDA. Torch's stable ABI only. With
// RFDARTS_EMULATION: the same kernels on CPU tensors, as a library of its own.
#ifndef RFDARTS_EMULATION
#include <Python.h>

#define USE_CUDA
#include <cuda_runtime.h>
#endif
#include <torch/csrc/stable/accelerator.h>

#include <cstdint>
#include <string>
#include <vector>

#include "bindings/ops.h"
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
struct Current {
  explicit Current(const Tensor&) {}
  void* stream() const { return nullptr; }
};
#else
// the tensor's device is current while this lives
struct Current {
  int32_t index;
  torch::stable::accelerator::DeviceGuard guard;
  explicit Current(const Tensor& x) : index(x.get_device_index()), guard(index) {}
  void* stream() const {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "this torch was built without CUDA");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
    return stream;
  }
};
#endif

struct Cuda {
  static constexpr DTypes dtypes = {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half};
  // kernels count within an image in 32 bits
  static constexpr int64_t largest_stride = INT32_MAX;
  static constexpr bool concat_views = true;
  static ScalarType branch_dtype(const Tensor& x, bool bfloat16) {
    if (bfloat16) refuse("bfloat16", "false on CUDA, where branch outputs have the dtype of the inputs", "true");
    return x.scalar_type();
  }
  static void check_products(const Tensor&, bool bfloat16_products, const Ints&) {
    if (bfloat16_products) refuse("bfloat16_products", "false on CUDA: products are in the dtype of the inputs", "true");
  }
  static void check(const Cell& cell) {
    for (const Edge& edge : cell.edges)
      for (const Branch& b : edge.branches)
        if (b.op == Op::NorConv || b.averages()) refuse("cell", "ops of the DARTS space", cell.text());
  }
  static void check(const ReLUConvBNArguments& a) {
    if (a.gammas.size() != 1) refuse("gammas", "one layer on CUDA", std::to_string(a.gammas.size()));
    if (a.reduce && a.gammas[0].numel() % 2)
      refuse("gammas", "an even number of outputs", std::to_string(a.gammas[0].numel()));
  }

  const Tensor& x;
  Current current{x};
  // they live until the op's end; the allocator reuses them in the stream's order
  Tensors taken;
  Allocate allocate = [this](int64_t bytes) {
    return taken.emplace_back(torch::stable::new_empty(x, {bytes}, ScalarType::Byte)).data_ptr();
  };

  explicit Cuda(const Tensor& x) : x(x) {}
  Tensor empty(const Ints& sizes, ScalarType dtype) const { return torch::stable::new_empty(x, sizes, dtype); }
  Tensor empty_state(int64_t n, int64_t c, int64_t h, int64_t w) const {
    Tensor nhwc = torch::stable::new_empty(x, {n, h, w, c});
    return torch::stable::transpose(torch::stable::transpose(nhwc, 1, 3), 2, 3);
  }
  Tensor empty_branch_outputs(int64_t size, ScalarType dtype) const { return empty({size}, dtype); }

  void cell_forward(Storage storage, const Cell& cell, const CellForward& data) {
    cuda::cell_forward(storage, cell, data, current.stream(), allocate);
  }
  void cell_branch_outputs(Storage storage, const Cell& cell, const CellForward& data) {
    cuda::cell_branch_outputs(storage, cell, data, current.stream(), allocate);
  }
  void cell_backward(Storage storage, const Cell& cell, const CellBackward& data) {
    cuda::cell_backward(storage, cell, data, current.stream(), allocate);
  }
  static ReLUConvBN only_layer(const rfdarts::ReLUConvBN& a) {
    const auto& layer = a.layers[0];
    return {a.images, a.h, a.w, a.ci, layer.co, a.reduce, a.training, a.eps, a.x, layer.conv_weights, layer.gamma,
            layer.beta, layer.y, layer.moments};
  }
  void relu_conv_bn_forward(Storage storage, const rfdarts::ReLUConvBN& a) {
    cuda::relu_conv_bn_forward(storage, only_layer(a), a.layers[0].output, current.stream(), allocate);
  }
  void relu_conv_bn_backward(Storage storage, const rfdarts::ReLUConvBN& a) {
    const auto& layer = a.layers[0];
    cuda::relu_conv_bn_backward(storage, only_layer(a), layer.g, a.grad_x, layer.grad_gamma, layer.grad_beta,
                                current.stream(), allocate);
  }
  void update_running_stats(Storage storage, const std::vector<RunningStats>& running, const double* moments,
                            int64_t channels, const RunningUpdate& update) {
    cuda::update_running_stats(storage, running, moments, channels, update, current.stream());
  }
};

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
  rfdarts::Ops<rfdarts::cuda::Cuda>::implement(m);
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
