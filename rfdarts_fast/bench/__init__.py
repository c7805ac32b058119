"""Step time and memory of a supernet here: reference, torch.compile and the compiled kernels."""

from rfdarts_fast.bench.run import Result, run, table
from rfdarts_fast.bench.variants import BUDGET, is_nasbench201

__all__ = ["BUDGET", "Result", "is_nasbench201", "run", "table"]
