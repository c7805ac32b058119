"""The Triton engine for mixed ops with frozen convolutions: for GPUs where the CUDA C++ engine was not built.

Depthwise convolutions, pools, statistics, the weighted sum of a node's branches and all of their gradients
are Triton kernels, each for all edges that leave a state or enter a node; pointwise convolutions are
torch.bmm. States are float32, bfloat16, float16 or float64, in any layout; arithmetic, statistics,
parameters and their gradients float32 (float64 for float64). Nothing waits for the GPU and nothing depends
on data, so that a step can be captured in a CUDA graph, once its kernels are tuned by the first eager calls.

With TRITON_INTERPRET=1 in the environment, the kernels run on the CPU, slowly: for tests.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from rfdarts_fast.ops.backend import Memory
from rfdarts_fast.ops.compiled import cpu
from rfdarts_fast.ops.compiled.cuda import parameter_dtype, storage_dtype
from rfdarts_fast.ops.compiled.plan import Plan, gamma_beta, plan_of, running_moments, training_mode
from rfdarts_fast.ops.reference import Edge
from rfdarts_fast.ops.triton.layout import layout_of, uneven

STORAGE = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@functools.cache
def _cell() -> ModuleType | str:
    """The module with the kernels, imported on first use, or why there is none."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'rfdarts_fast[triton]')"
    try:
        return importlib.import_module("rfdarts_fast.ops.triton.cell")
    except ImportError as error:
        return f"triton does not load ({error})"


def missing() -> str | None:
    """Why the engine cannot run on this machine, or None."""
    return _missing(os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on"))


# asked for every cell of every step
@functools.cache
def _missing(interpreted: bool) -> str | None:
    if interpreted:
        found = _cell()
        return found if isinstance(found, str) else None
    if importlib.util.find_spec("triton") is None:
        return str(_cell())
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"the CUDA device has compute capability {major}.{minor}, 8.0 is needed"
    found = _cell()
    return found if isinstance(found, str) else None


def why_not(edges: Sequence[Edge], inputs: Sequence[Tensor]) -> str | None:
    """Why the engine cannot compute this cell, or None if it can."""
    device = inputs[0].device
    reason = missing()
    if reason is not None:
        return reason
    kernels: Any = _cell()
    expected = "cpu" if kernels.interpreted() else "cuda"
    if device.type != expected or any(x.device != device for x in inputs):
        return f"inputs that are not all on one {expected.upper()} device"
    return unsupported(edges, inputs)


def unsupported(edges: Sequence[Edge], inputs: Sequence[Tensor]) -> str | None:
    """What the kernels cannot compute in this cell, on any machine, or None."""
    storage = storage_dtype(inputs[0])
    if storage not in STORAGE:
        return f"no kernels for dtype {storage}"
    if any(storage_dtype(x) != storage for x in inputs):
        return "inputs of different dtypes"
    if any(x.shape != inputs[0].shape for x in inputs):
        return "inputs of different sizes"
    reason = cpu.unsupported(edges, inputs, parameter_dtype(storage))
    if reason is not None:
        return reason
    if edges[0].K not in (1, 2, 4, 8):
        return f"no kernels for K={edges[0].K}"
    plan = plan_of(edges, len(inputs))
    assert isinstance(plan, Plan)
    n, channels, h, w = inputs[0].shape
    # offsets inside one state, or inside the concatenated nodes, are 32 bits wide
    size = n * channels * h * w
    if max(size, size // plan.stride**2 * plan.spec[1]) >= 2**31:
        return f"no kernels for inputs of {size} numbers"
    return uneven(plan, len(inputs))


def mixed_cell(
    edges: Sequence[Edge],
    inputs: Sequence[Tensor],
    weights: Tensor,
    edge_weights: Tensor | None = None,
    memory: Memory = "fast",
    concatenate: bool = False,
) -> list[Tensor]:
    """The engine behind `rfdarts_fast.ops.mixed_cell`, for cells that `why_not` has nothing against.

    Under autocast, float32 inputs are cast to its dtype, and so are the states that come out. Nodes are
    channels_last views of one tensor.

    Args:
        memory: see `use_backend`. "bfloat16" is "fast" where the states have 16 bits anyway.
        concatenate: return [all nodes concatenated, [N, nodes * C, H', W']] instead of the nodes, at no cost.

    Raises:
        RuntimeError: if the engine cannot run this cell.
        ValueError: for BatchNorms in training mode with a single value per channel, as BatchNorm2d.
    """
    kernels = _cell()
    if isinstance(kernels, str):
        raise RuntimeError(kernels)
    plan = plan_of(edges, len(inputs), check=False)
    if isinstance(plan, str):
        raise RuntimeError(f"no kernels for {plan}")
    training = training_mode(plan)
    if isinstance(training, str):
        raise RuntimeError(training)
    storage = storage_dtype(inputs[0])
    parameters = parameter_dtype(storage)
    n, _, h, w = inputs[0].shape
    h, w = h // plan.stride, w // plan.stride
    if training and plan.norms and n * h * w == 1:
        raise ValueError("batch: BatchNorm in training mode needs more than one value per channel")
    layout = layout_of(plan, edges[0])  # type: ignore[arg-type]
    device = inputs[0].device
    noise = [torch.randn(n, layout.width, h, w, dtype=storage, device=device) for _ in layout.noise]
    weights = weights.to(parameters).contiguous()
    gamma, beta = gamma_beta(plan, weights)
    rounded = memory == "bfloat16" and storage == torch.float32
    options = kernels.Options(
        together=concatenate,
        training=training,
        eps=plan.norms[0].eps if plan.norms else 1e-5,
        recompute=memory == "recompute",
        kept=torch.bfloat16 if rounded else storage,
    )
    *nodes, used = kernels.CellFunction.apply(
        layout,
        options,
        None if training else running_moments(plan).to(parameters),
        noise,
        gamma,
        beta,
        weights,
        None if edge_weights is None else edge_weights.to(parameters).contiguous(),
        *(x.to(storage) for x in inputs),
    )
    if training:
        _update_running(plan, used, n * h * w)
    return nodes


@torch.no_grad()
def _update_running(plan: Plan, moments: Tensor, count: int) -> None:
    """Running statistics as BatchNorm2d in training mode updates them; the variance unbiased."""
    means, variances, batches = plan.running()
    tracked = [i for i, mean in enumerate(means) if mean is not None]
    if not tracked:
        return
    momentum = float(plan.norms[0].momentum or 0.0)
    new_means, new_variances = moments[0].unbind(), (moments[1] * (count / (count - 1))).unbind()
    buffers: list[Any] = [running[i] for running in (means, variances) for i in tracked]
    torch._foreach_mul_(buffers, 1 - momentum)
    torch._foreach_add_(
        buffers, [new[i] for new in (new_means, new_variances) for i in tracked], alpha=momentum
    )
    counts: list[Any] = [batches[i] for i in tracked]
    torch._foreach_add_(counts, 1)
