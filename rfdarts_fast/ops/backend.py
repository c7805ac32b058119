"""Which engine computes mixed ops: the user's wish, by `use_backend` or the variable RFDARTS_BACKEND."""

from __future__ import annotations

import os
import warnings
from typing import Literal, get_args

Backend = Literal["auto", "reference", "native", "triton"]
Memory = Literal["fast", "bfloat16", "recompute"]

_told: set[str] = set()


class BackendError(RuntimeError):
    """The backend that was asked for by name cannot run; the message says why."""


class use_backend:
    """Chooses the engine for mixed ops, at once and, in a `with` statement, until its end.

    Args:
        name: "auto" takes the fastest engine that can run and says once why one cannot; "reference" is plain
            PyTorch; "native" (C++ on the CPU, CUDA C++ on a GPU) and "triton" (on a GPU) raise BackendError
            where they cannot run.
        memory: what engines keep between forward and backward: "fast" all branch outputs, "bfloat16"
            those rounded to half the bytes, "recompute" node states only. The gradients of "fast" and
            "recompute" are the same bit for bit.

    Raises:
        ValueError: for a name or mode that does not exist.
    """

    # the variable is checked at the first use, so that importing the package never fails
    name: Backend = os.environ.get("RFDARTS_BACKEND", "auto")  # type: ignore[assignment]
    memory: Memory = "fast"

    def __init__(self, name: Backend, memory: Memory = "fast") -> None:
        if name not in get_args(Backend):
            raise ValueError(f"backend: expected one of {', '.join(get_args(Backend))}, got {name!r}")
        if memory not in get_args(Memory):
            raise ValueError(f"memory: expected one of {', '.join(get_args(Memory))}, got {memory!r}")
        self._before = use_backend.name, use_backend.memory
        use_backend.name, use_backend.memory = name, memory

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *exception: object) -> None:
        use_backend.name, use_backend.memory = self._before


def backend_name() -> Backend:
    """The backend in force; BackendError if RFDARTS_BACKEND names one that does not exist."""
    if use_backend.name not in get_args(Backend):
        raise BackendError(
            f"RFDARTS_BACKEND: expected one of {', '.join(get_args(Backend))}, got {use_backend.name!r}"
        )
    return use_backend.name


def fall_back(reason: str, expected: bool = False) -> None:
    """The fast engine cannot run because of `reason`: BackendError if it was asked for by name; otherwise it
    is told once, unless it was to be expected."""
    if use_backend.name != "auto":
        raise BackendError(f"backend: {use_backend.name} cannot run: {reason}")
    if not expected and reason not in _told:
        _told.add(reason)
        warnings.warn(f"mixed ops run on the slow PyTorch reference: {reason}", RuntimeWarning, stacklevel=4)
