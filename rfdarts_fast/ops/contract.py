"""The contract between the package and its kernels: cells, edges, branches, ReLU-conv-BN layers, backends.

`ops.plan` describes a cell's modules once, in the dataclasses below; compiled backends take
`CellPlan.encoded`, Triton reads the objects. A backend is any object that follows the `Backend` protocol and
was registered.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from operator import attrgetter, itemgetter
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from rfdarts_fast.ops.snapshot import Snapshot

Memory = Literal["fast", "bfloat16", "recompute"]
"""Branch outputs kept from forward to backward: all, all in bfloat16, or none. See `use_backend`."""
Value = TypeVar("Value")


class EdgeModule(Protocol):
    """A mixed op as a module; `rfdarts_fast.nn.MixedOp` is one.

    Attributes:
        primitives: names of the candidates, in the space's order.
        _ops: the candidates as modules, in the same order; each maps [N, C/K, H, W] to [N, C/K, H', W'].
        channels: C, all channels of the edge.
        stride: 1 or 2.
        K: 1/K of the channels are mixed, the others bypass.
    """

    primitives: tuple[str, ...]
    _ops: nn.ModuleList
    channels: int
    stride: int
    K: int


def uses_batch_statistics(norm: nn.BatchNorm2d) -> bool:
    """True if a BatchNorm normalises by the batch's moments, not by running ones."""
    return norm.training or norm.running_mean is None


