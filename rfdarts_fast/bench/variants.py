"""The variants that a benchmark compares, and one training step of each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfdarts_fast import ops
from rfdarts_fast.nn import SearchNetwork
from rfdarts_fast.nn.random_features import freeze_random_features
from rfdarts_fast.nn.supernet import MixedOp
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

MEMORY: dict[str, ops.Memory] = {"fast": "fast", "recompute": "recompute", "bfloat16": "bfloat16"}


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
        if variant in ("eager", "eager-cl", "compile"):
            with ops.use_backend("reference"):
                return step()
        with ops.use_backend("cpu", MEMORY[variant]):
            return step()

    return run


class _CompiledCell(nn.Module):
    """A search cell whose mixed ops are compiled one by one."""

    def __init__(self, cell: nn.Module, mode: str) -> None:
        super().__init__()
        self.cell = cell
        self.reduction = cell.reduction
        # each shape for itself: Inductor fails on what it makes of all of them together
        self.compiled = [
            torch.compile(op, mode=mode, dynamic=False)
            for op in cell._ops  # type: ignore[union-attr]
        ]

    def forward(self, s0: Tensor, s1: Tensor, weights: Tensor, edge_weights: Tensor | None = None) -> Tensor:
        states = [self.cell.preprocess0(s0), self.cell.preprocess1(s1)]  # type: ignore[operator]
        at = 0
        while at < len(self.compiled):
            total: Tensor | None = None
            for j, x in enumerate(states):
                term = self.compiled[at + j](x, weights[at + j])
                if edge_weights is not None:
                    term = edge_weights[at + j] * term
                total = term if total is None else total + term
            at += len(states)
            assert total is not None
            states.append(total)
        return torch.cat(states[2:], dim=1)


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
