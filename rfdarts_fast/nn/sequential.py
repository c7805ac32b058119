"""Layers one after the other, BatchNorms in kernels."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from rfdarts_fast import ops
from rfdarts_fast.nn.primitives import runs_only


def in_sequence(modules: Iterable[nn.Module], x: Tensor) -> Tensor:
    """What nn.Sequential makes of x [N, C, H, W]; BatchNorms, each with the ReLU behind it, are one op where
    a backend has it."""
    left = [*modules]
    while left:
        module = left.pop(0)
        if not runs_only(module, nn.BatchNorm2d):
            x = module(x)
            continue
        relu = bool(left) and runs_only(left[0], nn.ReLU)
        if relu:
            left.pop(0)
        x = ops.batch_norm(x, module, relu)  # type: ignore[arg-type]
    return x


class FusedSequential(nn.Sequential):
    """An nn.Sequential by `in_sequence`."""

    def forward(self, x: Tensor) -> Tensor:
        return in_sequence(self, x)
