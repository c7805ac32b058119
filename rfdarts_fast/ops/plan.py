"""The plan of a cell: its modules read once, and again only where one was exchanged."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence

from torch import nn

from rfdarts_fast.ops import hooks
from rfdarts_fast.ops.contract import Branch, CellPlan, Edge, EdgeModule, Op
from rfdarts_fast.ops.synchronised import BATCH_NORMS


class Unsupported(Exception):
    """A cell that no kernels know; the message says for what there are none."""


class Modules:
    """Modules, and where each was found, so that an exchanged one is noticed."""

    def __init__(self) -> None:
        self._parents: list[dict] = []
        self._names: list[str] = []
        self._modules: list[nn.Module | None] = []

    def add(self, parent: nn.Module, *names: str) -> None:
        for name in names:
            self._parents.append(parent._modules)
            self._names.append(name)
            self._modules.append(parent._modules[name])

    def unchanged(self) -> bool:
        return [*map(dict.get, self._parents, self._names)] == self._modules


_Key = tuple[int, ...]
_plans: weakref.WeakKeyDictionary[EdgeModule, tuple[_Key, Modules, hooks.Hooks, CellPlan | str]] = (
    weakref.WeakKeyDictionary()
)


def plan_of(edges: Sequence[EdgeModule], inputs: int) -> CellPlan | str:
    """The plan of a cell, or the reason why there is none, such as hooks that no kernel would call.

    Args:
        edges: the mixed ops, ordered by node, then by input; the plan lives as long as the first one.
        inputs: states that enter the cell.
    """
    key = (inputs, *map(id, edges))
    made_for, modules, hooked, plan = _plans.get(edges[0], ((), Modules(), hooks.Hooks(()), ""))
    if made_for != key or (isinstance(plan, CellPlan) and not modules.unchanged()):
        reader = _Reader()
        try:
            plan = reader.cell(edges, inputs)
        except Unsupported as reason:
            plan = f"no kernels for {reason}"
        hooked = hooks.Hooks(_hookable(edges))
        _plans[edges[0]] = key, reader.modules, hooked, plan
    return hooks.REASON if hooked else plan


def _hookable(edges: Sequence[EdgeModule]) -> Iterator[nn.Module]:
    """Modules whose calls hooks may wait for. A mixed op alone is called itself."""
    for edge in edges:
        if isinstance(edge, nn.Module) and len(edges) > 1:
            yield edge
        yield from (m for op in edge._ops for m in op.modules())


def edge_ends(inputs: int, edges: int) -> Iterator[tuple[int, int]]:
    """(source, node) of so many edges in order: node i has one from each of inputs + i earlier states."""
    node, source = 0, 0
    for _ in range(edges):
        yield source, node
        source += 1
        if source == inputs + node:
            node, source = node + 1, 0
    if source:
        raise Unsupported(f"{edges} edges are no whole number of nodes with {inputs} inputs")


class _Reader:
    """Modules of one cell to its plan."""

    def __init__(self) -> None:
        self.modules = Modules()
        self.norms: list[nn.BatchNorm2d] = []
        self.noises = 0

    def cell(self, edges: Sequence[EdgeModule], inputs: int) -> CellPlan:
        first = edges[0]
        ends = [*edge_ends(inputs, len(edges))]
        if first.channels % first.K:
            raise Unsupported(f"K={first.K} does not divide {first.channels} channels")
        described = []
        for edge, (source, node) in zip(edges, ends, strict=True):
            if (edge.channels, edge.K, len(edge.primitives)) != (
                first.channels,
                first.K,
                len(first.primitives),
            ):
                raise Unsupported("edges of different width or number of primitives in one cell")
            computed = [name for name in edge.primitives if name != "none"]
            if len({*computed}) != len(computed):
                raise Unsupported("a primitive that occurs twice on an edge")
            self.modules.add(edge._ops, *edge._ops._modules)
            branches = tuple(
                self.branch(name, op, edge) for name, op in zip(edge.primitives, edge._ops, strict=True)
            )
            described.append(Edge(source, node, edge.stride, branches))
        norms = self.norms
        if any(norm.eps != norms[0].eps or norm.momentum != norms[0].momentum for norm in norms):
            raise Unsupported("BatchNorms with different eps or momentum in one cell")
        if norms and norms[0].momentum is None:
            raise Unsupported("BatchNorm with a cumulative average (momentum=None)")
        nodes = ends[-1][1] + 1
        return CellPlan(inputs, nodes, first.channels, first.K, tuple(described), tuple(norms))

    def branch(self, name: str, op: nn.Module, edge: EdgeModule) -> Branch:
        if name not in _READERS:
            raise Unsupported(f"the primitive {name}")
        return _READERS[name](self, op, edge.channels // edge.K, edge.stride)

    def norm(self, module: nn.Module, channels: int) -> int:
        if not isinstance(module, nn.BatchNorm2d) or type(module) not in BATCH_NORMS:
            raise Unsupported(f"{type(module).__name__} where a BatchNorm2d was expected")
        if module.num_features != channels:
            raise Unsupported("a BatchNorm of another width")
        self.norms.append(module)
        return len(self.norms) - 1

    def none(self, op: nn.Module, channels: int, stride: int) -> Branch:
        return Branch(Op.NONE)

    def noise(self, op: nn.Module, channels: int, stride: int) -> Branch:
        self.noises += 1
        return Branch(Op.NOISE, noise=self.noises - 1)

    def pool(self, op: nn.Module, channels: int, stride: int) -> Branch:
        pool, norm = op if isinstance(op, nn.Sequential) and len(op) == 2 else (op, None)
        if type(pool) not in (nn.MaxPool2d, nn.AvgPool2d) or (
            (pool.kernel_size, pool.stride, pool.padding) != (3, stride, 1)
        ):
            raise Unsupported("a pool of an unexpected shape")
        # torch averages over the padding too unless told not to: every published supernet tells it
        if isinstance(pool, nn.AvgPool2d) and pool.count_include_pad:
            raise Unsupported("an average pool that counts its padding")
        code = Op.MAX_POOL if isinstance(pool, nn.MaxPool2d) else Op.AVG_POOL
        if norm is not None:
            self.modules.add(op, "0", "1")
            return Branch(code, norm=self.norm(norm, channels))
        if code is Op.MAX_POOL or stride == 2:
            raise Unsupported("a max pool or a pool of stride 2 without BatchNorm")
        return Branch(code)

    def skip(self, op: nn.Module, channels: int, stride: int) -> Branch:
        if isinstance(op, nn.Identity):
            if stride != 1:
                raise Unsupported("an identity with stride 2")
            return Branch(Op.IDENTITY)
        one, two, norm = (getattr(op, part, None) for part in ("conv_1", "conv_2", "bn"))
        if not isinstance(one, nn.Conv2d) or not isinstance(two, nn.Conv2d) or norm is None or stride != 2:
            raise Unsupported("a skip connection that is neither an identity nor a FactorizedReduce")
        for conv in (one, two):
            shape = (conv.in_channels, conv.kernel_size, conv.stride, conv.padding, conv.bias)
            if shape != (channels, (1, 1), (2, 2), (0, 0), None):
                raise Unsupported("a FactorizedReduce of an unexpected shape")
        if (one.out_channels, two.out_channels) != (channels // 2, channels - channels // 2):
            raise Unsupported("a FactorizedReduce of an unexpected shape")
        self.modules.add(op, "conv_1", "conv_2", "bn")
        return Branch(Op.REDUCE, convs=(one, two), norm=self.norm(norm, channels))

    def separable(self, op: nn.Module, channels: int, stride: int) -> Branch:
        """SepConv, two halves of [ReLU, depthwise, pointwise, BatchNorm], or DilConv, one."""
        layers = getattr(op, "op", None)
        if not isinstance(layers, nn.Sequential) or len(layers) not in (4, 8):
            raise Unsupported("a separable convolution with unexpected layers")
        self.modules.add(op, "op")
        self.modules.add(layers, *layers._modules)
        halves = [[*layers][first : first + 4] for first in range(0, len(layers), 4)]
        shapes = [
            _kernel_and_dilation(half, channels, stride if i == 0 else 1) for i, half in enumerate(halves)
        ]
        if len({*shapes}) > 1:
            raise Unsupported("a separable convolution with two different halves")
        convs = tuple(conv for half in halves for conv in half[1:3])
        norms = [self.norm(half[3], channels) for half in halves]
        code = Op.SEP_CONV if len(halves) == 2 else Op.DIL_CONV
        inner = norms[0] if len(halves) == 2 else -1
        return Branch(code, *shapes[0], convs=convs, norm=norms[-1], inner_norm=inner)  # type: ignore[arg-type]

    def nor_conv(self, op: nn.Module, channels: int, stride: int) -> Branch:
        """ReLUConvBN of NAS-Bench-201, an ordinary 1x1 or 3x3 convolution."""
        layers = getattr(op, "op", None)
        if not isinstance(layers, nn.Sequential) or len(layers) != 3:
            raise Unsupported("a ReLU-conv-BN of unexpected layers")
        relu, conv, norm = layers
        if type(relu) is not nn.ReLU or type(conv) is not nn.Conv2d or stride != 1:
            raise Unsupported("a ReLU-conv-BN of unexpected layers or stride 2")
        kernel = conv.kernel_size[0]
        regular = (
            kernel in (1, 3)
            and conv.in_channels == conv.out_channels == channels
            and (conv.kernel_size, conv.stride) == ((kernel, kernel), (1, 1))
            and (conv.padding, conv.dilation, conv.groups) == ((kernel // 2, kernel // 2), (1, 1), 1)
            and conv.bias is None
            and conv.padding_mode == "zeros"
        )
        if not regular:
            raise Unsupported("a convolution of an unexpected shape")
        self.modules.add(op, "op")
        self.modules.add(layers, *layers._modules)
        return Branch(Op.NOR_CONV, kernel, convs=(conv,), norm=self.norm(norm, channels))


def _kernel_and_dilation(half: Sequence[nn.Module], channels: int, stride: int) -> tuple[int, int]:
    """Kernel size and dilation of [ReLU, depthwise, pointwise, BatchNorm], checked to be just that."""
    relu, depthwise, pointwise, _ = half
    if (type(relu), type(depthwise), type(pointwise)) != (nn.ReLU, nn.Conv2d, nn.Conv2d):
        raise Unsupported("a separable convolution with unexpected layers")
    assert isinstance(depthwise, nn.Conv2d) and isinstance(pointwise, nn.Conv2d)
    kernel, dilation = depthwise.kernel_size[0], depthwise.dilation[0]
    if (kernel, dilation) not in ((3, 1), (5, 1), (3, 2), (5, 2)):
        raise Unsupported(f"a {kernel}x{kernel} depthwise convolution with dilation {dilation}")
    padding = dilation * (kernel - 1) // 2
    regular = (
        depthwise.groups == depthwise.in_channels == depthwise.out_channels == channels
        and pointwise.in_channels == pointwise.out_channels == channels
        and depthwise.kernel_size == (kernel, kernel)
        and depthwise.dilation == (dilation, dilation)
        and depthwise.stride == (stride, stride)
        and depthwise.padding == (padding, padding)
        and (pointwise.kernel_size, pointwise.stride) == ((1, 1), (1, 1))
        and (pointwise.padding, pointwise.groups) == ((0, 0), 1)
        and depthwise.bias is None
        and pointwise.bias is None
        and depthwise.padding_mode == "zeros"
    )
    if not regular:
        raise Unsupported("a separable convolution of an unexpected shape")
    return kernel, dilation


# a primitive that is not here is left to the reference
_READERS: dict[str, Callable[[_Reader, nn.Module, int, int], Branch]] = {
    "none": _Reader.none,
    "noise": _Reader.noise,
    "max_pool_3x3": _Reader.pool,
    "avg_pool_3x3": _Reader.pool,
    "skip_connect": _Reader.skip,
    "sep_conv_3x3": _Reader.separable,
    "sep_conv_5x5": _Reader.separable,
    "dil_conv_3x3": _Reader.separable,
    "dil_conv_5x5": _Reader.separable,
    "nor_conv_1x1": _Reader.nor_conv,
    "nor_conv_3x3": _Reader.nor_conv,
}
