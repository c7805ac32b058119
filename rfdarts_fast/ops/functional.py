"""A planned cell and a ReLU-conv-BN layer as functions of their tensors, in plain PyTorch.

Kernels have a first derivative. Where a graph of it is asked for (`create_graph=True`: Hessian-vector
products, RobustDARTS's dominant eigenvalue), or many at once (`is_grads_batched=True`), it is taken of these
instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from rfdarts_fast.ops.contract import Branch, CellPlan, Edge, Op
from rfdarts_fast.ops.reference import channel_shuffle
from rfdarts_fast.ops.synchronised import batch_norm


def cell(
    plan: CellPlan,
    inputs: Sequence[Tensor],
    noise: Sequence[Tensor],
    gamma: Tensor,
    beta: Tensor,
    op_weights: Tensor,
    edge_weights: Tensor | None,
    moments: Tensor | None,
    synchronised: bool = False,
) -> list[Tensor]:
    """The states of all nodes in the dtype of `gamma`; arguments as those of the op cell_forward, and of
    `CellCall`."""

    def norm(y: Tensor, row: int) -> Tensor:
        if synchronised:
            return batch_norm(y, gamma[row], beta[row], plan.eps)[0]
        mean, variance = (None, None) if moments is None else moments[:, row].to(y.dtype)
        return F.batch_norm(y, mean, variance, gamma[row], beta[row], moments is None, eps=plan.eps)

    states = [x.to(gamma.dtype) for x in inputs]
    for e, edge in enumerate(plan.edges):
        term = _mixed_op(
            plan, edge, states[edge.source], [z.to(gamma.dtype) for z in noise], op_weights[e], norm
        )
        if edge_weights is not None:
            term = edge_weights[e] * term
        if edge.source:
            states[-1] = states[-1] + term
        else:
            states.append(term)
    return states[plan.inputs :]


def _mixed_op(
    plan: CellPlan,
    edge: Edge,
    x: Tensor,
    noise: Sequence[Tensor],
    op_weights: Tensor,
    norm: Callable[[Tensor, int], Tensor],
) -> Tensor:
    mixed = x[:, : plan.mixed_channels]
    total = torch.zeros_like(mixed[:, :, :: edge.stride, :: edge.stride])
    for branch, op_weight in zip(edge.branches, op_weights, strict=True):
        if branch.op is not Op.NONE:
            total = total + op_weight * _branch(branch, mixed, edge.stride, noise, norm)
    if plan.K == 1:
        return total
    bypass = x[:, plan.mixed_channels :]
    if edge.stride == 2:
        bypass = F.max_pool2d(bypass, 2, 2)
    return channel_shuffle(torch.cat([total, bypass], dim=1), plan.K)


def _branch(
    branch: Branch, x: Tensor, stride: int, noise: Sequence[Tensor], norm: Callable[[Tensor, int], Tensor]
) -> Tensor:
    match branch.op:
        case Op.IDENTITY:
            return x
        case Op.NOISE:
            return noise[branch.noise]
        case Op.MAX_POOL:
            y = F.max_pool2d(x, 3, stride, padding=1)
        case Op.AVG_POOL:
            y = F.avg_pool2d(x, 3, stride, padding=1, count_include_pad=False)
        case Op.REDUCE:
            y = _reduce(F.relu(x), branch.convs)
        case Op.DIL_CONV | Op.NOR_CONV:
            y = _apply(F.relu(x), branch.convs)
        case Op.SEP_CONV:
            inner = norm(_apply(F.relu(x), branch.convs[:2]), branch.inner_norm)
            y = _apply(F.relu(inner), branch.convs[2:])
    return y if branch.norm < 0 else norm(y, branch.norm)


def _apply(x: Tensor, convs: Sequence[nn.Conv2d]) -> Tensor:
    for conv in convs:
        x = F.conv2d(x, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
    return x


def _reduce(x: Tensor, convs: Sequence[nn.Conv2d]) -> Tensor:
    return torch.cat([_apply(x, convs[:1]), _apply(x[:, :, 1:, 1:], convs[1:])], dim=1)


def relu_conv_bn(
    convs: Sequence[nn.Conv2d],
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    moments: Tensor | None,
    eps: float,
    synchronised: bool = False,
) -> Tensor:
    """The output of one layer in the dtype of `gamma`; moments [2, C'] in evaluation mode, else None."""
    x = F.relu(x.to(gamma.dtype))
    y = _reduce(x, convs) if len(convs) == 2 else _apply(x, convs)
    if synchronised:
        return batch_norm(y, gamma, beta, eps)[0]
    mean, variance = (None, None) if moments is None else moments.to(y.dtype)
    return F.batch_norm(y, mean, variance, gamma, beta, moments is None, eps=eps)


def batch_norm_relu(
    x: Tensor, gamma: Tensor, beta: Tensor, moments: Tensor | None, eps: float, relu: bool
) -> Tensor:
    """A BatchNorm by itself, with `relu` the ReLU behind it too; moments [2, C] in evaluation mode, else
    None."""
    mean, variance = (None, None) if moments is None else moments.to(x.dtype)
    y = F.batch_norm(x, mean, variance, gamma, beta, moments is None, eps=eps)
    return F.relu(y) if relu else y


def is_transformed() -> bool:
    """True inside torch.func transforms, batched backward passes and forward-mode differentiation."""
    # nothing tells but the way in
    level = torch._C._vmapmode_increment_nesting()
    torch._C._vmapmode_decrement_nesting()
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    return transformed or level > 1 or forward_ad._current_level >= 0


def gradients(
    function: Callable[..., Sequence[Tensor]],
    arguments: Sequence[Tensor | None],
    needed: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients of function(*arguments) for the arguments that are `needed`, with a graph of their own.

    Args:
        arguments: tensors, connected to the graph that they come from.
        grads: gradients of the outputs; None for zero.
    """
    with torch.enable_grad():
        # an argument that occurs twice has two gradients
        aliases = [x if x is None else x.view_as(x) for x in arguments]
        outputs = [y for y, grad in zip(function(*aliases), grads, strict=True) if grad is not None]
        given = [
            grad.to(y.dtype)
            for y, grad in zip(outputs, (grad for grad in grads if grad is not None), strict=True)
        ]
        wanted = [x for x, want in zip(aliases, needed, strict=True) if want and x is not None]
        made = iter(torch.autograd.grad(outputs, wanted, given, create_graph=True, allow_unused=True))
    return [next(made) if want else None for want in needed]
