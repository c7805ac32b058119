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
#include "cuda/device.h"

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
    if (bfloat16_products)
      refuse("bfloat16_products", "false on CUDA: products are in the dtype of the inputs", "true");
  }
  static void check(const ReLUConvBNArguments& a) {
    if (a.gammas.size() > kMaxLayers)
      refuse("gammas", "up to " + std::to_string(kMaxLayers) + " layers on CUDA", std::to_string(a.gammas.size()));
    for (const Tensor& gamma : a.gammas)
      if (a.reduce && gamma.numel() % 2) refuse("gammas", "an even number of outputs", std::to_string(gamma.numel()));
  }

  // torch's own error loses its type, and before 2.13 its words, in the stable ABI
  static Tensor new_empty(const Tensor& x, const Ints& sizes, ScalarType dtype) {
    int64_t count = 1;
    for (int64_t size : sizes) count *= size;
    try {
#ifdef RFDARTS_EMULATION
      emulation::allocate(count);
#endif
      return torch::stable::new_empty(x, sizes, dtype);
    } catch (const std::runtime_error& error) {
      std::string text = error.what(), free = free_memory();
      // a device that has failed, or is being captured, does not say how much is free
      if (free.empty() || text.find("CUDA error") != std::string::npos) throw;
      throw OutOfMemory(std::to_string(count) + " numbers of " + rfdarts::text(dtype) + " do not fit, " + free);
    }
  }

  const Tensor& x;
  Current current{x};
  // they live until the op's end; the allocator reuses them in the stream's order
  Tensors taken;
  Allocate allocate = [this](int64_t bytes) {
    return taken.emplace_back(new_empty(x, {bytes}, ScalarType::Byte)).data_ptr();
  };

  explicit Cuda(const Tensor& x) : x(x) {}
  Tensor empty(const Ints& sizes, ScalarType dtype) const { return new_empty(x, sizes, dtype); }
  Tensor empty_state(int64_t n, int64_t c, int64_t h, int64_t w) const {
    Tensor nhwc = new_empty(x, {n, h, w, c}, x.scalar_type());
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
  void relu_conv_bn_forward(Storage storage, const ReLUConvBN& a) {
    cuda::relu_conv_bn_forward(storage, a, current.stream(), allocate);
  }
  void relu_conv_bn_backward(Storage storage, const ReLUConvBN& a) {
    cuda::relu_conv_bn_backward(storage, a, current.stream(), allocate);
  }
  void update_running_stats(Storage storage, const std::vector<RunningStats>& running, const double* moments,
                            int64_t channels, const RunningUpdate& update) {
    cuda::update_running_stats(storage, running, moments, channels, update, current.stream());
  }
};

// item: bytes of a number of a state; sizes: H, W of every input
std::string cell_misfit_op(int64_t device, const Ints& encoded, int64_t channels, const Ints& sizes, int64_t item) {
  Storage storage = item == 8 ? Storage::Double : item == 4 ? Storage::Float : Storage::BFloat16;
  return cell_misfit(storage, Cell(encoded, 1, channels, true, 0, sizes), int(device));
}
std::string cuda_missing_op(int64_t device) {
#ifdef RFDARTS_EMULATION
  return missing(int(device), "9.0");
#else
  if (!aoti_torch_get_current_cuda_stream) return "this torch was built without CUDA";
  return missing(int(device), RFDARTS_CUDA_ARCHS);
#endif
}

#ifdef RFDARTS_EMULATION
// capability times 10, bytes of shared memory of a multiprocessor and of a block, image, allocation; of each device
void emulate_op(const Ints& numbers) {
  std::vector<emulation::Device> devices;
  for (size_t i = 0; i + 5 <= numbers.size(); i += 5) {
    const int64_t* n = &numbers[i];
    devices.push_back({int(n[0] / 10), int(n[0] % 10), int(n[1]), int(n[2]), 1 << 10, n[3] != 0, n[4]});
  }
  emulation::emulate(devices);
}
int64_t last_error_op() { return cudaGetLastError(); }
void shuffle_op(bool on) { emulation::shuffle(on); }
void record_op(bool on) { emulation::record(on); }
std::string recorded_op() { return emulation::recorded(); }
#else
std::string cuda_archs_op() { return RFDARTS_CUDA_ARCHS; }
#endif
}  // namespace
}  // namespace rfdarts::cuda

#ifdef RFDARTS_EMULATION
STABLE_TORCH_LIBRARY(rfdarts_emulated, m) {
  define_shared_ops(m);
  m.def("emulate(int[] devices) -> ()");
  m.def("last_error() -> int");
  m.def("shuffle(bool on) -> ()");
  m.def("record(bool on) -> ()");
  m.def("recorded() -> str");
#else
STABLE_TORCH_LIBRARY_FRAGMENT(rfdarts, m) {
  m.def("cuda_archs() -> str");
#endif
  m.def("cuda_missing(int device) -> str");
  m.def("cell_misfit(int device, int[] cell, int channels, int[] sizes, int item) -> str");
}
#ifdef RFDARTS_EMULATION
STABLE_TORCH_LIBRARY_IMPL(rfdarts_emulated, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(rfdarts, CUDA, m) {
#endif
  rfdarts::Ops<rfdarts::cuda::Cuda>::implement(m);
}
#ifdef RFDARTS_EMULATION
STABLE_TORCH_LIBRARY_IMPL(rfdarts_emulated, CompositeExplicitAutograd, m) {
  m.impl("emulate", TORCH_BOX(&rfdarts::cuda::emulate_op));
  m.impl("last_error", TORCH_BOX(&rfdarts::cuda::last_error_op));
  m.impl("shuffle", TORCH_BOX(&rfdarts::cuda::shuffle_op));
  m.impl("record", TORCH_BOX(&rfdarts::cuda::record_op));
  m.impl("recorded", TORCH_BOX(&rfdarts::cuda::recorded_op));
#else
STABLE_TORCH_LIBRARY_IMPL(rfdarts, CompositeExplicitAutograd, m) {
  m.impl("cuda_archs", TORCH_BOX(&rfdarts::cuda::cuda_archs_op));
#endif
  m.impl("cuda_missing", TORCH_BOX(&rfdarts::cuda::cuda_missing_op));
  m.impl("cell_misfit", TORCH_BOX(&rfdarts::cuda::cell_misfit_op));
}
#ifndef RFDARTS_EMULATION
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__cuda(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
#endif
