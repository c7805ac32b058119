"""The compiled ops behind autograd: one node for a whole cell, one for the layers that read a state.

Gradients of gradients are those of `ops.functional`. csrc/README.md has the ops' arguments and the derivation
of the gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rfdarts_fast.ops import functional
from rfdarts_fast.ops.contract import CellPlan, ReLUConvBNLayer
from rfdarts_fast.ops.outputs import Outputs


def channels_inside(x: Tensor) -> Tensor:
    """x itself where channels are consecutive, else a channels_last copy."""
    if x.stride(1) == 1 and x.stride(3) >= x.shape[1]:
        return x
    return channels_last(x)


def channels_last(x: Tensor) -> Tensor:
    """x with the strides of a dense NHWC tensor, sizes of 1 included; itself where it has them."""
    _, c, h, w = x.shape
    strides = (h * w * c, 1, w * c, c)
    if x.stride() == strides:
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)


def _save(ctx: Any, **groups: Tensor | list[Tensor] | None) -> None:
    """Keeps tensors and lists of tensors for the backward, by name."""
    flat: list[Tensor | None] = []
    ctx.places = {}
    for name, group in groups.items():
        first = len(flat)
        flat += group if isinstance(group, list) else [group]
        ctx.places[name] = slice(first, len(flat)) if isinstance(group, list) else first
    ctx.save_for_backward(*flat)


def _saved(ctx: Any) -> dict[str, Any]:
    """The groups that `_save` kept."""
    flat = list(ctx.saved_tensors)
    return {name: flat[place] for name, place in ctx.places.items()}


@dataclass(frozen=True)
class CellOptions:
    """The arguments of a cell's ops that have no gradient.

    Attributes:
        ops: namespace of the ops, `torch.ops.rfdarts`.
        conv_weights: see `packing.cell_weights`.
        bfloat16: branch outputs are kept in bfloat16.
        bfloat16_products: convolutions multiply in bfloat16, and `conv_weights` are packed for it.
        recompute: branch outputs are computed again in the backward.
        concat: the result is the nodes concatenated.
        all_images: of the batches of all processes, where BatchNorms are synchronised, else 0.
    """

    ops: Any
    plan: CellPlan
    conv_weights: Tensor
    bfloat16: bool
    bfloat16_products: bool
    recompute: bool
    concat: bool
    all_images: int = 0

    @property
    def numbers(self) -> dict[str, Any]:
        return dict(
            cell=self.plan.encoded,
            eps=self.plan.eps,
            bfloat16=self.bfloat16,
            bfloat16_products=self.bfloat16_products,
        )


class CellFunction(torch.autograd.Function):
    """All nodes of a cell, or their concatenation, and the moments [2, norms, C/K] of its BatchNorms.

    `inputs` are [N, C, H, W] with consecutive channels, see `channels_inside`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        options: CellOptions,
        moments: Tensor | None,
        noise: list[Tensor],
        gamma: Tensor,
        beta: Tensor,
        op_weights: Tensor,
        edge_weights: Tensor | None,
        *inputs: Tensor,
    ) -> tuple[Tensor, ...]:
        tensors: dict[str, Any] = dict(
            inputs=list(inputs),
            noise=noise,
            conv_weights=options.conv_weights,
            gamma=gamma,
            beta=beta,
            op_weights=op_weights,
            edge_weights=edge_weights,
        )
        nodes, concat, branch_outputs, used_moments = options.ops.cell_forward(
            **tensors,
            **options.numbers,
            moments=moments,
            concat=options.concat,
            all_images=options.all_images,
        )
        # no views to autograd, which users may change in place
        outputs = [concat.data] if options.concat else [node.data for node in nodes]
        _save(ctx, **tensors, moments=used_moments)
        ctx.options, ctx.training = options, moments is None
        # the backward uses them up; the parts of the concatenation hold the same values, and it lives on
        # anyway; no edge reads the last node
        ctx.outputs = Outputs(outputs if options.concat else outputs[:-1])
        ctx.branch_outputs = None if options.recompute else branch_outputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(used_moments)
        return *outputs, used_moments

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        options, shared = ctx.options, _saved(ctx) | ctx.options.numbers
        noise, edge_weights = shared.pop("noise"), shared.pop("edge_weights")
        node_grads: list[Any] = list(grads[:-1])
        if all(grad is None for grad in node_grads):
            return (None,) * len(ctx.needs_input_grad)
        if options.concat:
            node_grads = list(node_grads[0].chunk(options.plan.nodes, dim=1))
        if torch.is_grad_enabled() or functional.is_transformed():
            moments = None if ctx.training else shared["moments"]

            def nodes(
                gamma: Tensor, beta: Tensor, op_weights: Tensor, edge_weights: Tensor | None, *inputs: Tensor
            ) -> list[Tensor]:
                weights = gamma, beta, op_weights, edge_weights
                return functional.cell(options.plan, inputs, noise, *weights, moments, options.all_images > 0)

            arguments = [
                shared["gamma"],
                shared["beta"],
                shared["op_weights"],
                edge_weights,
                *shared["inputs"],
            ]
            needed = ctx.needs_input_grad[3:]
            return None, None, None, *functional.gradients(nodes, arguments, needed, node_grads)
        dense = [channels_inside(grad) for grad in node_grads if grad is not None]
        kept, branch_outputs, ctx.branch_outputs = ctx.outputs.take(), ctx.branch_outputs, None
        if kept is None:
            # used up, or changed in place
            # with the statistics that there were: other processes may have kept theirs
            again = shared | dict(noise=noise, edge_weights=edge_weights, concat=False)
            shared["nodes"], _, branch_outputs, _ = options.ops.cell_forward(**again)
        elif options.concat:
            shared["nodes"] = list(kept[0].chunk(options.plan.nodes, dim=1))
        else:
            # in place of the last node
            shared["nodes"] = [*kept, dense[0]]
        if branch_outputs is None:
            branch_outputs = options.ops.cell_branch_outputs(**shared)
        # inputs are the last arguments of `forward`
        needs_input_grad = [i for i, needed in enumerate(ctx.needs_input_grad[7:]) if needed]
        grad_inputs, grad_gamma, grad_beta, grad_op_weights, grad_edge_weights = options.ops.cell_backward(
            **shared,
            grads=dense,
            grad_nodes=[i for i, grad in enumerate(node_grads) if grad is not None],
            noise=noise,
            edge_weights=edge_weights,
            branch_outputs=branch_outputs,
            training=ctx.training,
            needs_input_grad=needs_input_grad,
            all_images=options.all_images,
        )
        of_inputs: list[Tensor | None] = [None] * len(shared["inputs"])
        for i, grad in zip(needs_input_grad, grad_inputs, strict=True):
            of_inputs[i] = grad
        of_edges = None if edge_weights is None else grad_edge_weights
        return (None, None, None, grad_gamma, grad_beta, grad_op_weights, of_edges, *of_inputs)


