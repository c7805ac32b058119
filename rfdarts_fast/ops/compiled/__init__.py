"""The backends in C++ and CUDA C++; the kernels are in csrc."""

from rfdarts_fast.ops.compiled.cpu import CPUBackend
from rfdarts_fast.ops.compiled.cuda import CUDABackend
from rfdarts_fast.ops.contract import register_backend

register_backend(CPUBackend())
register_backend(CUDABackend())
