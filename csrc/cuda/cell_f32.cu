// All kernels for states and branch outputs stored as float.
#include "cuda/cell_backward.h"
#include "cuda/cell_forward.h"

template struct rfdarts::cuda::CellRun<float>;
