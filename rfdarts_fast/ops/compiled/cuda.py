"""The compiled CUDA backend: the kernels of csrc/cuda under the same ops as the CPU's.

States and branch outputs are float32, bfloat16, float16 or float64; arithmetic, statistics, parameters and
their gradients are float32 (float64 for float64). The same inputs give the same bits: no atomics. Launches
kernels only, no host synchronisation, no branch on data, so that a step can be captured in a CUDA graph;
but for synchronised BatchNorm in several processes, which waits for the number of images of all.
Gradients of float16 states are float16: train with bfloat16, or scale the loss (torch.amp.GradScaler), or
small ones become 0.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from rfdarts_fast.ops.compiled import cpu
from rfdarts_fast.ops.compiled.base import CompiledBackend, unsupported_layer
from rfdarts_fast.ops.contract import CellCall, CellPlan, Memory, ReLUConvBNLayer, cuda_status
from rfdarts_fast.ops.dtypes import parameter_dtype, storage_dtype

# of csrc/cuda/params.h
MAX_INCOMING = 8
MAX_BRANCHES = 48
MAX_MIXED_CHANNELS = 256
# of csrc/cuda/cell.h
MAX_LAYERS = 8
# of csrc/cuda/relu_conv_bn.cu
MAX_PIXELS = 1 << 30

STORAGE = torch.float32, torch.float64, torch.bfloat16, torch.float16


_not_loaded = cpu.unavailable_reason()
if _not_loaded is None:
    try:
        importlib.import_module("rfdarts_fast.ops._cuda")
    except ImportError as error:
        _not_loaded = f"the CUDA kernels were not built or do not load ({error})"
    else:
        # what asks a device came last
        if not hasattr(torch.ops.rfdarts, "cell_misfit"):
            _not_loaded = "the CUDA kernels are another version's: build them again"


@functools.cache
def unavailable_reason(device: int) -> str | None:
    """The reason why the kernels cannot run on the CUDA device of this number, or None."""
    return _not_loaded if _not_loaded is not None else torch.ops.rfdarts.cuda_missing(device) or None


class _Ops:
    """The ops, with torch's own error where memory runs out: its type does not pass torch's stable ABI."""

    def __init__(self, ops: Any) -> None:
        self._ops = ops

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(name)
        op = getattr(self._ops, name)

        def call(*arguments: Any, **options: Any) -> Any:
            try:
                return op(*arguments, **options)
            except MemoryError as error:
                raise torch.OutOfMemoryError(str(error)) from None

        call.default = getattr(op, "default", None)  # type: ignore[attr-defined]
        # found without __getattr__ from now on
        setattr(self, name, call)
        return call


class CUDABackend(CompiledBackend):
    """Under autocast, float32 inputs are cast to its dtype, and so are the states that come out.

    Concatenated, the nodes are views of one tensor, so that it costs nothing. Branch outputs are kept in the
    dtype of the states, so memory "bfloat16" is "fast". Where memory runs out: torch.OutOfMemoryError.
    """

    name = "cuda"
    priority = 20
    devices = frozenset({"cuda"})

    def __init__(self, ops: Any = None) -> None:
        super().__init__(_Ops(torch.ops.rfdarts if ops is None else ops))
        self._misfits: WeakKeyDictionary[CellPlan, dict[Any, str]] = WeakKeyDictionary()

    def storage_dtype(self, x: Tensor) -> torch.dtype:
        return storage_dtype(x)

    def memory_of(self, memory: Memory, inputs: Sequence[Tensor]) -> Memory:
        return "fast" if memory == "bfloat16" else memory

    def groups(self, layers: Sequence[ReLUConvBNLayer]) -> list[list[int]]:
        """Those of `CompiledBackend.groups`, up to MAX_LAYERS together."""
        return [
            group[first : first + MAX_LAYERS]
            for group in super().groups(layers)
            for first in range(0, len(group), MAX_LAYERS)
        ]

    def unsupported_cell(self, call: CellCall) -> str | None:
        device = call.inputs[0].device
        for x in call.inputs:
            if x.device.type != "cuda" or x.device != device:
                return "inputs that are not all on one CUDA device"
        return (
            unavailable_reason(device.index) or unsupported_anywhere(call) or self.misfit(call, device.index)
        )

    def unsupported_layer(self, x: Tensor, layer: ReLUConvBNLayer) -> str | None:
        if x.device.type != "cuda":
            return f"no CUDA kernels for device {x.device.type}"
        return unavailable_reason(x.device.index) or unsupported_layer_anywhere(x, layer)

    def misfit(self, call: CellCall, device: int) -> str | None:
        """The reason why the blocks of the CUDA device of this number have no room for the cell, or None."""
        plan, item = call.plan, storage_dtype(call.inputs[0]).itemsize
        sizes = [side for x in call.inputs for side in x.shape[2:]]
        kept, key = self._misfits.setdefault(plan, {}), (device, item, *sizes)
        if key not in kept:
            kept[key] = self._ops.cell_misfit(device, plan.encoded, plan.channels, sizes, item)
        return kept[key] or None

    def status(self) -> dict[str, str | bool]:
        """`built`; `archs`, the compute capabilities it was built for; `reason` where no device runs it, or
        that of each which does not."""
        status: dict[str, str | bool] = {"built": _not_loaded is None}
        if _not_loaded is None:
            status["archs"] = torch.ops.rfdarts.cuda_archs()
        return status | cuda_status(unavailable_reason)


def unsupported_anywhere(call: CellCall) -> str | None:
    """The reason why the kernels can take the call on no machine, or None."""
    plan, storage = call.plan, storage_dtype(call.inputs[0])
    if storage not in STORAGE:
        return f"no kernels for dtype {storage}"
    if any(storage_dtype(x) != storage for x in call.inputs):
        return "inputs of different dtypes"
    reason = plan.unsupported_reason(call.inputs, parameter_dtype(storage))
    if reason is not None:
        return reason
    if plan.K not in (1, 2, 4, 8):
        return f"no kernels for K={plan.K}"
    if plan.mixed_channels > MAX_MIXED_CHANNELS:
        return f"no kernels for {plan.mixed_channels} mixed channels"
    # the last node is no input of another
    sources = plan.inputs + plan.nodes - 1
    if sources > MAX_INCOMING or sources * plan.primitives > MAX_BRANCHES:
        return f"no kernels for {len(plan.edges)} edges with {plan.primitives} primitives each"
    return None


def unsupported_layer_anywhere(x: Tensor, layer: ReLUConvBNLayer) -> str | None:
    """The reason why the kernels can take the layer on no machine, or None."""
    storage = storage_dtype(x)
    if storage not in STORAGE:
        return f"no kernels for dtype {storage}"
    reason = unsupported_layer(x, layer, parameter_dtype(storage))
    if reason is not None:
        return reason
    if len({conv.out_channels for conv in layer.convs}) > 1:
        return "a FactorizedReduce of two different halves"
    if x.numel() // x.shape[1] >= MAX_PIXELS:
        return f"an input of {x.numel() // x.shape[1]} pixels"
    return None
