"""The part of a compiled backend that the CPU's and CUDA's share: from a call to the ops of csrc and back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rfdarts_fast.ops.compiled.autograd import (
    CellFunction,
    CellOptions,
    LayerOptions,
    ReLUConvBNFunction,
    channels_inside,
    channels_last,
)
from rfdarts_fast.ops.compiled.packing import cell_weights, layer_weights
from rfdarts_fast.ops.contract import CellCall, CellPlan, Memory, ReLUConvBNLayer
from rfdarts_fast.ops.dtypes import parameter_dtype
from rfdarts_fast.ops.synchronised import BATCH_NORMS, images_of_all, synchronised


class CompiledBackend:
    """Cells and layers through the ops of csrc.

    Args:
        ops: namespace of the ops; torch.ops.rfdarts if None.
    """

    name: str
    priority: int
    devices: frozenset[str]
    synchronises = True

    def __init__(self, ops: Any = None) -> None:
        self._ops = torch.ops.rfdarts if ops is None else ops

    def storage_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype that states are computed in."""
        raise NotImplementedError

    def memory_of(self, memory: Memory, inputs: Sequence[Tensor]) -> Memory:
        """The memory mode that the device has for the one that was asked for."""
        raise NotImplementedError

    def products_of(self, storage: torch.dtype, channels: Iterable[int]) -> bool:
        """True if convolutions between so many channels multiply in bfloat16."""
        return False

    def mixed_cell(self, call: CellCall) -> list[Tensor]:
        """See `Backend.mixed_cell`.

        Raises:
            ValueError: for BatchNorms in training mode with a single value per channel, as BatchNorm2d.
        """
        plan, pixels = call.plan, call.pixels()
        all_images = images_of_all(call.inputs[0]) if call.synchronised else 0
        storage = self.storage_dtype(call.inputs[0])
        parameters = parameter_dtype(storage)
        inputs = [channels_inside(x.to(storage)) for x in call.inputs]
        op_weights = call.op_weights.to(parameters).contiguous()
        edge_weights = call.edge_weights
        if edge_weights is not None:
            edge_weights = edge_weights.to(parameters).contiguous()
        n, h, w = call.output_size
        shape = n, plan.mixed_channels, h, w
        noise = [
            channels_last(torch.randn(shape, dtype=storage, device=inputs[0].device))
            for _ in range(plan.noises)
        ]
        memory = self.memory_of(call.memory, call.inputs)
        products = self.products_of(storage, [plan.mixed_channels])
        *nodes, moments = CellFunction.apply(
            CellOptions(
                ops=self._ops,
                plan=plan,
                conv_weights=cell_weights(plan, parameters, products),
                bfloat16=memory == "bfloat16" and storage == torch.float32,
                bfloat16_products=products,
                recompute=memory == "recompute" or call.recompute,
                concat=call.concat,
                all_images=all_images,
            ),
            None if call.training else plan.running_moments(),
            noise,
            *plan.gamma_beta(op_weights),
            op_weights,
            edge_weights,
            *inputs,
        )
        if call.training:
            count = pixels // n * (all_images or n)
            self._update_running_stats(*plan.running_stats(), moments, plan.momentum, count)
        return nodes

    def kept_outputs(self, plan: CellPlan) -> int:
        """See `Backend.kept_outputs`."""
        return sum(branch.outputs for branch in plan.branches())

    def relu_conv_bns(self, x: Tensor, layers: Sequence[ReLUConvBNLayer], memory: Memory) -> list[Tensor]:
        """See `Backend.relu_conv_bns`. `memory` "recompute" keeps nothing but x for the backward.

        Raises:
            ValueError: in training mode with a single value per channel, as BatchNorm2d.
        """
        x = channels_inside(x.to(self.storage_dtype(x)))
        outputs: dict[int, Tensor] = {}
        for group in self.groups(layers):
            made = self._relu_conv_bns(x, [layers[i] for i in group], memory)
            outputs.update(zip(group, made, strict=True))
        return [outputs[i] for i in range(len(layers))]

    def groups(self, layers: Sequence[ReLUConvBNLayer]) -> list[list[int]]:
        """Indices of the layers that one op takes together: of one stride, eps and way to statistics."""
        groups: dict[tuple, list[int]] = {}
        for i, layer in enumerate(layers):
            shared = layer.reduce, layer.norm.eps, layer.uses_batch_statistics, synchronised([layer.norm])
            groups.setdefault(shared, []).append(i)
        return list(groups.values())

    def _relu_conv_bns(self, x: Tensor, layers: list[ReLUConvBNLayer], memory: Memory) -> list[Tensor]:
        first, norms = layers[0], [layer.norm for layer in layers]
        training, pixels = first.uses_batch_statistics, first.pixels(x)
        all_images = images_of_all(x) if synchronised(norms) else 0
        if training and pixels == 1 and not all_images:
            raise ValueError("batch: BatchNorm in training mode needs more than one value per channel")
        products = self.products_of(x.dtype, [x.shape[1], *(norm.num_features for norm in norms)])
        conv_weights = [layer_weights(layer, products) for layer in layers]
        like = conv_weights[0]
        gammas, betas = zip(*(gamma_beta(norm, like) for norm in norms), strict=True)
        options = LayerOptions(
            ops=self._ops,
            layers=layers,
            conv_weights=conv_weights,
            bfloat16_products=products,
            moments=[] if training else [*map(running_moments, norms)],
            recompute=memory == "recompute",
            all_images=all_images,
        )
        made = ReLUConvBNFunction.apply(options, x, *gammas, *betas)
        if training:
            count = pixels // x.shape[0] * (all_images or x.shape[0])
            for norm, moments in zip(norms, made[len(layers) :], strict=True):
                self._track(norm, moments, count)
        return list(made[: len(layers)])

    def _track(self, norm: nn.BatchNorm2d, moments: Tensor, pixels: int) -> None:
        """`_update_running_stats` of one BatchNorm, from moments [2, C]."""
        stats = [norm.running_mean], [norm.running_var], [norm.num_batches_tracked]
        self._update_running_stats(*stats, moments.unsqueeze(1), float(norm.momentum or 0.0), pixels)

    @torch.no_grad()
    def _update_running_stats(
        self,
        means: list[Tensor | None],
        variances: list[Tensor | None],
        batches: list[Tensor | None],
        moments: Tensor,
        momentum: float,
        pixels: int,
    ) -> None:
        """Moves tracked statistics towards `moments` [2, norms, C], as BatchNorm2d does in training mode."""
        tracked = [i for i, mean in enumerate(means) if mean is not None]
        if not tracked:
            return
        if len(tracked) < len(means):
            means, variances, batches = ([stats[i] for i in tracked] for stats in (means, variances, batches))
            moments = moments[:, tracked].contiguous()
        self._ops.update_running_stats(means, variances, batches, moments, momentum, pixels)


