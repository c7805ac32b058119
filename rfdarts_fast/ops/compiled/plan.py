"""What the compiled engine needs to know of a cell's modules: found once, checked at each call."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from operator import attrgetter, itemgetter

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from rfdarts_fast.ops.reference import Edge


class Op(IntEnum):
    """The numbers of csrc/core/cell.h."""

    NONE = 0
    MAX_POOL = 1
    AVG_POOL = 2
    IDENTITY = 3
    REDUCE = 4
    SEP_CONV = 5
    DIL_CONV = 6
    NOISE = 7


class Unsupported(Exception):
    """The compiled engine has no kernel for this; the message says for what."""


# mapped over lists, for hundreds of modules are looked at in each call
_weight, _bias, _mean, _variance, _batches = map(
    itemgetter, ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
)
_version, _dtype, _requires_grad, _training = map(
    attrgetter, ("_version", "dtype", "requires_grad", "training")
)


@dataclass
class Plan:
    """A cell in the terms of the kernels.

    Attributes:
        spec: the flat description that the ops take.
        norms: all BatchNorms, in the order of the rows of gamma, beta and the moments.
        convs: groups of convolutions whose weights are packed together, in packing order.
        conv_parameters, norm_parameters, norm_buffers: the modules' own dictionaries, read in every call;
            a module never exchanges them.
        parents, names, modules: where each module was found, so that a replaced one is noticed.
    """

    spec: list[int] = field(default_factory=list)
    norms: list[nn.BatchNorm2d] = field(default_factory=list)
    convs: list[nn.Conv2d] = field(default_factory=list)
    conv_parameters: list[dict] = field(default_factory=list)
    norm_parameters: list[dict] = field(default_factory=list)
    norm_buffers: list[dict] = field(default_factory=list)
    parents: list[dict] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    modules: list[nn.Module | None] = field(default_factory=list)
    noises: int = 0
    channels: int = 0
    K: int = 1
    stride: int = 1
    packed: Tensor | None = None
    packed_from: tuple = ()
    packers: list = field(default_factory=list)
    size: int = 0

    def current(self) -> bool:
        return [*map(dict.get, self.parents, self.names)] == self.modules

    def conv_weights(self) -> list[Tensor]:
        return [*map(_weight, self.conv_parameters)]

    def gammas(self) -> list[Tensor | None]:
        return [*map(_weight, self.norm_parameters)]

    def betas(self) -> list[Tensor | None]:
        return [*map(_bias, self.norm_parameters)]

    def running(self) -> tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None]]:
        """Running means, variances and counts of batches of all BatchNorms; None where not tracked."""
        buffers = self.norm_buffers
        return [*map(_mean, buffers)], [*map(_variance, buffers)], [*map(_batches, buffers)]

    def objection(self, dtype: torch.dtype) -> str | None:
        """What about the parameters keeps the kernels from computing in `dtype`, or None."""
        weights = self.conv_weights()
        if any(map(_requires_grad, weights)):
            return "a convolution is trained; the kernels have no weight gradients"
        if not {*map(_dtype, weights)} <= {dtype}:
            return "convolutions and inputs of different dtypes"
        if not {gamma.dtype for gamma in self.gammas() if gamma is not None} <= {dtype}:
            return "BatchNorms and inputs of different dtypes"
        mode = training_mode(self)
        return mode if isinstance(mode, str) else None

    def conv_state(self) -> tuple[list, ...]:
        """What differs when a convolution has changed."""
        tensors = self.conv_weights()
        # tensors without data, for tracing, have no address
        address = id if any(isinstance(t, FakeTensor) for t in tensors[:1]) else Tensor.data_ptr
        return [*map(address, tensors)], [*map(_version, tensors)], [*map(_dtype, tensors)]

    def weights(self, dtype: torch.dtype) -> Tensor:
        """All frozen convolutions in one vector of their dtype, packed again when one has changed."""
        state = self.conv_state()
        if self.packed is None or state != self.packed_from:
            with torch.no_grad():
                parts = [part.reshape(-1) for pack in self.packers for part in pack()]
                self.packed = torch.cat(parts) if parts else torch.empty(0)
            self.packed_from = state
        # only a cell without convolutions has another one
        return self.packed.to(dtype)


_plans: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[int, ...], Plan | str]] = weakref.WeakKeyDictionary()


def plan_of(edges: Sequence[Edge], inputs: int, check: bool = True) -> Plan | str:
    """The plan of a cell, or the reason why there is none. check=False: right after a call that did check."""
    key = (inputs, *map(id, edges))
    plan: Plan | str
    made_for, plan = _plans.get(edges[0], ((), ""))  # type: ignore[call-overload]
    if made_for == key and (isinstance(plan, str) or not check or plan.current()):
        return plan
    try:
        plan = _make(edges, inputs)
    except Unsupported as reason:
        plan = str(reason)
    _plans[edges[0]] = (key, plan)  # type: ignore[index]
    return plan


def _make(edges: Sequence[Edge], inputs: int) -> Plan:
    plan = Plan()
    first = edges[0]
    primitives = len(first.primitives)
    nodes, count = 0, 0
    while count < len(edges):
        count += inputs + nodes
        nodes += 1
    if count != len(edges):
        raise Unsupported(f"{len(edges)} edges are no whole number of nodes with {inputs} inputs")
    plan.channels, plan.K = first.channels, first.K
    if first.channels % first.K:
        raise Unsupported(f"K={first.K} does not divide {first.channels} channels")
    body: list[int] = []
    for edge in edges:
        if (edge.channels, edge.K, len(edge.primitives)) != (first.channels, first.K, primitives):
            raise Unsupported("edges of different width or number of primitives in one cell")
        if len(set(edge.primitives)) != primitives:
            raise Unsupported("a primitive that occurs twice on an edge")
        body.append(edge.stride)
        _watch(plan, edge._ops, *edge._ops._modules)
        for name, op in zip(edge.primitives, edge._ops, strict=True):
            body += _branch(plan, name, op, edge)
    plan.stride = max(edge.stride for edge in edges)
    if any(norm.eps != plan.norms[0].eps or norm.momentum != plan.norms[0].momentum for norm in plan.norms):
        raise Unsupported("BatchNorms with different eps or momentum in one cell")
    if plan.norms and plan.norms[0].momentum is None:
        raise Unsupported("BatchNorm with a cumulative average (momentum=None)")
    plan.spec = [inputs, nodes, primitives, len(plan.norms), first.K, *body]
    plan.conv_parameters = [conv._parameters for conv in plan.convs]
    plan.norm_parameters = [norm._parameters for norm in plan.norms]
    plan.norm_buffers = [norm._buffers for norm in plan.norms]
    return plan


def _watch(plan: Plan, parent: nn.Module, *names: str) -> None:
    for name in names:
        plan.parents.append(parent._modules)
        plan.names.append(name)
        plan.modules.append(parent._modules[name])


def _norm(plan: Plan, module: nn.Module, channels: int) -> int:
    if type(module) is not nn.BatchNorm2d:
        raise Unsupported(f"{type(module).__name__} where a BatchNorm2d was expected")
    if module.num_features != channels:
        raise Unsupported("a BatchNorm of another width")
    plan.norms.append(module)
    return len(plan.norms) - 1


def _pack_pair(depthwise: nn.Conv2d, pointwise: nn.Conv2d) -> list[Tensor]:
    dw, pw = depthwise.weight, pointwise.weight
    return [dw.flatten(1).t(), pw.flatten(1).t(), pw.flatten(1)]


def pack_reduce(one: nn.Conv2d, two: nn.Conv2d) -> list[Tensor]:
    """FactorizedReduce's two convolutions as one matrix [2 C, C'], and its transpose."""
    a, b = one.weight.flatten(1).t(), two.weight.flatten(1).t()
    both = torch.cat([torch.cat([a, torch.zeros_like(b)], 1), torch.cat([torch.zeros_like(a), b], 1)])
    return [both, both.t()]


def _conv_pair(plan: Plan, layers: list[nn.Module], channels: int, stride: int) -> tuple[int, int]:
    """Checks [ReLU, depthwise, pointwise, BatchNorm] and packs it; returns kernel and dilation."""
    relu, dw, pw, _ = layers
    if type(relu) is not nn.ReLU or type(dw) is not nn.Conv2d or type(pw) is not nn.Conv2d:
        raise Unsupported("a separable convolution with unexpected layers")
    kernel, dilation = dw.kernel_size[0], dw.dilation[0]
    if (kernel, dilation) not in ((3, 1), (5, 1), (3, 2), (5, 2)):
        raise Unsupported(f"a {kernel}x{kernel} depthwise convolution with dilation {dilation}")
    padding = dilation * (kernel - 1) // 2
    regular = (
        dw.groups == dw.in_channels == dw.out_channels == pw.in_channels == pw.out_channels == channels
        and dw.kernel_size == (kernel, kernel)
        and dw.dilation == (dilation, dilation)
        and dw.stride == (stride, stride)
        and dw.padding == (padding, padding)
        and (pw.kernel_size, pw.stride, pw.padding, pw.groups) == ((1, 1), (1, 1), (0, 0), 1)
        and dw.bias is None
        and pw.bias is None
        and dw.padding_mode == "zeros"
    )
    if not regular:
        raise Unsupported("a separable convolution of an unexpected shape")
    plan.convs += [dw, pw]
    plan.packers.append(lambda: _pack_pair(dw, pw))
    plan.size += channels * (kernel * kernel + 2 * channels)
    return kernel, dilation


def _branch(plan: Plan, name: str, op: nn.Module, edge: Edge) -> list[int]:
    """(op, kernel, dilation, weight, norm, inner norm, noise) of one primitive."""
    channels = edge.channels // edge.K
    if name == "none":
        return [Op.NONE, 0, 0, 0, -1, -1, -1]
    if name == "noise":
        plan.noises += 1
        return [Op.NOISE, 0, 0, 0, -1, -1, plan.noises - 1]
    if name in ("max_pool_3x3", "avg_pool_3x3"):
        if not isinstance(op, nn.Sequential) or len(op) != 2:
            raise Unsupported("a pool without BatchNorm")
        pool = op[0]
        kind = nn.MaxPool2d if name == "max_pool_3x3" else nn.AvgPool2d
        if type(pool) is not kind or (pool.kernel_size, pool.stride, pool.padding) != (3, edge.stride, 1):
            raise Unsupported("a pool of an unexpected shape")
        # torch averages over the padding too unless told not to: every published supernet tells it
        if isinstance(pool, nn.AvgPool2d) and pool.count_include_pad:
            raise Unsupported("an average pool that counts its padding")
        _watch(plan, op, "0", "1")
        code = Op.MAX_POOL if kind is nn.MaxPool2d else Op.AVG_POOL
        return [code, 0, 0, 0, _norm(plan, op[1], channels), -1, -1]
    if name == "skip_connect" and isinstance(op, nn.Identity):
        if edge.stride != 1:
            raise Unsupported("an identity with stride 2")
        return [Op.IDENTITY, 0, 0, 0, -1, -1, -1]
    if name == "skip_connect":
        one, two, norm = (getattr(op, part, None) for part in ("conv_1", "conv_2", "bn"))
        if (
            not isinstance(one, nn.Conv2d)
            or not isinstance(two, nn.Conv2d)
            or norm is None
            or edge.stride != 2
        ):
            raise Unsupported("a skip connection that is neither an identity nor a FactorizedReduce")
        for conv in (one, two):
            shape = (conv.in_channels, conv.kernel_size, conv.stride, conv.padding, conv.bias)
            if shape != (channels, (1, 1), (2, 2), (0, 0), None):
                raise Unsupported("a FactorizedReduce of an unexpected shape")
        if one.out_channels + two.out_channels != channels:
            raise Unsupported("a FactorizedReduce of an unexpected shape")
        _watch(plan, op, "conv_1", "conv_2", "bn")
        at = plan.size
        plan.size += 4 * channels * channels
        plan.convs += [one, two]
        plan.packers.append(lambda: pack_reduce(one, two))
        return [Op.REDUCE, 0, 0, at, _norm(plan, norm, channels), -1, -1]
    if name.startswith(("sep_conv", "dil_conv")):
        layers = getattr(op, "op", None)
        if not isinstance(layers, nn.Sequential) or len(layers) not in (4, 8):
            raise Unsupported(f"{name} with unexpected layers")
        _watch(plan, op, "op")
        _watch(plan, layers, *layers._modules)
        at = plan.size
        kernel, dilation = _conv_pair(plan, list(layers)[:4], channels, edge.stride)
        norm = _norm(plan, layers[3], channels)
        if len(layers) == 4:
            return [Op.DIL_CONV, kernel, dilation, at, norm, -1, -1]
        if _conv_pair(plan, list(layers)[4:], channels, 1) != (kernel, dilation):
            raise Unsupported(f"{name} with two different halves")
        return [Op.SEP_CONV, kernel, dilation, at, _norm(plan, layers[7], channels), norm, -1]
    raise Unsupported(f"the primitive {name}")


def training_mode(plan: Plan) -> bool | str:
    """Whether BatchNorms use batch statistics, or the reason why that has no single answer."""
    modes = {*map(_training, plan.norms)}
    if modes != {True}:
        means = plan.running()[0]
        modes = {norm.training or mean is None for norm, mean in zip(plan.norms, means, strict=True)}
    if len(modes) > 1:
        return "BatchNorms in training and in evaluation mode in one cell"
    return modes.pop() if modes else True


def gamma_beta(plan: Plan, like: Tensor) -> tuple[Tensor, Tensor]:
    """gamma and beta [norms, C/K] of all BatchNorms; autograd leads back to the parameters."""
    width = plan.channels // plan.K
    if not plan.norms:
        empty = like.new_empty(0, width)
        return empty, empty
    gammas, betas = plan.gammas(), plan.betas()
    if any(gamma is None for gamma in gammas):
        one, zero = like.new_ones(width), like.new_zeros(width)
        gammas = [one if g is None else g for g in gammas]
        betas = [zero if b is None else b for b in betas]
    return torch.stack(gammas), torch.stack(betas)  # type: ignore[arg-type]


def running_moments(plan: Plan) -> Tensor:
    """Running mean and variance [2, norms, C/K] in double."""
    means, variances, _ = plan.running()
    return torch.stack([torch.stack(means), torch.stack(variances)]).double()  # type: ignore[arg-type]


@torch.no_grad()
def update_running(plan: Plan, moments: Tensor, count: int) -> None:
    """Running statistics as BatchNorm2d in training mode updates them; the variance unbiased."""
    means, variances, batches = plan.running()
    norms = plan.norms
    tracked = [i for i, mean in enumerate(means) if mean is not None and norms[i].training]
    if not tracked:
        return
    if len(tracked) < len(norms):
        means, variances, batches = ([list_[i] for i in tracked] for list_ in (means, variances, batches))
        moments = moments[:, tracked].contiguous()
    momentum = float(norms[0].momentum or 0.0)
    torch.ops.rfdarts.update_running_stats(means, variances, batches, moments, momentum, count)
