"""The mixed op, computed by one backend per device. Nothing else in the package computes one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

# importing a backend's package registers it
from rfdarts_fast.ops import compiled as compiled
from rfdarts_fast.ops import triton as triton
from rfdarts_fast.ops.backend import BackendError, backend_names, use_backend
from rfdarts_fast.ops.budget import Budget
from rfdarts_fast.ops.contract import (
    Backend,
    BatchNormBackend,
    CellCall,
    CellPlan,
    EdgeModule,
    Memory,
    ReLUConvBNLayer,
    backends,
    register_backend,
)
from rfdarts_fast.ops.dispatch import batch_norm, concat_cell, mixed_cell, relu_conv_bns
from rfdarts_fast.ops.synchronised import SynchronisedBatchNorm2d, synchronise_batch_norms

__all__ = [
    "Backend",
    "BackendError",
    "BatchNormBackend",
    "Budget",
    "CellCall",
    "CellPlan",
    "EdgeModule",
    "Memory",
    "ReLUConvBNLayer",
    "SynchronisedBatchNorm2d",
    "backend_names",
    "backends",
    "batch_norm",
    "concat_cell",
    "mixed_cell",
    "register_backend",
    "relu_conv_bn",
    "relu_conv_bns",
    "synchronise_batch_norms",
    "use_backend",
]


def relu_conv_bn(x: Tensor, convs: Sequence[nn.Conv2d], norm: nn.BatchNorm2d) -> Tensor:
    """ReLU, convolution, BatchNorm: a cell's preprocessing; with two convolutions a FactorizedReduce.

    See `reference.relu_conv_bn`. Frozen 1x1 convolutions are fused where a backend can.
    """
    return relu_conv_bns(x, [ReLUConvBNLayer(tuple(convs), norm)])[0]
