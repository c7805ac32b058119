"""The variants that a benchmark compares, and one training step of each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfdarts_fast import ops
from rfdarts_fast.nn import SearchNetwork
from rfdarts_fast.nn.random_features import freeze_random_features
from rfdarts_fast.nn.supernet import MixedOp
from rfdarts_fast.ops import reference
from rfdarts_fast.spaces import get_space

Method = Literal["rf-darts", "rf-pcdarts"]

VARIANTS = {
    "eager": "reference, NCHW",
    "eager-cl": "reference, channels_last",
    "compile": "reference, torch.compile of each mixed op",
    "fast": "kernels, fast",
    "recompute": "kernels, recompute",
    "bfloat16": "kernels, bfloat16 storage",
}

# the others are the kernels' memory modes
PLAIN = ("eager", "eager-cl", "compile")


def make_network(method: Method, channels: int, layers: int, space: str) -> SearchNetwork:
    """The supernet of an RF method with frozen convolutions, from a fixed seed."""
    torch.manual_seed(0)
    partial = method == "rf-pcdarts"
    network = SearchNetwork(
        get_space(space), C=channels, layers=layers, K=4 if partial else 1, edge_norm=partial
    )
    freeze_random_features(network)
    return network


def step_of(
    variant: str, method: Method, batch: int, size: int, channels: int, layers: int, space: str
) -> Callable[[], float]:
    """A function that runs one step and returns its loss: forward, and backward to all BatchNorm and
    architecture gradients. The network is built at the call of `step_of`."""
    network = make_network(method, channels, layers, space)
    torch.manual_seed(1)
    images, labels = torch.randn(batch, 3, size, size), torch.randint(0, 10, (batch,))
    if variant != "eager":
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = images.contiguous(memory_format=torch.channels_last)
    if variant == "compile":
        compile_mixed_ops(network)
    parameters = [*network.parameters(), *network.arch_parameters()]

    def step() -> float:
        for parameter in parameters:
            parameter.grad = None
        loss = F.cross_entropy(network(images), labels)
        loss.backward()
        return loss.item()

    def run() -> float:
        choice = ("reference",) if variant in PLAIN else ("cpu", variant)
        with ops.use_backend(*choice):  # type: ignore[arg-type]
            return step()

    return run


class _CompiledCell(nn.Module):
    """A search cell whose mixed ops are compiled one by one."""

    def __init__(self, cell: Any, mode: str) -> None:
        super().__init__()
        self.cell = cell
        self.reduction = cell.reduction
        # each shape for itself: Inductor fails on a graph of all of them
        self._edges: list[Any] = [torch.compile(edge, mode=mode, dynamic=False) for edge in cell._ops]

    def forward(
        self, s0: Tensor, s1: Tensor, op_weights: Tensor, edge_weights: Tensor | None = None
    ) -> Tensor:
        inputs = [self.cell.preprocess0(s0), self.cell.preprocess1(s1)]
        nodes = reference.mixed_cell(self._edges, inputs, op_weights, edge_weights, _call)
        return torch.cat(nodes, dim=1)


def _call(edge: Any, x: Tensor, op_weights: Tensor) -> Tensor:
    return edge(x, op_weights)


def compile_mixed_ops(network: SearchNetwork, mode: str = "default") -> None:
    """In place; `mode` is torch.compile's."""
    assert all(isinstance(op, MixedOp) for cell in network.cells for op in cell._ops)  # type: ignore[union-attr]
    # thousands of graphs of the same shape family: each is its own
    torch._dynamo.config.cache_size_limit = 4096
    network.cells = nn.ModuleList([_CompiledCell(cell, mode) for cell in network.cells])


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most so far. (getrusage's begins with the parent's.)"""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
