// All kernels for states and branch outputs stored as __half.
#include "cuda/run_backward.h"
#include "cuda/run_forward.h"

namespace rfdarts::cuda {
template void run_forward<__half>(const Cell&, const CellForward&, bool, cudaStream_t, const Allocate&);
template void run_backward<__half>(const Cell&, const CellBackward&, cudaStream_t, const Allocate&);
}  // namespace rfdarts::cuda
