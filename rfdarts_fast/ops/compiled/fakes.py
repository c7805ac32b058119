"""Shapes of the compiled ops, for tracing; one function per op that returns tensors."""

from __future__ import annotations

import torch
from torch import Tensor, library

from rfdarts_fast.ops.compiled.plan import Op

# numbers per primitive in a spec, and before the first edge
_BRANCH, _HEAD = 7, 5


def _state(x: Tensor, channels: int, h: int, w: int) -> Tensor:
    empty = x.new_empty_strided((x.shape[0], channels, h, w), (h * w * channels, 1, w * channels, channels))
    return empty


def _kept(x: Tensor, spec: list[int], bfloat16: bool) -> Tensor:
    primitives, K, stride = spec[2], spec[4], spec[_HEAD]
    slots, at = 0, _HEAD
    while at < len(spec):
        for code in spec[at + 1 : at + 1 + primitives * _BRANCH : _BRANCH]:
            slots += {Op.SEP_CONV: 2, Op.DIL_CONV: 1, Op.REDUCE: 1}.get(Op(code), 0)
        at += 1 + primitives * _BRANCH
    image = x.shape[2] // stride * (x.shape[3] // stride) * (x.shape[1] // K)
    dtype = torch.bfloat16 if bfloat16 and x.dtype == torch.float32 else x.dtype
    return x.new_empty(slots * x.shape[0] * ((image + 31) // 32 * 32), dtype=dtype)


def _cell_forward(
    inputs, noise, weights, gamma, beta, mix, edge_weights, moments, spec, eps, bfloat16, together
):
    x, (_, nodes, _, norms, K), stride = inputs[0], spec[:_HEAD], spec[_HEAD]
    h, w = x.shape[2] // stride, x.shape[3] // stride
    states = [_state(x, x.shape[1], h, w) for _ in range(nodes)]
    concatenated = _state(x, nodes * x.shape[1], h, w) if together else x.new_empty(0)
    used = x.new_empty(2, norms, x.shape[1] // K, dtype=torch.float64)
    return states, concatenated, _kept(x, spec, bfloat16), used


def _cell_branch_outputs(inputs, nodes, weights, gamma, beta, mix, moments, spec, eps, bfloat16):
    return _kept(inputs[0], spec, bfloat16)


def _cell_backward(
    grads, grad_nodes, inputs, nodes, noise, weights, gamma, beta, mix, edge_weights, moments, kept, spec,
    training, eps, bfloat16, wanted,
):  # fmt: skip
    x, primitives = inputs[0], spec[2]
    width = 1 + primitives * _BRANCH
    edges = (len(spec) - _HEAD) // width
    shape = (spec[3], x.shape[1] // spec[4])
    return (
        [_state(inputs[j], x.shape[1], inputs[j].shape[2], inputs[j].shape[3]) for j in wanted],
        gamma.new_empty(shape),
        gamma.new_empty(shape),
        mix.new_empty(edges, primitives),
        mix.new_empty(0 if edge_weights is None else edges),
    )


def _relu_conv_bn_forward(x, weights, gammas, betas, moments, eps, reduce):
    half, widths = 2 if reduce else 1, [gamma.shape[0] for gamma in gammas]
    outs, ys = ([_state(x, c, x.shape[2] // half, x.shape[3] // half) for c in widths] for _ in range(2))
    return outs, ys, [x.new_empty(2, c, dtype=torch.float64) for c in widths]


def _relu_conv_bn_backward(grads, x, ys, weights, gammas, betas, moments, eps, training, reduce, wanted):
    dx = _state(x, *x.shape[1:]) if wanted else x.new_empty_strided((0, 1, 1, 1), (1, 1, 1, 1))
    return dx, [torch.empty_like(g) for g in gammas], [torch.empty_like(g) for g in gammas]


def register() -> None:
    """Once, after the ops are loaded."""
    for name, fake in {
        "cell_forward": _cell_forward,
        "cell_branch_outputs": _cell_branch_outputs,
        "cell_backward": _cell_backward,
        "relu_conv_bn_forward": _relu_conv_bn_forward,
        "relu_conv_bn_backward": _relu_conv_bn_backward,
        "update_running_stats": lambda *arguments: None,
    }.items():
        library.register_fake(f"rfdarts::{name}", fake)  # type: ignore[arg-type]
