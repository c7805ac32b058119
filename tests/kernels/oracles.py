"""The oracle, plain PyTorch, and backends as tests call them."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, library
from torch.utils._pytree import tree_leaves, tree_map_only

from rfdarts_fast.ops import CellCall, Memory, reference, use_backend
from rfdarts_fast.ops.dispatch import cell_call
from rfdarts_fast.ops.dtypes import parameter_dtype


@contextlib.contextmanager
def fresh_memory_is_nan(on: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(on)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


class Oracle:
    """Plain PyTorch: in float64 on the CPU the truth, in another dtype what kernels are measured by."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    def parameter_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def cell(self, edges, inputs, op_weights, edge_weights=None) -> list[Tensor]:
        # or FactorizedReduce would ask for a backend
        with use_backend("reference"):
            return reference.mixed_cell(edges, inputs, op_weights, edge_weights)

    def poison(self, on: bool) -> contextlib.AbstractContextManager[None]:
        # a pool's backward on a GPU has no deterministic algorithm
        return fresh_memory_is_nan(False)

    def layers(self, x, layers) -> list[Tensor]:
        return [reference.relu_conv_bn(x, *layer) for layer in layers]

    def batch_norm(self, x, norm, relu) -> Tensor:
        return reference.batch_norm(x, norm, relu)


class Kernels:
    """A backend on a device."""

    def __init__(self, backend: Any, device: str = "cpu") -> None:
        self.backend, self.name, self.device = backend, backend.name, device

    def parameter_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return parameter_dtype(dtype)

    def call(
        self, edges, inputs, op_weights, edge_weights=None, memory: Memory = "fast", concat: bool = False
    ) -> CellCall:
        call = cell_call(edges, inputs, op_weights, edge_weights, memory, concat)
        assert isinstance(call, CellCall), call
        return call

    def cell(self, *arguments, **options) -> list[Tensor]:
        call = self.call(*arguments, **options)
        assert self.backend.unsupported_cell(call) is None
        return self.backend.mixed_cell(call)

    def layers(self, x: Tensor, layers: Sequence[Any], memory: Memory = "fast") -> list[Tensor]:
        assert all(self.backend.unsupported_layer(x, layer) is None for layer in layers)
        return self.backend.relu_conv_bns(x, layers, memory)

    def batch_norm(self, x: Tensor, norm: Any, relu: bool) -> Tensor:
        assert self.backend.unsupported_batch_norm(x, norm) is None
        return self.backend.batch_norm(x, norm, relu)

    def poison(self, on: bool) -> contextlib.AbstractContextManager[None]:
        """Fills fresh memory with NaNs."""
        return fresh_memory_is_nan(on)

    def floors(self, dtype: torch.dtype) -> tuple[float, float | None]:
        """Errors that plain PyTorch need not share, in eps of the norm and of the largest entry; None where
        no single entry is measured: rounding takes some to the other side of a kink."""
        exact = dtype == torch.float64
        if self.device == "cuda":
            return 100 if exact else 4, None
        return (100, 100) if exact else (0.5, None)

    def schedules(self) -> Iterator[None]:
        """Runs in which threads come in another order; no result may depend on it."""
        yield


class CPUKernels(Kernels):
    def floors(self, dtype: torch.dtype) -> tuple[float, float | None]:
        # sums are in float32
        return (100, 100) if dtype == torch.float64 else (8, 8)

    @contextlib.contextmanager
    def poison(self, on: bool) -> Iterator[None]:
        self.backend._ops.pool_poison(on)
        try:
            with fresh_memory_is_nan(on):
                yield
        finally:
            self.backend._ops.pool_poison(False)

    def schedules(self) -> Iterator[None]:
        try:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                yield
        finally:
            torch.set_num_threads(1)


class GPUKernels(Kernels):
    def schedules(self) -> Iterator[None]:
        for _ in range(2):
            yield


class RecordedOps:
    """A compiled backend's ops; the last call of each that takes tensors is kept as (overload, arguments,
    options).

    Attributes:
        backend: a backend of these ops.
    """

    def __init__(self, backend: Any) -> None:
        self._ops, self.calls = backend._ops, {}
        self.backend = type(backend)(self)

    def __getattr__(self, name: str) -> Any:
        op = getattr(self._ops, name)

        def call(*arguments: Any, **options: Any) -> Any:
            if any(isinstance(x, Tensor) for x in tree_leaves((arguments, options))):
                # some are changed in place
                kept = tree_map_only(Tensor, lambda x: x.detach().clone(), (arguments, options))
                self.calls[name] = (op.default, *kept)
            return op(*arguments, **options)

        return call

    def opcheck(self, *names: str) -> None:
        """Checks that just these were called, the aliases of each, and its fake's shapes, strides, dtypes."""
        assert self.calls.keys() == {*names}
        for op, arguments, options in self.calls.values():
            library.opcheck(op, arguments, options, test_utils=("test_schema", "test_faketensor"))


def over(*rows: tuple[str, Sequence[torch.dtype], dict[str, dict[str, Any]]]):
    """Parameters `backend`, `dtype` and `options` of rows (backend, dtypes, {name of a case: options})."""
    parameters = [
        pytest.param(backend, dtype, options, id=f"{backend}-{name}-{str(dtype).removeprefix('torch.')}")
        for backend, dtypes, cases in rows
        for dtype in dtypes
        for name, options in cases.items()
    ]
    return pytest.mark.parametrize(("backend", "dtype", "options"), parameters, indirect=["backend"])


def grid(**values: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """{name of a case: options} for every choice of one value each."""
    rows = [dict(zip(values, row, strict=True)) for row in itertools.product(*values.values())]
    return {", ".join(f"{name} {value}" for name, value in row.items()): row for row in rows}


def on(*backends: str):
    """Runs a test with each `backend`."""
    return pytest.mark.parametrize("backend", backends, indirect=True)


EVERYWHERE = on("cpu", "emulated", "triton", "gpu")
