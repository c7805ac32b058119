"""The modules of a foreign supernet that can be fused; nothing is changed until they are applied."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rfdarts_fast import nn as rfnn
from rfdarts_fast.drop_in.fused import (
    EdgeList,
    Fused,
    FusedCell,
    FusedFactorizedReduce,
    FusedMixedOp,
    FusedNasBench201Cell,
    FusedNasBench201JointCell,
    FusedReLUConvBN,
    fuse,
)
from rfdarts_fast.drop_in.recognise import Unrecognised, plain, preprocessing, recognise, settings
from rfdarts_fast.nn.primitives import FactorizedReduce
from rfdarts_fast.ops.backend import use_backend

_PROBE_SIDE = 4
# attributes of the published cells; a cell with others may use them in its forward
_CELL_ATTRIBUTES = {"training", "reduction", "primitives", "_steps", "_multiplier"}


@dataclass
class FusedEdge:
    """A mixed op with the attributes of `rfdarts_fast.ops.EdgeModule`, and the channels of its primitives."""

    primitives: tuple[str, ...]
    stride: int
    width: int | None
    channels: int = 0
    K: int = 1

    def apply(self, target: Any, candidates: nn.ModuleList) -> None:
        target.primitives, target.stride = self.primitives, self.stride
        target.channels, target.K = self.channels, self.K
        for i, op in enumerate(candidates):
            candidates[i] = plain(op)

    def __str__(self) -> str:
        partial = f", K={self.K}" if self.K > 1 else ""
        return f"mixed op of {len(self.primitives)}, {self.channels} channels, stride {self.stride}{partial}"


class Replacements:
    """Everything in `model` that can be replaced.

    Attributes:
        modules: path -> module.
        edges: path of a mixed op -> what it becomes.
        cells: paths of cells that are fused whole.
        preprocess: path of a module in front of a cell -> its new class.
        benchmark_cells: path of a NAS-Bench-201 cell -> its new class, and what its edges become.
        left: path -> reason why a module need not be replaced.
        problems: path -> reason why a module cannot be replaced.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self.edges: dict[str, FusedEdge] = {}
        self.cells: list[str] = []
        self.preprocess: dict[str, type[Fused]] = {}
        self.benchmark_cells: dict[str, tuple[type[Fused], dict[str, FusedEdge]]] = {}
        self.left: dict[str, str] = {}
        self.problems: dict[str, str] = {}
        self._agreed: dict[Any, bool] = {}
        for path, module in self.modules.items():
            try:
                self._examine(path, module)
            except Unrecognised as error:
                self.problems[path] = str(error)
        for path, module in self.modules.items():
            if _is_cell(module) and not isinstance(module, Fused):
                self._examine_cell(path, module)

    def apply(self) -> dict[str, str]:
        """Fuses everything; returns path -> description of what computes it now."""
        replaced = {}
        for path, edge in self.edges.items():
            _fuse_edge(self.modules[path], edge)
            replaced[path] = str(edge)
        for path, fused_class in self.preprocess.items():
            fuse(self.modules[path], fused_class)
            replaced[path] = "preprocessing"
        for path in self.cells:
            fuse(self.modules[path], FusedCell)
            replaced[path] = f"cell of {len(_candidates(self.modules[path]))} mixed ops"
        for path, (mixin, edges) in self.benchmark_cells.items():
            _fuse_benchmark_cell(self.modules[path], mixin, edges)
            replaced[path] = f"NAS-Bench-201 cell of {len(edges)} mixed ops"
        return replaced

    def _examine(self, path: str, module: nn.Module) -> None:
        if isinstance(module, (rfnn.MixedOp, FusedMixedOp, FusedNasBench201Cell)):
            self.left[path] = "fused already"
        elif isinstance(getattr(module, "edges", None), nn.ModuleDict):
            self._examine_benchmark_cell(path, module)
        elif _candidates(module) and not _is_cell(module) and not isinstance(module, nn.ModuleList):
            self._examine_edge(path, module)

    def _examine_edge(self, path: str, module: nn.Module) -> None:
        parameters = _parameters(module)
        if parameters is None or len(parameters) != 2:
            # the cell of a derived network has an `_ops` list too
            if parameters is not None and len(parameters) > 2:
                return
            raise Unrecognised(f"expected {type(module).__name__} to have a forward(x, weights)")
        edge = _read_edge(_candidates(module))
        edge.channels = self._channels(path, module, edge)
        width = edge.width or edge.channels
        if not width or edge.channels % width:
            raise Unrecognised(f"its {edge.channels} channels are no multiple of its operations' {width}")
        edge.K = edge.channels // width
        key = (type(module), edge.primitives, edge.stride, edge.K, settings(module))
        op_weights = _op_weights([edge])[0]
        if not self._agrees(
            key, module, lambda copied: _fuse_edge(copied, edge), _state(edge.channels), op_weights
        ):
            raise Unrecognised(f"its forward is not the weighted sum of its operations with K={edge.K}")
        self.edges[path] = edge

    def _channels(self, path: str, module: nn.Module, edge: FusedEdge) -> int:
        """All channels of an edge: those of the cell around it, else by the op's own account of K."""
        parent = path
        while parent:
            parent = parent.rpartition(".")[0]
            if _is_cell(self.modules[parent]):
                preprocess: Any = self.modules[parent].preprocess1
                norms = [m.num_features for m in preprocess.modules() if isinstance(m, nn.BatchNorm2d)]
                if norms:
                    return norms[-1]
        if edge.width is None:
            raise Unrecognised("no operation with channels and no cell around it tell how many it works on")
        K = next((k for k in (getattr(module, "k", None), getattr(module, "K", None)) if type(k) is int), 1)
        return K * edge.width

    def _examine_cell(self, path: str, cell: nn.Module) -> None:
        edges = [f"{path}._ops.{i}".lstrip(".") for i in range(len(_candidates(cell)))]
        if not all(edge in self.edges for edge in edges):
            return
        for name in ("preprocess0", "preprocess1"):
            self._examine_preprocessing(f"{path}.{name}".lstrip("."), getattr(cell, name))
        reason = self._unsupported_reason(cell, [self.edges[edge] for edge in edges])
        if reason:
            self.left[path] = f"{reason}; its mixed ops are fused one by one"
        else:
            self.cells.append(path)

    def _examine_preprocessing(self, path: str, module: nn.Module) -> None:
        ours = preprocessing(module)
        if ours is None:
            return
        fused_class = FusedFactorizedReduce if ours is FactorizedReduce else FusedReLUConvBN
        key = (type(module), fused_class, settings(module))
        conv: Any = _first_conv(module)
        if self._agrees(key, module, lambda copied: fuse(copied, fused_class), _state(conv.in_channels)):
            self.preprocess[path] = fused_class

    def _unsupported_reason(self, cell: nn.Module, edges: Sequence[FusedEdge]) -> str:
        """The reason why a cell cannot be fused whole, or "" if it can."""
        steps, multiplier = getattr(cell, "_steps", None), getattr(cell, "_multiplier", None)
        if type(steps) is not int or type(multiplier) is not int or not 1 <= multiplier <= steps:
            return "it does not tell its steps and multiplier"
        if len({len(edge.primitives) for edge in edges}) != 1:
            return "its mixed ops have different numbers of operations"
        if len(edges) != sum(2 + i for i in range(steps)):
            return f"it has {len(edges)} mixed ops for {steps} steps"
        unknown = {name for name in vars(cell) if not name.startswith("_")} - _CELL_ATTRIBUTES
        if unknown:
            return f"it has attributes of its own ({', '.join(sorted(unknown))})"
        parameters = _parameters(cell)
        if parameters is None or len(parameters) not in (3, 4):
            return "its forward is not forward(s0, s1, weights)"
        first: Any = cell.preprocess0
        key = (type(cell), *((e.primitives, e.stride, e.K) for e in edges), multiplier, type(first))
        if key not in self._agreed:
            self._agreed[key] = self._cells_agree(cell, edges, parameters[3:])
        return "" if self._agreed[key] else "its forward is not the published one"

    def _cells_agree(
        self, cell: nn.Module, edges: Sequence[FusedEdge], fourth: Sequence[inspect.Parameter]
    ) -> bool:
        def fuse_all(copied: nn.Module) -> None:
            for module, edge in zip(_candidates(copied), edges, strict=True):
                _fuse_edge(module, edge)
            fuse(copied, FusedCell)

        preprocess: list[Any] = [cell.preprocess0, cell.preprocess1]
        states = []
        for conv in (_first_conv(module) for module in preprocess):
            if conv is None:
                return False
            # a FactorizedReduce in front halves what comes from before the reduction
            states.append(_state(conv.in_channels, conv.stride[0]))
        op_weights = _op_weights(edges)
        agree = True
        default = fourth[0].default if fourth else 0.0
        if default is inspect.Parameter.empty or default is None:
            agree = _agree(cell, fuse_all, *states, op_weights, _random(len(edges)).abs())
        if default is not inspect.Parameter.empty:
            agree = agree and _agree(cell, fuse_all, *states, op_weights)
        return agree

    def _examine_benchmark_cell(self, path: str, cell: nn.Module) -> None:
        lists: Any = cell.edges
        if not all(isinstance(candidates, nn.ModuleList) for candidates in lists.values()):
            return
        nodes = range(1, 1 + int((2 * len(lists)) ** 0.5))
        expected = {key: i for i, key in enumerate(f"{i}<-{j}" for i in nodes for j in range(i))}
        if list(lists) != list(expected) or getattr(cell, "edge2index", None) != expected:
            raise Unrecognised(f"expected edges {', '.join(expected)} in this order, got {', '.join(lists)}")
        edges = {key: _read_edge(candidates) for key, candidates in lists.items()}
        shapes = {(len(edge.primitives), edge.stride) for edge in edges.values()}
        widths = {edge.width for edge in edges.values()} - {None}
        if len(shapes) > 1 or shapes.pop()[1] != 1 or len(widths) != 1:
            raise Unrecognised("expected edges of stride 1 with equally many operations and channels")
        width: Any = widths.pop()
        for edge in edges.values():
            edge.channels = width

        def fuse_all(copied: nn.Module) -> None:
            _fuse_benchmark_cell(copied, FusedNasBench201JointCell, edges)

        key = (type(cell), *(edge.primitives for edge in edges.values()), settings(cell))
        args = _state(width), _op_weights([*edges.values()])
        if not self._agrees((*key, "forward"), cell, fuse_all, *args):
            raise Unrecognised("its forward is not the published one")
        joint = self._agrees((*key, "joint"), cell, fuse_all, *args, method="forward_joint")
        self.benchmark_cells[path] = (FusedNasBench201JointCell if joint else FusedNasBench201Cell, edges)

    def _agrees(self, key: Any, *args: Any, **options: Any) -> bool:
        """`_agree`, tried once for modules of the same `key`."""
        if key not in self._agreed:
            self._agreed[key] = _agree(*args, **options)
        return self._agreed[key]


