// All kernels for states and branch outputs stored as __nv_bfloat16.
#include "cuda/cell_backward.h"
#include "cuda/cell_forward.h"

template struct rfdarts::cuda::CellRun<__nv_bfloat16>;
