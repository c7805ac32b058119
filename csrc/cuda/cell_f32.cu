// All kernels for states and branch outputs stored as float.
#include "cuda/run_backward.h"
#include "cuda/run_forward.h"

namespace rfdarts::cuda {
template void run_forward<float>(const Cell&, const CellForward&, bool, cudaStream_t, const Allocate&);
template void run_backward<float>(const Cell&, const CellBackward&, cudaStream_t, const Allocate&);
}  // namespace rfdarts::cuda
