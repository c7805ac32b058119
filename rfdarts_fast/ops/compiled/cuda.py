"""The CUDA engine for mixed ops and cells' preprocessing with frozen convolutions: the kernels of csrc/cuda
under the ops of `cpu`.

States and branch outputs are float32, bfloat16, float16 or float64; arithmetic, statistics, parameters and
their gradients are float32 (float64 for float64). The same inputs give the same bits: no atomics. Launches
kernels only, no host synchronisation, no branch on data, so that a step can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rfdarts_fast.ops.compiled import cpu, conv_bn
from rfdarts_fast.ops.backend import Memory
from rfdarts_fast.ops.reference import Edge, Layer

# of csrc/cuda/params.h
MAX_INCOMING = 8
MAX_BRANCHES = 48
# of csrc/cuda/conv_bn.cu
MAX_PIXELS = 1 << 30

STORAGE = torch.float32, torch.float64, torch.bfloat16, torch.float16


_missing: str | None = cpu.status().get("reason")  # type: ignore[assignment]
if _missing is None:
    try:
        importlib.import_module("rfdarts_fast.ops._cuda")
    except ImportError as error:
        _missing = f"the CUDA kernels were not built or do not load ({error})"


@functools.cache
def missing() -> str | None:
    """Why the engine cannot run on this machine, or None."""
    return _missing if _missing is not None else torch.ops.rfdarts.cuda_missing() or None


def status() -> dict[str, str | bool]:
    """What is built and whether it runs: `built`, `archs`, and `reason` where it does not run."""
    found: dict[str, str | bool] = {"built": _missing is None}
    if _missing is None:
        found["archs"] = torch.ops.rfdarts.cuda_archs()
    reason = missing()
    if reason is not None:
        found["reason"] = reason
    return found


def storage_dtype(x: Tensor) -> torch.dtype:
    """The dtype that states are kept in: that of `x`, or of autocast where it is on."""
    kind = x.device.type
    if x.dtype == torch.float32 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def parameter_dtype(storage: torch.dtype) -> torch.dtype:
    return torch.float64 if storage == torch.float64 else torch.float32


def why_not(edges: Sequence[Edge], inputs: Sequence[Tensor]) -> str | None:
    """Why the engine cannot compute this cell, or None if it can."""
    for x in inputs:
        if x.device.type != "cuda" or x.device != inputs[0].device:
            return "inputs that are not all on one CUDA device"
    reason = missing()
    return reason if reason is not None else unsupported(edges, inputs)


def unsupported(edges: Sequence[Edge], inputs: Sequence[Tensor]) -> str | None:
    """What the kernels cannot compute in this cell, on any machine, or None."""
    storage = storage_dtype(inputs[0])
    if storage not in STORAGE:
        return f"no kernels for dtype {storage}"
    if any(storage_dtype(x) != storage for x in inputs):
        return "inputs of different dtypes"
    reason = cpu.unsupported(edges, inputs, parameter_dtype(storage))
    if reason is not None:
        return reason
    channels = edges[0].channels // edges[0].K
    if edges[0].K not in (1, 2, 4, 8):
        return f"no kernels for K={edges[0].K}"
    if channels > 256:
        return f"no kernels for {channels} mixed channels"
    # states: inputs and nodes; the last node is no input of another
    states, covered = len(inputs), 0
    while covered < len(edges):
        covered += states
        states += 1
    if states - 1 > MAX_INCOMING or (states - 1) * len(edges[0].primitives) > MAX_BRANCHES:
        return f"no kernels for {len(edges)} edges with {len(edges[0].primitives)} primitives each"
    return None


def mixed_cell(
    edges: Sequence[Edge],
    inputs: Sequence[Tensor],
    weights: Tensor,
    edge_weights: Tensor | None = None,
    memory: Memory = "fast",
    concatenate: bool = False,
) -> list[Tensor]:
    """The engine behind `rfdarts_fast.ops.mixed_cell`, for cells that `why_not` has nothing against.

    Under autocast, float32 inputs are cast to its dtype, and so are the states that come out. Concatenated,
    the nodes are views of one tensor, so that it costs nothing. Branch outputs are kept in the dtype of the
    states, so memory "bfloat16" is "fast" here.

    Raises:
        RuntimeError, ValueError: as `cpu.mixed_cell`.
    """
    storage = storage_dtype(inputs[0])
    parameters = parameter_dtype(storage)
    edge_weights = None if edge_weights is None else edge_weights.to(parameters)
    states = [x.to(storage) for x in inputs]
    weights = weights.to(parameters)
    memory = "fast" if memory == "bfloat16" else memory
    return cpu.mixed_cell(edges, states, weights, edge_weights, memory=memory, concatenate=concatenate)


def why_not_conv(x: Tensor, convs: tuple[nn.Conv2d, ...], norm: nn.Module) -> str | None:
    """Why the engine cannot compute ReLU, these convolutions and `norm`, or None if it can."""
    if x.device.type != "cuda":
        return f"no CUDA kernels for device {x.device.type}"
    reason = missing()
    return reason if reason is not None else unsupported_conv(x, convs, norm)


def unsupported_conv(x: Tensor, convs: tuple[nn.Conv2d, ...], norm: nn.Module) -> str | None:
    """What the kernels cannot compute of these, on any machine, or None."""
    storage = storage_dtype(x)
    if storage not in STORAGE:
        return f"no kernels for dtype {storage}"
    reason = conv_bn.unsupported_conv(x, convs, norm, parameter_dtype(storage))
    if reason is not None:
        return reason
    if len({conv.out_channels for conv in convs}) > 1:
        return "a FactorizedReduce of two different halves"
    if x.numel() // x.shape[1] >= MAX_PIXELS:
        return f"an input of {x.numel() // x.shape[1]} pixels"
    return None


def relu_conv_bn(
    x: Tensor, convs: tuple[nn.Conv2d, ...], norm: nn.BatchNorm2d, memory: Memory = "fast"
) -> Tensor:
    """The engine behind `rfdarts_fast.ops.relu_conv_bn`, for what `why_not_conv` has nothing against.

    Under autocast, a float32 x is cast to its dtype, in which the result is.

    Raises:
        ValueError: as `conv_bn.relu_conv_bn`.
    """
    return conv_bn.relu_conv_bn(x.to(storage_dtype(x)), convs, norm, memory)


def relu_conv_bns(x: Tensor, layers: Sequence[Layer], memory: Memory = "fast") -> list[Tensor]:
    """`relu_conv_bn` for each of several layers that read x."""
    return [relu_conv_bn(x, *layer, memory) for layer in layers]
