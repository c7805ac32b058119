"""Step time and memory of a supernet here: reference, torch.compile and the compiled kernels."""

from rfdarts_fast.bench.run import Result, run, table

__all__ = ["Result", "run", "table"]
