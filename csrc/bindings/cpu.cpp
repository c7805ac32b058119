// The ops for CPU tensors, on pooled memory. With RFDARTS_EMULATION: those of one emulated instruction set, as a
// library of its own.
#ifndef RFDARTS_EMULATION
#include <Python.h>
#endif

#include <algorithm>
#include <atomic>
#include <functional>

#include "bindings/ops.h"
#include "core/memory.h"
#include "cpu/cell.h"

namespace rfdarts {
namespace {

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

struct Cpu {
  static constexpr DTypes dtypes = {ScalarType::Float, ScalarType::Double};
  static constexpr int64_t largest_stride = INT64_MAX;
  // nodes that a convolution reads are dense
  static constexpr bool concat_views = false;
  static ScalarType branch_dtype(const Tensor& x, bool bfloat16) {
    return bfloat16 && x.scalar_type() == ScalarType::Float ? ScalarType::BFloat16 : x.scalar_type();
  }
  static void check_products(const Tensor& x, bool bfloat16_products, const Ints& channels) {
    if (!bfloat16_products) return;
    if (!multiplies_bfloat16()) refuse("bfloat16_products", "false without the instruction set avx512_bf16", "true");
    if (x.scalar_type() != ScalarType::Float) refuse("bfloat16_products", "float32 inputs", text(x.scalar_type()));
    for (int64_t c : channels)
      if (c % 4) refuse("bfloat16_products", "channels in fours", text(channels));
  }
  static void check(const ReLUConvBNArguments&) {}

  ScalarType dtype;
  std::vector<void*> blocks;
  Allocate allocate = [this](int64_t bytes) { return blocks.emplace_back(pool_take(bytes)); };

  explicit Cpu(const Tensor& x) : dtype(x.scalar_type()) {}
  ~Cpu() {
    for (void* block : blocks) pool_give(block);
  }
  static Tensor empty(const Ints& sizes, const Ints& strides, ScalarType dtype, Lifetime lifetime = Lifetime::State) {
    int64_t bytes = dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
    for (int64_t size : sizes) bytes *= size;
    return torch::stable::from_blob(pool_take(bytes, lifetime), sizes, strides,
                                    torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype,
                                    [](void* p) { pool_give(p); });
  }
  static Tensor empty(const Ints& sizes, ScalarType dtype) {
    Ints strides(sizes.size(), 1);
    for (size_t i = sizes.size() - 1; i > 0; i--) strides[i - 1] = strides[i] * sizes[i];
    return empty(sizes, strides, dtype);
  }
  Tensor empty_state(int64_t n, int64_t c, int64_t h, int64_t w) const {
    return empty({n, c, h, w}, {h * w * c, 1, w * c, c}, dtype);
  }
  Tensor empty_branch_outputs(int64_t size, ScalarType dtype) const {
    return empty({size}, {1}, dtype, Lifetime::BranchOutputs);
  }

  void cell_forward(Storage storage, const Cell& cell, const CellForward& data) {
    cpu::cell_forward(storage, cell, data, parallel, allocate);
  }
  void cell_branch_outputs(Storage storage, const Cell& cell, const CellForward& data) {
    cpu::cell_branch_outputs(storage, cell, data, parallel, allocate);
  }
  void cell_backward(Storage storage, const Cell& cell, const CellBackward& data) {
    cpu::cell_backward(storage, cell, data, parallel, allocate);
  }
  void relu_conv_bn_forward(Storage storage, const ReLUConvBN& data) {
    cpu::relu_conv_bn_forward(storage, data, parallel);
  }
  void relu_conv_bn_backward(Storage storage, const ReLUConvBN& data) {
    cpu::relu_conv_bn_backward(storage, data, parallel);
  }
  void batch_norm_forward(Storage storage, const BatchNorm& data) {
    cpu::batch_norm_forward(storage, data, parallel);
  }
  void batch_norm_backward(Storage storage, const BatchNorm& data) {
    cpu::batch_norm_backward(storage, data, parallel);
  }
  void update_running_stats(Storage storage, const std::vector<RunningStats>& running, const double* moments,
                            int64_t channels, const RunningUpdate& update) {
    auto all = [&]<class A>() {
      const double *mean = moments, *variance = moments + running.size() * channels;
      for (const RunningStats& r : running) {
        for (int64_t c = 0; c < channels; c++)
          update(static_cast<A*>(r.mean)[c], static_cast<A*>(r.variance)[c], *mean++, *variance++);
        ++*r.num_batches;
      }
    };
    storage == Storage::Double ? all.operator()<double>() : all.operator()<float>();
  }
};

std::string cell_text(const Ints& encoded) { return CellDescription(encoded).text(); }
std::string isa() { return isa_name(); }
std::string best_isa() { return isa_best(); }
std::string missing_amx() { return amx_missing(); }
}  // namespace
}  // namespace rfdarts

#ifdef RFDARTS_EMULATION
#define RFDARTS_LIBRARY rfdarts_emulated_cpu
#else
#define RFDARTS_LIBRARY rfdarts
#endif
STABLE_TORCH_LIBRARY(RFDARTS_LIBRARY, m) {
  define_shared_ops(m);
  m.def("cell_text(int[] cell) -> str");
  m.def("isa() -> str");
  m.def("isa_best() -> str");
  m.def("amx_missing() -> str");
  m.def("pool_release() -> ()");
  m.def("pool_cached() -> int");
  m.def("pool_poison(bool on) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(RFDARTS_LIBRARY, CPU, m) {
  rfdarts::Ops<rfdarts::Cpu>::implement(m);
  rfdarts::Ops<rfdarts::Cpu>::implement_batch_norm(m);
}
STABLE_TORCH_LIBRARY_IMPL(RFDARTS_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("cell_text", TORCH_BOX(&rfdarts::cell_text));
  m.impl("isa", TORCH_BOX(&rfdarts::isa));
  m.impl("isa_best", TORCH_BOX(&rfdarts::best_isa));
  m.impl("amx_missing", TORCH_BOX(&rfdarts::missing_amx));
  m.impl("pool_release", TORCH_BOX(&rfdarts::pool_release));
  m.impl("pool_cached", TORCH_BOX(&rfdarts::pool_cached));
  m.impl("pool_poison", TORCH_BOX(&rfdarts::pool_poison));
}

#ifndef RFDARTS_EMULATION
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
#endif
