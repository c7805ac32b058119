"""A call of a cell, and the autograd node that it becomes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rfdarts_fast.ops.contract import CellCall, CellPlan, Op
from rfdarts_fast.ops.dtypes import parameter_dtype, storage_dtype
from rfdarts_fast.ops.functional import is_transformed
from rfdarts_fast.ops.outputs import Outputs
from rfdarts_fast.ops.synchronised import images_of_all
from rfdarts_fast.ops.triton.cell import Cell, Options, node_places
from rfdarts_fast.ops.triton.layout import layout_of


def mixed_cell(call: CellCall) -> list[Tensor]:
    """See `TritonBackend.mixed_cell`."""
    plan = call.plan
    # a single value is refused
    call.pixels()
    storage = storage_dtype(call.inputs[0])
    parameters = parameter_dtype(storage)
    inputs = [x.to(storage) for x in call.inputs]
    n, h, w = call.output_size
    noise = [inputs[0].new_empty(n, plan.mixed_channels, h, w).normal_() for _ in range(plan.noises)]
    op_weights, edge_weights = call.op_weights.to(parameters).contiguous(), call.edge_weights
    if edge_weights is not None:
        edge_weights = edge_weights.to(parameters).contiguous()
    gamma, beta = plan.gamma_beta(op_weights)
    moments = gamma.new_empty(2, *gamma.shape) if call.training else plan.running_moments().to(parameters)
    rounded = call.memory == "bfloat16" and storage == torch.float32
    options = Options(
        plan=plan,
        size=call.output_size,
        training=call.training,
        concat=call.concat,
        recompute=call.memory == "recompute" or call.recompute,
        stored=torch.bfloat16 if rounded else storage,
        all_images=images_of_all(inputs[0]) if call.synchronised else 0,
    )
    nodes = CellFunction.apply(options, moments, noise, gamma, beta, op_weights, edge_weights, *inputs)
    if call.training:
        update_running_stats(plan, moments, options.all_pixels)
    return [*nodes]


@torch.no_grad()
def update_running_stats(plan: CellPlan, moments: Tensor, count: int) -> None:
    """Moves running statistics towards `moments` [2, norms, C/K] of `count` values each, as BatchNorm2d in
    training mode does: the variance unbiased."""
    means, variances, batches = plan.running_stats()
    tracked = [i for i, mean in enumerate(means) if mean is not None]
    if not tracked:
        return
    running: list[Any] = [stats[i] for stats in (means, variances) for i in tracked]
    new_means, new_variances = moments[0].unbind(), (moments[1] * (count / (count - 1))).unbind()
    torch._foreach_mul_(running, 1 - plan.momentum)
    new = [stats[i] for stats in (new_means, new_variances) for i in tracked]
    torch._foreach_add_(running, new, alpha=plan.momentum)
    counts: list[Any] = [batches[i] for i in tracked]
    torch._foreach_add_(counts, 1)


class CellFunction(torch.autograd.Function):
    """The states of all nodes, or with `concat` their concatenation alone.

    Reads `moments` [2, norms, C/K], or in training mode fills it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        options: Options,
        moments: Tensor,
        noise: list[Tensor],
        gamma: Tensor,
        beta: Tensor,
        op_weights: Tensor,
        edge_weights: Tensor | None,
        *inputs: Tensor,
    ) -> tuple[Tensor, ...]:
        plan, size = options.plan, options.size
        n, channels, h, w = inputs[0].shape
        nodes_at, _, _ = node_places(options)
        states = inputs[0].new_empty(nodes_at + plan.nodes * channels * options.pixels)
        places = states[: len(inputs) * inputs[0].numel()].view(-1, n, h, w, channels)
        for place, x in zip(places, inputs, strict=True):
            place.copy_(x.permute(0, 2, 3, 1))
        rstd = torch.empty_like(gamma) if options.training else (moments[1] + plan.eps).rsqrt()
        parameters = moments, rstd, gamma, beta, op_weights, edge_weights
        branch_outputs, argmax = empty_branch_outputs(options, states)
        cell = Cell(options, states, branch_outputs, argmax, *parameters)
        with torch.cuda.device_of(states):
            fill_noise(cell, noise)
            cell.forward(statistics=options.training)
        ctx.options = options
        branches = () if options.recompute else (branch_outputs.to(options.stored), argmax)
        ctx.save_for_backward(states, *parameters, *noise, *branches)
        ctx.set_materialize_grads(False)
        if options.concat:
            nodes = [states[nodes_at:].view(*size, plan.nodes * channels)]
        else:
            nodes = [*states[nodes_at:].view(plan.nodes, *size, channels)]
        # no views to autograd, which users may change in place
        nodes = [node.permute(0, 3, 1, 2).data for node in nodes]
        ctx.outputs = Outputs(nodes)
        return tuple(nodes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() or is_transformed():
            raise RuntimeError(
                "backend: triton has neither second derivatives (create_graph=True) nor batched ones; "
                "use_backend('reference') has"
            )
        options, plan = ctx.options, ctx.options.plan
        states, moments, rstd, gamma, beta, op_weights, edge_weights, *rest = ctx.saved_tensors
        noise, branches = rest[: plan.noises], rest[plan.noises :]
        changed = ctx.outputs.take() is None
        if changed:
            states = states.clone()
        if changed or options.recompute:
            branches = empty_branch_outputs(options, states)
        parameters = moments, rstd, gamma, beta, op_weights, edge_weights
        branch_outputs, argmax = branches
        cell = Cell(options, states, branch_outputs, argmax, *parameters)
        if options.concat:
            grads = (None,) * plan.nodes if grads[0] is None else grads[0].chunk(plan.nodes, dim=1)
        with torch.cuda.device_of(states):
            if changed or options.recompute:
                fill_noise(cell, noise)
            if changed:
                # with the statistics that there were: other processes may have kept theirs
                cell.forward(statistics=False)
            elif options.recompute:
                cell.recompute_branch_outputs()
            made = cell.backward(grads, ctx.needs_input_grad[7:])
            term_weights = torch.where(cell.constants.identity, made.edges[:, :1], made.term_weights)
            grad_op_weights, grad_edge_weights = term_weights, None
            if edge_weights is not None:
                grad_op_weights = term_weights * edge_weights[:, None]
                grad_edge_weights = (term_weights * op_weights).sum(1) + made.edges[:, 1]
        inputs = [None if x is None else x.permute(0, 3, 1, 2) for x in made.inputs]
        return (None, None, None, made.gamma, made.beta, grad_op_weights, grad_edge_weights, *inputs)


def empty_branch_outputs(options: Options, states: Tensor) -> tuple[Tensor, Tensor]:
    """Room for branch outputs [slots, M, C/K], and for argmax uint8 [sources, M, C/K] of max pools."""
    layout, rows = layout_of(options.plan), (options.pixels, options.plan.mixed_channels)
    maxima = len(layout.sources) if any(Op.MAX_POOL in source.pools for source in layout.sources) else 0
    argmax = states.new_empty((maxima, *rows), dtype=torch.uint8)
    return states.new_empty(layout.slots, *rows), argmax


def fill_noise(cell: Cell, noise: Sequence[Tensor]) -> None:
    """Noise [N, C/K, H, W] into its slots."""
    for slot, drawn in zip(cell.layout.noise, noise, strict=True):
        place = cell.branch_outputs[slot].view(*cell.options.size, cell.C)
        place.copy_(drawn.permute(0, 2, 3, 1))
