"""Layers one after the other, BatchNorms in kernels."""

from __future__ import annotations

from torch import Tensor, nn

from rfdarts_fast import ops
from rfdarts_fast.nn.primitives import runs_only


class FusedSequential(nn.Sequential):
    """An nn.Sequential whose BatchNorms, each with the ReLU behind it, are one op where a backend has it."""

    def forward(self, x: Tensor) -> Tensor:
        """As of nn.Sequential; x [N, C, H, W]."""
        modules = [*self]
        while modules:
            module = modules.pop(0)
            if not runs_only(module, nn.BatchNorm2d):
                x = module(x)
                continue
            relu = bool(modules) and runs_only(modules[0], nn.ReLU)
            if relu:
                modules.pop(0)
            x = ops.batch_norm(x, module, relu)  # type: ignore[arg-type]
        return x
