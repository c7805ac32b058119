"""The variants that a benchmark compares, and one training step of each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfdarts_fast import ops
from rfdarts_fast.nn import NasBench201SearchNetwork, SearchNetwork, Supernet
from rfdarts_fast.nn.nasbench201 import NasBench201SearchCell
from rfdarts_fast.nn.random_features import freeze_random_features
from rfdarts_fast.nn.supernet import MixedOp
from rfdarts_fast.ops import reference
from rfdarts_fast.spaces import get_space

Method = Literal["rf-darts", "rf-pcdarts"]
Stem = Literal["cifar", "imagenet"]

VARIANTS = {
    "eager": "reference, NCHW",
    "eager-cl": "reference, channels_last",
    "eager-amp": "reference, NCHW, autocast to bfloat16",
    "eager-cl-amp": "reference, channels_last, autocast to bfloat16",
    "compile": "reference, torch.compile of each mixed op",
    "fast": "kernels, fast",
    "recompute": "kernels, recompute",
    "bfloat16": "kernels, bfloat16 storage",
    "amp": "kernels, autocast to bfloat16",
    "recompute-amp": "kernels, recompute, autocast to bfloat16",
}

# the others are the kernels' memory modes, of "amp" `fast`
PLAIN = ("eager", "eager-cl", "eager-amp", "eager-cl-amp", "compile")


BUDGET = "budget-"
"""Prefix of the variant "fast" with a memory budget in MB."""


def label(variant: str) -> str:
    """The words for a variant in a table."""
    return VARIANTS.get(variant) or f"kernels, fast, at most {variant.removeprefix(BUDGET)} MB kept"


def is_nasbench201(space: str) -> bool:
    return get_space(space).family.name == "nasbench201"


def check_method(method: str, space: str) -> None:
    """Raises ValueError for partial channels in NAS-Bench-201, which has none."""
    if method == "rf-pcdarts" and is_nasbench201(space):
        raise ValueError(f"method: expected rf-darts for the space {space}, got {method}")


def make_network(
    method: Method,
    channels: int,
    layers: int,
    space: str,
    stem: Stem = "cifar",
    K: int | None = None,
    classes: int = 10,
) -> Supernet:
    """The supernet of an RF method with frozen convolutions, from a fixed seed; for NAS-Bench-201 `layers` is
    N, the cells of each stage. `K` is that of rf-pcdarts, 4 by default.

    Raises:
        ValueError: for partial channels in NAS-Bench-201, which has none.
    """
    check_method(method, space)
    torch.manual_seed(0)
    partial, searched = method == "rf-pcdarts", get_space(space)
    network: Supernet
    if is_nasbench201(space):
        network = NasBench201SearchNetwork(searched, C=channels, num_classes=classes, N=layers)
    else:
        k = (K or 4) if partial else 1
        network = SearchNetwork(searched, channels, classes, layers, stem, K=k, edge_norm=partial)
    freeze_random_features(network)
    return network


def step_of(
    variant: str, method: Method, batch: int, size: int, device: str = "cpu", **shape: Any
) -> Callable[[], float]:
    """A function that runs one step and returns its loss: forward, and backward to all BatchNorm and
    architecture gradients. The network is built at the call of `step_of`; `shape` as of `make_network`."""
    network = make_network(method, **shape).to(device)
    torch.manual_seed(1)
    images = torch.randn(batch, 3, size, size).to(device)
    labels = torch.randint(0, shape.get("classes", 10), (batch,)).to(device)
    amp = variant.endswith("amp")
    if variant not in ("eager", "eager-amp"):
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = images.contiguous(memory_format=torch.channels_last)
    if variant == "compile":
        compile_mixed_ops(network)
    parameters = [*network.parameters(), *network.arch_parameters()]
    kernels, memory = torch.device(device).type, {"amp": "fast", "recompute-amp": "recompute"}
    choice: tuple = ("reference",) if variant in PLAIN else (kernels, memory.get(variant, variant))
    if variant.startswith(BUDGET):
        choice = kernels, "fast", ops.Budget(int(float(variant.removeprefix(BUDGET)) * 1e6))

    def step() -> float:
        for parameter in parameters:
            parameter.grad = None
        with torch.autocast(kernels, torch.bfloat16, enabled=amp):
            loss = F.cross_entropy(network(images).float(), labels)
        loss.backward()
        return loss.item()

    def run() -> float:
        with ops.use_backend(*choice):
            return step()

    return run


class _CompiledCell(nn.Module):
    """A search cell whose mixed ops are compiled one by one."""

    def __init__(self, cell: Any, mode: str) -> None:
        super().__init__()
        self.cell = cell
        self.reduction = cell.reduction
        self._edges = _compiled(cell, mode)

    def forward(
        self, s0: Tensor, s1: Tensor, op_weights: Tensor, edge_weights: Tensor | None = None
    ) -> Tensor:
        inputs = [self.cell.preprocess0(s0), self.cell.preprocess1(s1)]
        nodes = reference.mixed_cell(self._edges, inputs, op_weights, edge_weights, _call)
        return torch.cat(nodes, dim=1)


class _CompiledCell201(NasBench201SearchCell):
    """The same of NAS-Bench-201."""

    def __init__(self, cell: NasBench201SearchCell, mode: str) -> None:
        nn.Module.__init__(self)
        self._ops, self._edges = cell._ops, _compiled(cell, mode)

    def forward(self, x: Tensor, op_weights: Tensor) -> Tensor:
        return reference.mixed_cell(self._edges, [x], op_weights, None, _call)[-1]


def _compiled(cell: Any, mode: str) -> list[Any]:
    # each shape for itself: Inductor fails on a graph of all of them
    return [torch.compile(edge, mode=mode, dynamic=False) for edge in cell._ops]


def _call(edge: Any, x: Tensor, op_weights: Tensor) -> Tensor:
    return edge(x, op_weights)


def search_cells(network: Supernet) -> list[Any]:
    """The cells with mixed ops, without the residual blocks of NAS-Bench-201."""
    return [cell for cell in network.cells if hasattr(cell, "_ops")]  # type: ignore[union-attr]


def compile_mixed_ops(network: Supernet, mode: str = "default") -> None:
    """In place; `mode` is torch.compile's."""
    assert all(isinstance(op, MixedOp) for cell in search_cells(network) for op in cell._ops)

    def compiled(cell: Any) -> nn.Module:
        if not hasattr(cell, "_ops"):
            return cell
        return (_CompiledCell201 if isinstance(cell, NasBench201SearchCell) else _CompiledCell)(cell, mode)

    # thousands of graphs of the same shape family: each is its own
    torch._dynamo.config.cache_size_limit = 4096
    network.cells = nn.ModuleList(map(compiled, network.cells))  # type: ignore[arg-type]


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most so far (getrusage's begins with the parent's), VmData
    what RLIMIT_DATA limits."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
