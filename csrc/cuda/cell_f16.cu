// All kernels for states and branch outputs stored as __half.
#include "cuda/cell_backward.h"
#include "cuda/cell_forward.h"

template struct rfdarts::cuda::CellRun<__half>;