def _candidates(module: Any) -> Any:
    """The `_ops` list of a mixed op or of a cell, or an empty one."""
    candidates = getattr(module, "_ops", None)
    return candidates if isinstance(candidates, nn.ModuleList) else nn.ModuleList()


def _is_cell(module: nn.Module) -> bool:
    return isinstance(getattr(module, "preprocess1", None), nn.Module) and bool(_candidates(module))


def _parameters(module: nn.Module) -> list[inspect.Parameter] | None:
    """Positional parameters of forward, or None if it takes any."""
    parameters = list(inspect.signature(module.forward).parameters.values())
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return None if any(p.kind in variable for p in parameters) else parameters


def _read_edge(candidates: nn.ModuleList) -> FusedEdge:
    primitives = []
    for i, op in enumerate(candidates):
        try:
            primitives.append(recognise(plain(op)))
        except Unrecognised as error:
            raise Unrecognised(f"operation {i}: {error}") from None
    strides = {primitive.stride for primitive in primitives}
    widths = {primitive.width for primitive in primitives if primitive.width is not None}
    if len(strides) != 1 or len(widths) > 1:
        raise Unrecognised(
            f"expected operations of one stride and width, got {sorted(strides)}, {sorted(widths)}"
        )
    names = tuple(primitive.name for primitive in primitives)
    return FusedEdge(names, strides.pop(), widths.pop() if widths else None)