class ReLUConvBNLayer(NamedTuple):
    """ReLU, convolution, BatchNorm; FactorizedReduce has two convolutions, the second a pixel further on."""

    convs: tuple[nn.Conv2d, ...]
    norm: nn.BatchNorm2d

    @property
    def reduce(self) -> bool:
        return len(self.convs) == 2

    @property
    def uses_batch_statistics(self) -> bool:
        return uses_batch_statistics(self.norm)

    def pixels(self, x: Tensor) -> int:
        """Values per channel that the layer makes of x [N, C, H, W]: N * H' * W'."""
        stride = len(self.convs)
        return x.shape[0] * (x.shape[2] // stride) * (x.shape[3] // stride)


class Op(IntEnum):
    """Operations of branches; the numbers of csrc/include/rfdarts/cell.h."""

    NONE = 0
    MAX_POOL = 1
    AVG_POOL = 2
    IDENTITY = 3
    REDUCE = 4
    SEP_CONV = 5
    DIL_CONV = 6
    NOISE = 7
    NOR_CONV = 8


_OUTPUTS = {Op.SEP_CONV: 2, Op.DIL_CONV: 1, Op.REDUCE: 1, Op.NOR_CONV: 1}


@dataclass(frozen=True)
class Branch:
    """One candidate operation of an edge.

    Attributes:
        kernel, dilation: of depthwise convolutions and NOR_CONV, which has no dilation, else 0.
        convs: frozen convolutions: [depthwise, pointwise] once (DIL_CONV) or twice (SEP_CONV), or the two of
            FactorizedReduce (REDUCE), or one from all channels to all (NOR_CONV).
        norm: row of the last BatchNorm in gamma, beta and moments; -1 without one.
        inner_norm: row of the BatchNorm between the halves of SEP_CONV, else -1.
        noise: index of the drawn tensor of NOISE, else -1.
    """

    op: Op
    kernel: int = 0
    dilation: int = 0
    convs: tuple[nn.Conv2d, ...] = ()
    norm: int = -1
    inner_norm: int = -1
    noise: int = -1

    @property
    def outputs(self) -> int:
        """Outputs that compiled cells keep for their backward: one for each BatchNorm behind a convolution,
        but none of a 1x1 NOR_CONV, which are made again."""
        return 0 if self.op is Op.NOR_CONV and self.kernel == 1 else _OUTPUTS.get(self.op, 0)

    def packed_size(self, channels: int) -> int:
        """Numbers in the packed convolutions, for so many mixed channels; see `compiled.packing`."""
        if self.op is Op.NOR_CONV:
            return (2 if self.kernel == 1 else 2 * (9 + 16)) * channels * channels
        return self.outputs * channels * (self.kernel * self.kernel + 2 * channels)


@dataclass(frozen=True)
class Edge:
    """One mixed op: from state `source` (inputs first, then nodes) to node `node`."""

    source: int
    node: int
    stride: int
    branches: tuple[Branch, ...]


class FrozenConvs:
    """Frozen convolutions, and what is made of their weights: made again when one of them has changed.

    Attributes:
        convs: the modules, in packing order.
    """

    def __init__(self, convs: Sequence[nn.Conv2d]) -> None:
        self.convs = tuple(convs)
        # a module never exchanges this dictionary
        self._parameters = [conv._parameters for conv in convs]
        self._packed: dict[Hashable, tuple[Snapshot, Any]] = {}

    def weights(self) -> list[Tensor]:
        return [*map(_weight, self._parameters)]

    def packed(self, key: Hashable, pack: Callable[[], Value]) -> Value:
        """The value of `pack()`, kept under `key` until a weight changes."""
        weights = self.weights()
        kept = self._packed.get(key)
        if kept is None or not kept[0].still_holds(weights):
            # what inference mode makes could not be saved for a backward
            with torch.inference_mode(False), torch.no_grad():
                kept = self._packed[key] = Snapshot(weights), pack()
        return kept[1]

    def unsupported_reason(self, dtype: torch.dtype) -> str | None:
        """The reason why kernels that compute in `dtype` cannot use the weights, or None."""
        weights = self.weights()
        if any(map(_requires_grad, weights)):
            return "a convolution is trained; the kernels have no weight gradients"
        if not {*map(_dtype, weights)} <= {dtype}:
            return "convolutions and inputs of different dtypes"
        return None


@dataclass(frozen=True, eq=False)
class CellPlan:
    """A cell of mixed ops as kernels see it, and its modules' parameters.

    Attributes:
        inputs, nodes: states that enter, and that are computed.
        channels: C of every state; C / K of them are mixed.
        edges: by node, then by source; every node has an edge from each earlier state.
        norms: all BatchNorms, in the order of the rows of gamma, beta and moments.
        frozen: all convolutions of the branches, in the order of edges and primitives.
    """

    inputs: int
    nodes: int
    channels: int
    K: int
    edges: tuple[Edge, ...]
    norms: tuple[nn.BatchNorm2d, ...]
    frozen: FrozenConvs = field(init=False)

    def __post_init__(self) -> None:
        convs = [conv for branch in self.branches() for conv in branch.convs]
        object.__setattr__(self, "frozen", FrozenConvs(convs))

    def branches(self) -> list[Branch]:
        return [branch for edge in self.edges for branch in edge.branches]

    @property
    def primitives(self) -> int:
        return len(self.edges[0].branches)

    @property
    def mixed_channels(self) -> int:
        return self.channels // self.K

    @cached_property
    def stride(self) -> int:
        """2 for a cell that halves the resolution of its inputs, else 1."""
        return max(edge.stride for edge in self.edges)

    @cached_property
    def noises(self) -> int:
        return sum(branch.op is Op.NOISE for branch in self.branches())

    @property
    def eps(self) -> float:
        return self.norms[0].eps if self.norms else 1e-5

    @property
    def momentum(self) -> float:
        return float(self.norms[0].momentum or 0.0) if self.norms else 0.0

    @cached_property
    def encoded(self) -> list[int]:
        """The description as csrc/core/cell.cpp reads it: inputs, nodes, primitives, norms, K; for every edge
        its stride and for every branch op, kernel, dilation, offset of its packed weights, norm, inner norm,
        noise."""
        numbers = [self.inputs, self.nodes, self.primitives, len(self.norms), self.K]
        offset = 0
        for edge in self.edges:
            numbers.append(edge.stride)
            for b in edge.branches:
                at = offset if b.convs else 0
                numbers += [b.op, b.kernel, b.dilation, at, b.norm, b.inner_norm, b.noise]
                offset += b.packed_size(self.mixed_channels)
        return [int(number) for number in numbers]

    # hundreds of modules are looked at in each call, so through their dictionaries, which they never exchange
    @cached_property
    def _norm_parameters(self) -> list[dict]:
        return [norm._parameters for norm in self.norms]

    @cached_property
    def _norm_buffers(self) -> list[dict]:
        return [norm._buffers for norm in self.norms]

    def gamma_beta(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """gamma and beta [norms, C/K] of all BatchNorms, 1 and 0 where one has none, in the dtype and on the
        device of `like`; autograd leads back to the parameters."""
        if not self.norms:
            empty = like.new_empty(0, self.mixed_channels)
            return empty, empty
        gammas, betas = ([*map(name, self._norm_parameters)] for name in (_weight, _bias))
        if any(gamma is None for gamma in gammas):
            one, zero = like.new_ones(self.mixed_channels), like.new_zeros(self.mixed_channels)
            gammas = [one if gamma is None else gamma for gamma in gammas]
            betas = [zero if beta is None else beta for beta in betas]
        return torch.stack(gammas), torch.stack(betas)

    def running_stats(self) -> tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None]]:
        """Running means, variances and numbers of batches of all BatchNorms; None where not tracked."""
        buffers = self._norm_buffers
        return [*map(_mean, buffers)], [*map(_variance, buffers)], [*map(_batches, buffers)]

    def running_moments(self) -> Tensor:
        """Running means and variances [2, norms, C/K] in float64."""
        means, variances, _ = self.running_stats()
        return torch.stack([torch.stack(means), torch.stack(variances)]).double()  # type: ignore[arg-type]

    def uses_batch_statistics(self) -> bool | None:
        """True if the BatchNorms use the batch's statistics; None where some do and some do not."""
        modes = {*map(_training, self.norms)}
        if modes != {True}:
            means = self.running_stats()[0]
            modes = {norm.training or mean is None for norm, mean in zip(self.norms, means, strict=True)}
        if len(modes) > 1:
            return None
        return modes.pop() if modes else True

    def unsupported_reason(self, inputs: Sequence[Tensor], dtype: torch.dtype) -> str | None:
        """The reason why no kernels that compute in `dtype` can take the cell with these inputs, or None."""
        for x in inputs:
            if x.dim() != 4 or x.numel() == 0:
                return "inputs that are not [N, C, H, W], or empty"
            if x.shape[1] != self.channels:
                return f"inputs of {x.shape[1]} channels for edges of {self.channels}"
        if self.stride == 2 and any(x.shape[2] % 2 or x.shape[3] % 2 for x in inputs):
            return "a reduction of an odd image size"
        reason = self.frozen.unsupported_reason(dtype)
        if reason is not None:
            return reason
        gammas = map(_weight, self._norm_parameters)
        if not {gamma.dtype for gamma in gammas if gamma is not None} <= {dtype}:
            return "BatchNorms and inputs of different dtypes"
        return None


