"""The compiled CUDA backend: the kernels of csrc/cuda under the same ops as the CPU's.

States and branch outputs are float32, bfloat16, float16 or float64; arithmetic, statistics, parameters and
their gradients are float32 (float64 for float64). The same inputs give the same bits: no atomics. Launches
kernels only, no host synchronisation, no branch on data, so that a step can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence

import torch
from torch import Tensor

from rfdarts_fast.ops.compiled import cpu
from rfdarts_fast.ops.compiled.base import CompiledBackend, unsupported_layer
from rfdarts_fast.ops.contract import CellCall, Memory, ReLUConvBNLayer
from rfdarts_fast.ops.dtypes import parameter_dtype, storage_dtype

# of csrc/cuda/params.h
MAX_INCOMING = 8
MAX_BRANCHES = 48
MAX_MIXED_CHANNELS = 256
# of csrc/cuda/conv_bn.cu
MAX_PIXELS = 1 << 30

STORAGE = torch.float32, torch.float64, torch.bfloat16, torch.float16


_not_loaded = cpu.unavailable_reason()
if _not_loaded is None:
    try:
        importlib.import_module("rfdarts_fast.ops._cuda")
    except ImportError as error:
        _not_loaded = f"the CUDA kernels were not built or do not load ({error})"


@functools.cache
def unavailable_reason() -> str | None:
    """The reason why the kernels cannot run on this machine, or None."""
    return _not_loaded if _not_loaded is not None else torch.ops.rfdarts.cuda_missing() or None


class CUDABackend(CompiledBackend):
    """Under autocast, float32 inputs are cast to its dtype, and so are the states that come out.

    Concatenated, the nodes are views of one tensor, so that it costs nothing. Branch outputs are kept in the
    dtype of the states, so memory "bfloat16" is "fast".
    """

    name = "cuda"
    priority = 20
    devices = frozenset({"cuda"})

    def storage_dtype(self, x: Tensor) -> torch.dtype:
        return storage_dtype(x)

    def memory_of(self, memory: Memory, inputs: Sequence[Tensor]) -> Memory:
        return "fast" if memory == "bfloat16" else memory

    def groups(self, layers: Sequence[ReLUConvBNLayer]) -> list[list[int]]:
        """One layer at a time."""
        return [[i] for i in range(len(layers))]

    def unsupported_cell(self, call: CellCall) -> str | None:
        for x in call.inputs:
            if x.device.type != "cuda" or x.device != call.inputs[0].device:
                return "inputs that are not all on one CUDA device"
        return unavailable_reason() or unsupported_anywhere(call)

    def unsupported_layer(self, x: Tensor, layer: ReLUConvBNLayer) -> str | None:
        if x.device.type != "cuda":
            return f"no CUDA kernels for device {x.device.type}"
        return unavailable_reason() or unsupported_layer_anywhere(x, layer)

    def status(self) -> dict[str, str | bool]:
        """`built`; `archs`, the compute capabilities it was built for; `reason` where it does not run."""
        status: dict[str, str | bool] = {"built": _not_loaded is None}
        if _not_loaded is None:
            status["archs"] = torch.ops.rfdarts.cuda_archs()
        reason = unavailable_reason()
        if reason is not None:
            status["reason"] = reason
        return status


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
    if plan.nasbench201:
        return "no GPU kernels for the cells of NAS-Bench-201"
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
