"""The kernels run on the GPU if there is one, else on the CPU, statement by statement.

This folder is not called triton: pytest would import it under that name.
"""

import dataclasses
import importlib.util
import os
import sys

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SWITCH = "TRITON_INTERPRET"
# deterministic matrix products
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def load_interpreted():
    """Imports triton for the interpreter; the variable is set no longer than that, for others' sake."""
    if "triton" in sys.modules and os.environ.get(SWITCH) != "1":
        return "triton was loaded before, without its interpreter"
    os.environ[SWITCH], before = "1", os.environ.get(SWITCH)
    import triton.runtime.interpreter as interpreter

    import rfdarts_fast.ops.triton.autograd  # noqa: F401

    if before is None:
        del os.environ[SWITCH]
    # checks of every index for overflow take half of the time; one test has them on
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    return None


MISSING = "needs triton" if importlib.util.find_spec("triton") is None else None
if MISSING is None and DEVICE == "cpu":
    MISSING = load_interpreted()