@dataclass(frozen=True)
class LayerOptions:
    """The arguments of the ReLU-conv-BN ops that are no tensors with a gradient.

    Attributes:
        ops: namespace of the ops, `torch.ops.rfdarts`.
        layers: of one stride.
        conv_weights: of each layer, see `packing.layer_weights`.
        bfloat16_products: the convolutions multiply in bfloat16, and `conv_weights` are packed for it.
        moments: running mean and variance [2, C'] of each layer in float64; empty for the batch's.
        recompute: the convolutions' outputs are computed again in the backward.
        all_images: see `CellOptions`.
    """

    ops: Any
    layers: list[ReLUConvBNLayer]
    conv_weights: list[Tensor]
    bfloat16_products: bool
    moments: list[Tensor]
    recompute: bool
    all_images: int = 0

    @property
    def numbers(self) -> dict[str, Any]:
        first = self.layers[0]
        return dict(eps=first.norm.eps, reduce=first.reduce, bfloat16_products=self.bfloat16_products)


class ReLUConvBNFunction(torch.autograd.Function):
    """Outputs of several layers that read x, and the moments [2, C'] of their BatchNorms.

    The arguments after x are the layers' gammas, then their betas, [C'] each.
    """

    @staticmethod
    def forward(ctx: Any, options: LayerOptions, x: Tensor, *gammas_betas: Tensor) -> tuple[Tensor, ...]:
        count = len(options.layers)
        layers: dict[str, Any] = dict(
            x=x,
            conv_weights=options.conv_weights,
            gammas=list(gammas_betas[:count]),
            betas=list(gammas_betas[count:]),
        )
        outputs, conv_outputs, moments = options.ops.relu_conv_bn_forward(
            **layers, moments=options.moments, **options.numbers, all_images=options.all_images
        )
        _save(ctx, **layers, moments=moments, conv_outputs=[] if options.recompute else conv_outputs)
        ctx.options = options
        ctx.mark_non_differentiable(*moments)
        ctx.set_materialize_grads(False)
        return *outputs, *moments

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        options, needs_input_grad = ctx.options, ctx.needs_input_grad[1]
        count = len(options.layers)
        if all(grad is None for grad in grads[:count]):
            return (None,) * len(ctx.needs_input_grad)
        shared = _saved(ctx) | options.numbers
        if torch.is_grad_enabled() or functional.is_transformed():
            moments = options.moments or [None] * count

            def outputs(x: Tensor, *gammas_betas: Tensor) -> list[Tensor]:
                tensors = zip(gammas_betas[:count], gammas_betas[count:], moments, strict=True)
                return [
                    functional.relu_conv_bn(layer.convs, x, *each, shared["eps"], options.all_images > 0)
                    for layer, each in zip(options.layers, tensors, strict=True)
                ]

            arguments = [shared["x"], *shared["gammas"], *shared["betas"]]
            return None, *functional.gradients(outputs, arguments, ctx.needs_input_grad[1:], grads[:count])
        conv_outputs = shared.pop("conv_outputs") or options.ops.relu_conv_bn_forward(**shared)[1]
        dense = [
            torch.zeros_like(output) if grad is None else channels_last(grad)
            for grad, output in zip(grads[:count], conv_outputs, strict=True)
        ]
        grad_x, grad_gammas, grad_betas = options.ops.relu_conv_bn_backward(
            **shared,
            grads=dense,
            conv_outputs=conv_outputs,
            training=not options.moments,
            needs_input_grad=needs_input_grad,
            all_images=options.all_images,
        )
        return None, grad_x if needs_input_grad else None, *grad_gammas, *grad_betas


