"""Backends as tests call them, and the oracle: the reference in float64, and plain PyTorch in the same dtype."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from rfdarts_fast.ops import reference, use_backend
from rfdarts_fast.ops import triton
from rfdarts_fast.ops.compiled import cpu, cuda
from tests.kernels.problems import Problem, Result


class Oracle:
    """Plain PyTorch."""

    name = "reference"

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    def parameter_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def cell(self, edges, inputs, op_weights, edge_weights=None) -> list[Tensor]:
        # or FactorizedReduce would look for compiled kernels
        with use_backend("reference"):
            return reference.mixed_cell(edges, inputs, op_weights, edge_weights)

    def layers(self, x, layers) -> list[Tensor]:
        return [reference.relu_conv_bn(x, *layer) for layer in layers]


ORACLE = Oracle()


class Kernels:
    """A backend on a device."""

    def __init__(self, name: str, module, device: str = "cpu") -> None:
        self.name, self.module, self.device = name, module, device

    def parameter_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype if self.name == "cpu" or dtype == torch.float64 else torch.float32

    def cell(self, edges, inputs, op_weights, edge_weights=None, memory="fast", concat=False) -> list[Tensor]:
        return self.module.mixed_cell(
            edges, inputs, op_weights, edge_weights, memory=memory, concatenate=concat
        )

    def layers(self, x, layers, memory="fast") -> list[Tensor]:
        return self.module.relu_conv_bns(x, layers, memory)

    def orders(self, dtype: torch.dtype) -> Iterator[str]:
        """Orders in which a computation in `dtype` is to be tried."""
        yield "fixed"


class Emulated(Kernels):
    def __init__(self):
        super().__init__("emulated", cuda)

    def cell(self, *arguments, **options):
        native, torch.ops.rfdarts = torch.ops.rfdarts, torch.ops.rfdarts_emulated
        return super().cell(*arguments, **options)

    def layers(self, *arguments, **options):
        native, torch.ops.rfdarts = torch.ops.rfdarts, torch.ops.rfdarts_emulated
        return super().layers(*arguments, **options)

    def orders(self, dtype):
        orders = ("fixed", "shuffled") if dtype == torch.float64 else ("fixed",)
        for order in orders:
            torch.ops.rfdarts_emulated.shuffle(order == "shuffled")
            yield order
        torch.ops.rfdarts_emulated.shuffle(False)
