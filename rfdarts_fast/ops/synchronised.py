"""BatchNorm over the batches of all processes of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, library, nn


class _SumOfAll(torch.autograd.Function):
    """The sum of a tensor over all processes, and of its gradient likewise; any number of derivatives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _SumOfAll.apply(grads[0])


def several_processes() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def images_of_all(x: Tensor) -> int:
    """Images in the batches x [N, C, H, W] of all processes; one message."""
    images = torch.tensor([x.shape[0]], device=x.device)
    dist.all_reduce(images)
    return int(images)


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """F.batch_norm with the statistics of the images of all processes, in the dtype of x; any number of
    derivatives. One message of 2 C + 1 numbers in float64 forward, and one backward.

    Returns:
        y; mean and variance [C] of x [N, C, H, W] in float64; the number of values behind each.
    """
    count = x.numel() // x.shape[1]
    variance, mean = torch.var_mean(x.float() if x.dtype.itemsize < 4 else x, (0, 2, 3), correction=0)
    mean, variance = mean.double(), variance.double()
    # in float64 the difference of squares below loses nothing that float32 has
    sums = torch.cat([count * mean, count * (variance + mean**2), mean.new_full((1,), count)])
    sums = _SumOfAll.apply(sums)
    total = sums[-1].detach()
    mean, square = (sums[:-1] / total).chunk(2)
    variance = square - mean**2
    scale = (variance + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    if bias is not None:
        shift = shift + bias
    wide = torch.promote_types(x.dtype, torch.float32)
    scale, shift = (v.to(wide).view(1, -1, 1, 1) for v in (scale, shift))
    return (x * scale + shift).to(x.dtype), mean.detach(), variance.detach(), total


class SynchronisedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose statistics in training are those of the images of all processes.

    torch.nn.SyncBatchNorm computes the same, but on GPUs alone and once differentiable. Every process has to
    call it, with at least one image. Evaluation and a single process are as of BatchNorm2d.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] -> the same shape and dtype."""
        if not (self.training and several_processes()):
            return super().forward(x)
        self._check_input_dim(x)
        y, mean, variance, total = batch_norm(x, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            self._track(mean, variance * total / (total - 1))
        return y

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        for running, now in ((self.running_mean, mean), (self.running_var, variance)):
            assert running is not None
            running.lerp_(now.to(running.dtype), momentum)


BATCH_NORMS: tuple[type[nn.BatchNorm2d], ...] = nn.BatchNorm2d, SynchronisedBatchNorm2d
"""The BatchNorms that kernels know."""


def synchronise_batch_norms(network: nn.Module) -> None:
    """Makes every BatchNorm2d of `network` synchronise its statistics; names, values and hooks stay."""
    for module in network.modules():
        if type(module) is nn.BatchNorm2d:
            # it has no attributes of its own, so that nothing needs copying
            module.__class__ = SynchronisedBatchNorm2d


def synchronised(norms: Sequence[nn.Module]) -> bool | None:
    """True if the BatchNorms take the statistics of several processes; None where some do and some do not."""
    if SynchronisedBatchNorm2d not in {*map(type, norms)} or not several_processes():
        return False
    modes = {type(norm) is SynchronisedBatchNorm2d and norm.training for norm in norms}
    return modes.pop() if len(modes) == 1 else None


def merge_moments(moments: Tensor, count: int, all_count: int) -> Tensor:
    """Mean and biased variance [2, ..] of all processes' `all_count` values, from those of this process's
    `count`; one message, in float64."""
    mean, variance = moments.double()
    sums = torch.stack([mean, variance + mean**2]) * count
    dist.all_reduce(sums)
    mean, square = sums / all_count
    return torch.stack([mean, (square - mean**2).clamp(min=0)]).to(moments.dtype)


def merge_means(means: Tensor, count: int, all_count: int) -> Tensor:
    """The means of all processes' values; see `merge_moments`."""
    sums = means.double() * count
    dist.all_reduce(sums)
    return (sums / all_count).to(means.dtype)


# kernels exchange their sums through it
_library = library.Library("rfdarts", "FRAGMENT")
_library.define("sum_over_processes(Tensor(a!) sums) -> ()")


def _sum_over_processes(sums: Tensor) -> None:
    dist.all_reduce(sums)


_library.impl("sum_over_processes", _sum_over_processes, "CompositeExplicitAutograd")
