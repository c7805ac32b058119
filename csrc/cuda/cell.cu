// Which kernels a cell runs on: one file per storage type has them.
#include "rfdarts/cuda_cell.h"

#include "cuda/port.h"

namespace rfdarts::cuda {

template <class T>
void run_forward(const Cell&, const CellForward&, bool, cudaStream_t, const Allocate&);
template <class T>
void run_backward(const Cell&, const CellBackward&, cudaStream_t, const Allocate&);

namespace {
template <class F>
void with_storage(Storage storage, F&& f) {
  switch (storage) {
    case Storage::Float: return f.template operator()<float>();
    case Storage::Double: return f.template operator()<double>();
    case Storage::BFloat16: return f.template operator()<__nv_bfloat16>();
    case Storage::Half: return f.template operator()<__half>();
  }
}
}  // namespace

void cell_forward(Storage storage, const Cell& cell, const CellForward& data, bool nodes, void* stream,
                  const Allocate& allocate) {
  with_storage(storage,
               [&]<class T>() { run_forward<T>(cell, data, nodes, static_cast<cudaStream_t>(stream), allocate); });
}
void cell_backward(Storage storage, const Cell& cell, const CellBackward& data, void* stream,
                   const Allocate& allocate) {
  with_storage(storage, [&]<class T>() { run_backward<T>(cell, data, static_cast<cudaStream_t>(stream), allocate); });
}

}  // namespace rfdarts::cuda