def gamma_beta(norm: nn.BatchNorm2d, like: Tensor) -> tuple[Tensor, Tensor]:
    """The scale and shift [C] of a BatchNorm, 1 and 0 in the dtype of `like` where it has none."""
    if norm.affine:
        return norm.weight, norm.bias
    return like.new_ones(norm.num_features), like.new_zeros(norm.num_features)


def running_moments(norm: nn.BatchNorm2d) -> Tensor:
    """Running mean and variance [2, C] in float64."""
    return torch.stack([norm.running_mean, norm.running_var]).double()  # type: ignore[list-item]


def unsupported_layer(x: Tensor, layer: ReLUConvBNLayer, dtype: torch.dtype) -> str | None:
    """The reason why no compiled kernels that compute in `dtype` can take the layer, or None."""
    convs, norm = layer
    if x.dim() != 4 or x.numel() == 0:
        return f"an input of shape {[*x.shape]}"
    stride = len(convs)
    if stride == 2 and (x.shape[2] % 2 or x.shape[3] % 2):
        return "a reduction of an odd image size"
    if stride == 2 and convs[0].out_channels != sum(conv.out_channels for conv in convs) // 2:
        return "a FactorizedReduce of unequal halves"
    for conv in convs:
        if type(conv) is not nn.Conv2d or conv.bias is not None or conv.groups != 1:
            return "a convolution of an unexpected shape"
        if (conv.kernel_size, conv.stride, conv.padding) != ((1, 1), (stride, stride), (0, 0)):
            return "a convolution that is not 1x1"
        if conv.weight.requires_grad:
            return "a convolution is trained; the kernels have no weight gradients"
        if conv.weight.dtype != dtype or conv.weight.device != x.device:
            return "convolution and input of different dtypes or devices"
    return unsupported_norm(norm, dtype)


def unsupported_norm(norm: nn.BatchNorm2d, dtype: torch.dtype) -> str | None:
    """The reason why no compiled kernels that compute in `dtype` can take the BatchNorm, or None."""
    if type(norm) not in BATCH_NORMS or norm.momentum is None:
        return "no BatchNorm2d with a fixed momentum"
    if norm.affine and norm.weight.dtype != dtype:
        return "BatchNorm and input of different dtypes"
    return None
