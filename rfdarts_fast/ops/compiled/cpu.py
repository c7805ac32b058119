"""The compiled CPU engine for mixed ops with frozen convolutions: one autograd node for a whole cell.

The kernels are in csrc/; `rfdarts::cell_forward`, `cell_branch_outputs` and `cell_backward` are their ops.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rfdarts_fast.ops.compiled import fakes, conv_bn
from rfdarts_fast.ops.backend import Memory
from rfdarts_fast.ops.compiled.conv_bn import (
    channels_inside,
    channels_last,
    relu_conv_bn,
    relu_conv_bns,
)
from rfdarts_fast.ops.compiled.plan import (
    Plan,
    gamma_beta,
    plan_of,
    running_moments,
    training_mode,
    update_running,
)
from rfdarts_fast.ops.reference import Edge

__all__ = [
    "mixed_cell",
    "relu_conv_bn",
    "relu_conv_bns",
    "status",
    "why_not",
    "why_not_conv",
]

_missing: str | None = None
try:
    importlib.import_module("rfdarts_fast.ops._C")
    fakes.register()
except ImportError as error:
    _missing = f"the compiled kernels were not built or do not load ({error})"


def status() -> dict[str, str | bool]:
    """What is built and which instruction set runs: `built`, `isa`, `isa_best`; `reason` where not built;
    `harness`: the compiler, where the kernels are also built one by one, or why they are not."""
    if _missing is not None:
        return {"built": False, "reason": _missing}
    ops = torch.ops.rfdarts
    try:
        harness = importlib.import_module("rfdarts_fast.ops._kernels").build()["compiler"]
    except ImportError as error:
        harness = f"not built or not for this Python ({error})"
    return {"built": True, "isa": ops.isa(), "isa_best": ops.isa_best(), "harness": harness}


def why_not(edges: Sequence[Edge], inputs: Sequence[Tensor]) -> str | None:
    """Why the engine cannot compute this cell, or None if it can."""
    if _missing is not None:
        return _missing
    for x in inputs:
        if x.device.type != "cpu":
            return f"no kernels for device {x.device.type}"
        if x.dtype not in (torch.float32, torch.float64):
            return f"no kernels for dtype {x.dtype}"
        if x.dtype != inputs[0].dtype:
            return "inputs of different dtypes"
    return unsupported(edges, inputs, inputs[0].dtype)


def unsupported(edges: Sequence[Edge], inputs: Sequence[Tensor], parameters: torch.dtype) -> str | None:
    """What no device has kernels for in this cell, or None; weights must have the dtype `parameters`."""
    for x in inputs:
        if x.dim() != 4 or x.numel() == 0:
            return "inputs that are not [N, C, H, W], or empty"
        if x.shape[1] != edges[0].channels:
            return f"inputs of {x.shape[1]} channels for edges of {edges[0].channels}"
    plan = plan_of(edges, len(inputs))
    if isinstance(plan, str):
        return f"no kernels for {plan}"
    if plan.stride == 2 and any(x.shape[2] % 2 or x.shape[3] % 2 for x in inputs):
        return "a reduction of an odd image size"
    return plan.objection(parameters)


def why_not_conv(x: Tensor, convs: tuple[nn.Conv2d, ...], norm: nn.Module) -> str | None:
    """Why the engine cannot compute `relu_conv_bn` of these, or None if it can."""
    return _missing if _missing is not None else conv_bn.why_not_conv(x, convs, norm)


class CellFunction(torch.autograd.Function):
    """All nodes of a cell; see `mixed_cell`. Not differentiable twice: nothing in the package needs that."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        spec: list[int],
        options: tuple[bool, bool, bool],
        moments: Tensor | None,
        noise: list[Tensor],
        gamma: Tensor,
        beta: Tensor,
        mix: Tensor,
        edge_weights: Tensor | None,
        *inputs: Tensor,
    ) -> tuple[Tensor, ...]:
        recompute, bfloat16, together = options
        weights = plan.weights(gamma.dtype)
        eps = plan.norms[0].eps if plan.norms else 1e-5
        dense = [channels_inside(x.detach()) for x in inputs]
        nodes, concatenated, kept, used = torch.ops.rfdarts.cell_forward(
            dense, noise, weights, gamma, beta, mix, edge_weights, moments, spec, eps, bfloat16, together
        )
        ctx.spec, ctx.eps, ctx.bfloat16, ctx.training = spec, eps, bfloat16, moments is None
        # the backward uses `kept` up; None is filled again from the states
        ctx.kept = None if recompute else kept
        ctx.set_materialize_grads(False)
        ctx.inputs, ctx.noises = len(inputs), len(noise)
        # the parts of the concatenation hold the same values, and it lives on anyway
        states = [concatenated] if together else nodes
        ctx.save_for_backward(*dense, *states, *noise, weights, gamma, beta, mix, edge_weights, used)
        ctx.mark_non_differentiable(used)
        ctx.together = together
        return (concatenated, used) if together else (*nodes, used)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        weights, gamma, beta, mix, edge_weights, moments = saved[-6:]
        inputs, rest = saved[: ctx.inputs], saved[ctx.inputs : -6]
        nodes, noise = rest[: len(rest) - ctx.noises], rest[len(rest) - ctx.noises :]
        if ctx.together:
            nodes = list(nodes[0].chunk(ctx.spec[1], dim=1))
        spec, eps, bfloat16 = ctx.spec, ctx.eps, ctx.bfloat16
        kept, ctx.kept = ctx.kept, None
        if kept is None:
            kept = torch.ops.rfdarts.cell_branch_outputs(
                inputs, nodes, weights, gamma, beta, mix, moments, spec, eps, bfloat16
            )
        if ctx.together and grads[0] is not None:
            grads = (*grads[0].chunk(len(nodes), dim=1), grads[-1])
        present = [i for i, grad in enumerate(grads[:-1]) if grad is not None]
        given = [channels_inside(grads[i]) for i in present]  # type: ignore[arg-type]
        wanted = [i for i in range(ctx.inputs) if ctx.needs_input_grad[9 + i]]
        grad_inputs, grad_gamma, grad_beta, grad_mix, grad_edges = torch.ops.rfdarts.cell_backward(
            given,
            present,
            inputs,
            nodes,
            noise,
            weights,
            gamma,
            beta,
            mix,
            edge_weights,
            moments,
            kept,
            spec,
            ctx.training,
            eps,
            bfloat16,
            wanted,
        )
        outputs: list[Tensor | None] = [None] * ctx.inputs
        for i, grad in zip(wanted, grad_inputs, strict=True):
            outputs[i] = grad
        edges = grad_edges if edge_weights is not None else None
        return (None, None, None, None, None, grad_gamma, grad_beta, grad_mix, edges, *outputs)


