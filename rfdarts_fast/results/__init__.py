"""Finished and running runs as arrays: `load("runs/search").metrics["val/accuracy"]`."""

from rfdarts_fast.results.run_results import RunResults, load

__all__ = ["RunResults", "load"]
