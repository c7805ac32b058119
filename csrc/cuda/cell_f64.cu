// All kernels for states and branch outputs stored as double.
#include "cuda/cell_backward.h"
#include "cuda/cell_forward.h"

template struct rfdarts::cuda::CellRun<double>;
