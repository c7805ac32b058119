"""The user's choice of a backend for mixed ops: `use_backend`, or the variable RFDARTS_BACKEND."""

from __future__ import annotations

import os
import warnings
from typing import get_args

from rfdarts_fast.ops.budget import Budget
from rfdarts_fast.ops.contract import Memory, backends

_warned: set[str] = set()


class BackendError(RuntimeError):
    """A backend that was asked for by name and cannot run; the message says why."""


def backend_names() -> tuple[str, ...]:
    """The names that `use_backend` takes."""
    return ("auto", "reference", *backends())


class use_backend:
    """Chooses the backend for mixed ops, at once and, in a `with` statement, until its end.

    Args:
        name: "auto" takes the first that can run, and says once why others cannot; "reference" is plain
            PyTorch; "cpu" and "cuda" (compiled C++), "triton" and every other registered backend raise
            BackendError where they cannot run.
        memory: what a backend keeps between forward and backward: "fast" all branch outputs, "bfloat16"
            those rounded to half the bytes, "recompute" node states only. The gradients of "fast" and
            "recompute" are the same bit for bit.
        memory_budget: bytes of outputs that all cells and their preprocessing may keep together; what goes
            beyond is computed again, see `Budget`, and comes out the same bit for bit. None: no limit. (Other
            tensors take memory beside.) A Budget goes on with what it has seen.

    Raises:
        ValueError: for a name or mode that does not exist, or a negative budget.
    """

    # the variable is checked at the first use, so that importing the package never fails
    name: str = os.environ.get("RFDARTS_BACKEND", "auto")
    memory: Memory = "fast"
    budget: Budget | None = None

    def __init__(self, name: str, memory: Memory = "fast", memory_budget: int | Budget | None = None) -> None:
        if name not in backend_names():
            raise ValueError(f"backend: expected one of {', '.join(backend_names())}, got {name!r}")
        if memory not in get_args(Memory):
            raise ValueError(f"memory: expected one of {', '.join(get_args(Memory))}, got {memory!r}")
        if isinstance(memory_budget, int):
            memory_budget = Budget(memory_budget)
        self._before = use_backend.name, use_backend.memory, use_backend.budget
        use_backend.name, use_backend.memory = name, memory
        use_backend.budget = memory_budget

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *exception: object) -> None:
        use_backend.name, use_backend.memory, use_backend.budget = self._before


def backend_name() -> str:
    """The name in force; BackendError if RFDARTS_BACKEND holds one that does not exist."""
    if use_backend.name not in backend_names():
        raise BackendError(
            f"RFDARTS_BACKEND: expected one of {', '.join(backend_names())}, got {use_backend.name!r}"
        )
    return use_backend.name


def fall_back(reason: str, expected: bool = False) -> None:
    """Raises BackendError if a backend was asked for by name; else warns, once, unless `expected`."""
    if use_backend.name != "auto":
        raise BackendError(f"backend: {use_backend.name} cannot run: {reason}")
    if not expected and reason not in _warned:
        _warned.add(reason)
        warnings.warn(f"mixed ops run on the slow PyTorch reference: {reason}", RuntimeWarning, stacklevel=5)