class CellShape(NamedTuple):
    """The sizes in an encoded cell."""

    inputs: int
    nodes: int
    primitives: int
    norms: int
    K: int
    stride: int
    edges: int
    branches: list[Branch]

    @classmethod
    def of(cls, encoded: Sequence[int]) -> CellShape:
        inputs, nodes, primitives, norms, K = encoded[:5]
        width = 1 + 7 * primitives
        starts = [at for edge in range(5, len(encoded), width) for at in range(edge + 1, edge + width, 7)]
        branches = [Branch(Op(encoded[at]), encoded[at + 1], encoded[at + 2]) for at in starts]
        return cls(inputs, nodes, primitives, norms, K, encoded[5], len(starts) // primitives, branches)


@dataclass(frozen=True, eq=False)
class CellCall:
    """One call of a cell.

    Attributes:
        inputs: the states that enter, [N, C, H, W] each.
        op_weights: softmax of the alphas, [edges, primitives].
        edge_weights: PC-DARTS's edge weights [edges], or None for 1.
        training: BatchNorms use the batch's statistics.
        memory: what to keep for the backward; see `use_backend`.
        concat: the result is the nodes concatenated.
        recompute: branch outputs are computed again in the backward, whatever `memory` keeps of them.
        synchronised: the batch is that of all processes, which exchange sums (`SynchronisedBatchNorm2d`).
    """

    plan: CellPlan
    inputs: Sequence[Tensor]
    op_weights: Tensor
    edge_weights: Tensor | None = None
    training: bool = True
    memory: Memory = "fast"
    concat: bool = False
    recompute: bool = False
    synchronised: bool = False

    @property
    def output_size(self) -> tuple[int, int, int]:
        """N, H' and W' of the nodes."""
        n, _, h, w = self.inputs[0].shape
        return n, h // self.plan.stride, w // self.plan.stride

    def pixels(self) -> int:
        """Values per channel behind a BatchNorm's statistics. Raises ValueError, as BatchNorm2d does, where a
        single one would be normalised."""
        n, h, w = self.output_size
        if self.training and self.plan.norms and n * h * w == 1 and not self.synchronised:
            raise ValueError("batch: BatchNorm in training mode needs more than one value per channel")
        return n * h * w


class Backend(Protocol):
    """A way to compute mixed ops and ReLU-conv-BN layers.

    Attributes:
        name: what `use_backend` and `--backend` call it.
        priority: `auto` asks the backend with the highest one first.
        devices: types of device ("cpu", "cuda") for which `auto` asks it; by name it is asked for any.
        synchronises: it takes calls and layers with `SynchronisedBatchNorm2d` in several processes; others
            never see them.
    """

    name: str
    priority: int
    devices: frozenset[str]
    synchronises: bool

    def unsupported_cell(self, call: CellCall) -> str | None:
        """The reason why `mixed_cell` cannot take the call, or None."""

    def mixed_cell(self, call: CellCall) -> list[Tensor]:
        """The states of all nodes, [N, C, H', W'] each; with `concat` one tensor [N, nodes * C, H', W'].

        Requires `unsupported_cell(call) is None`. Updates running statistics as BatchNorm2d does.
        """

    def kept_outputs(self, plan: CellPlan) -> int:
        """Outputs [N, C/K, H', W'] of branches that a cell keeps for its backward, as a memory budget counts
        them."""

    def unsupported_layer(self, x: Tensor, layer: ReLUConvBNLayer) -> str | None:
        """The reason why `relu_conv_bns` cannot take the layer, or None."""

    def relu_conv_bns(self, x: Tensor, layers: Sequence[ReLUConvBNLayer], memory: Memory) -> list[Tensor]:
        """norm(conv(relu(x))) for each layer, [N, C', H', W'].

        Requires `unsupported_layer(x, layer) is None` of each. Updates running statistics as BatchNorm2d
        does.
        """

    def status(self) -> dict[str, str | bool]:
        """The facts that `rfdarts env` prints: `built`, `reason` where it cannot run, and others."""


@runtime_checkable
class BatchNormBackend(Protocol):
    """A backend that computes BatchNorms by themselves too, as a stem has them between its convolutions."""

    def unsupported_batch_norm(self, x: Tensor, norm: nn.BatchNorm2d) -> str | None:
        """The reason why `batch_norm` cannot take the call, or None."""

    def batch_norm(self, x: Tensor, norm: nn.BatchNorm2d, relu: bool) -> Tensor:
        """norm(x), or its ReLU, [N, C, H, W].

        Requires `unsupported_batch_norm(x, norm) is None`. Updates running statistics as BatchNorm2d does.
        """


def cuda_status(unavailable_reason: Callable[[int], str | None]) -> dict[str, str]:
    """The facts of `Backend.status` about CUDA devices: `reason` where none runs the kernels, or that of each
    which does not."""
    reasons = [unavailable_reason(device) for device in range(torch.cuda.device_count() or 1)]
    if None not in reasons:
        return {"reason": str(reasons[0])}
    return {f"not on device {i}": reason for i, reason in enumerate(reasons) if reason is not None}


_backends: dict[str, Backend] = {}


def register_backend(backend: Backend) -> None:
    """Makes a backend known to `use_backend`, `--backend` and `auto`.

    Raises:
        ValueError: if its name is taken.
    """
    if backend.name in ("auto", "reference", *_backends):
        raise ValueError(f"backend: expected a name of its own, got {backend.name!r}")
    _backends[backend.name] = backend
    # in the order in which `auto` asks
    ordered = sorted(_backends.items(), key=lambda item: -item[1].priority)
    _backends.clear()
    _backends.update(ordered)


def backends() -> Mapping[str, Backend]:
    """The registered backends by name, the one that `auto` asks first at the front."""
    return MappingProxyType(_backends)


_weight, _bias, _mean, _variance, _batches = map(
    itemgetter, ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
)
_dtype, _requires_grad, _training = map(attrgetter, ("dtype", "requires_grad", "training"))