def mixed_cell(
    edges: Sequence[Edge],
    inputs: Sequence[Tensor],
    weights: Tensor,
    edge_weights: Tensor | None = None,
    memory: Memory = "fast",
    concatenate: bool = False,
) -> list[Tensor]:
    """The engine behind `rfdarts_fast.ops.mixed_cell`, for cells that `why_not` has nothing against.

    Args:
        memory: see `use_backend`; "bfloat16" is "fast" where the inputs are not float32.
        concatenate: return [all nodes concatenated, [N, nodes * C, H', W']] instead of the nodes, for less
            than what torch.cat costs.

    Raises:
        RuntimeError: if the engine cannot run this cell.
        ValueError: for BatchNorms in training mode with a single value per channel, as BatchNorm2d.
    """
    plan = plan_of(edges, len(inputs), check=False)
    if isinstance(plan, str):
        raise RuntimeError(f"no kernels for {plan}")
    training = training_mode(plan)
    if isinstance(training, str):
        raise RuntimeError(training)
    x = inputs[0]
    n, _, h, w = x.shape
    stride = edges[0].stride
    pixels = n * (h // stride) * (w // stride)
    if training and plan.norms and pixels == 1:
        raise ValueError("batch: BatchNorm in training mode needs more than one value per channel")
    noise = []
    for _ in range(plan.noises):
        shape = n, plan.channels // plan.K, h // stride, w // stride
        drawn = torch.randn(shape, dtype=x.dtype, device=x.device)
        noise.append(channels_last(drawn))
    gamma, beta = gamma_beta(plan, weights)
    moments = None if training else running_moments(plan)
    *nodes, used = CellFunction.apply(
        plan,
        plan.spec,
        (memory == "recompute", memory == "bfloat16" and x.dtype == torch.float32, concatenate),
        moments,
        noise,
        gamma,
        beta,
        weights.contiguous(),
        None if edge_weights is None else edge_weights.contiguous(),
        *inputs,
    )
    if training:
        update_running(plan, used, pixels)
    return nodes