def _fuse_edge(module: nn.Module, edge: FusedEdge) -> None:
    edge.apply(module, _candidates(module))
    fuse(module, FusedMixedOp)


def _fuse_benchmark_cell(cell: Any, mixin: type[Fused], edges: dict[str, FusedEdge]) -> None:
    for key, edge in edges.items():
        candidates = cell.edges[key]
        candidates.__class__ = EdgeList
        edge.apply(candidates, candidates)
    fuse(cell, mixin)


def _copy(module: nn.Module) -> Any:
    """A copy to try things on, in float64 on the CPU and without hooks."""
    copied = copy.deepcopy(module).to("cpu", torch.float64)
    for inner in copied.modules():
        inner._forward_hooks.clear()
        inner._forward_pre_hooks.clear()
    return copied


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _state(channels: int, enlarged: int = 1) -> Tensor:
    side = _PROBE_SIDE * enlarged
    return _random(2, channels, side, side)


def _op_weights(edges: Sequence[FusedEdge]) -> Tensor:
    """Random op weights [edges, primitives]; noise weighs nothing, as it would differ between two runs."""
    noise = torch.tensor([[name == "noise" for name in edge.primitives] for edge in edges])
    return _random(*noise.shape).abs().masked_fill(noise, 0.0)


def _first_conv(module: nn.Module) -> nn.Conv2d | None:
    return next((m for m in module.modules() if isinstance(m, nn.Conv2d)), None)


@torch.no_grad()
def _agree(
    module: nn.Module, fuse_it: Callable[[nn.Module], None], *args: Tensor, method: str = "forward"
) -> bool:
    """True if a fused copy computes the same in both modes."""
    pair = _copy(module), _copy(module)
    fuse_it(pair[1])
    with torch.random.fork_rng([]), use_backend("reference"):
        for training in (True, False):
            try:
                theirs, ours = (getattr(each.train(training), method)(*args) for each in pair)
            except Exception:
                # whatever a foreign forward raises, it is not the published one
                return False
            if not isinstance(theirs, Tensor) or not _close(theirs, ours):
                return False
    return all(_close(*buffers) for buffers in zip(*(each.buffers() for each in pair), strict=True))


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-5, atol=1e-6)