@dataclass(frozen=True)
class BatchNormOptions:
    """The arguments of the BatchNorm ops that have no gradient.

    Attributes:
        ops: namespace of the ops, `torch.ops.rfdarts`.
        moments: running mean and variance [2, C] in float64; None for the batch's.
        relu: a ReLU follows.
    """

    ops: Any
    moments: Tensor | None
    eps: float
    relu: bool

    @property
    def numbers(self) -> dict[str, Any]:
        return dict(eps=self.eps, relu=self.relu)


class BatchNormFunction(torch.autograd.Function):
    """A BatchNorm of x, dense channels_last, or its ReLU; and the moments [2, C] that it normalised by."""

    @staticmethod
    def forward(
        ctx: Any, options: BatchNormOptions, x: Tensor, gamma: Tensor, beta: Tensor
    ) -> tuple[Tensor, Tensor]:
        tensors = dict(x=x, gamma=gamma, beta=beta)
        output, moments = options.ops.batch_norm_forward(
            **tensors, moments=options.moments, **options.numbers
        )
        _save(ctx, **tensors, moments=moments)
        ctx.options = options
        ctx.mark_non_differentiable(moments)
        ctx.set_materialize_grads(False)
        return output, moments

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        options, needed = ctx.options, ctx.needs_input_grad[1:]
        if grads[0] is None:
            return (None,) * len(ctx.needs_input_grad)
        shared = _saved(ctx) | options.numbers
        if torch.is_grad_enabled() or functional.is_transformed():

            def output(x: Tensor, gamma: Tensor, beta: Tensor) -> list[Tensor]:
                return [
                    functional.batch_norm_relu(x, gamma, beta, options.moments, options.eps, options.relu)
                ]

            arguments = [shared["x"], shared["gamma"], shared["beta"]]
            return None, *functional.gradients(output, arguments, needed, [grads[0]])
        made = options.ops.batch_norm_backward(
            grad=channels_last(grads[0]),
            **shared,
            training=options.moments is None,
            needs_input_grad=needed[0],
        )
        return None, *(grad if want else None for grad, want in zip(made, needed, strict=True))
