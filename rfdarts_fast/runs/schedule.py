"""Learning rates as functions of the position, so that resuming needs no state."""

from __future__ import annotations

import math
from typing import Any, Literal

from torch import Tensor

Schedule = Literal["cosine", "linear", "step", "constant"]
BatchScaling = Literal["none", "linear", "sqrt"]


def batch_scale(scaling: BatchScaling, batch_size: int, base_batch_size: int) -> float:
    """The factor of a learning rate that belongs to `base_batch_size` for steps of `batch_size` images.

    linear: their ratio (Goyal et al. 2017, arXiv 1706.02677), which keeps the path of SGD.
    sqrt: its square root, which does so for Adam (Malladi et al. 2022, arXiv 2205.10287).
    none: 1.
    """
    ratio = batch_size / base_batch_size
    match scaling:
        case "linear":
            return ratio
        case "sqrt":
            return math.sqrt(ratio)
        case "none":
            return 1.0
    raise ValueError(f"scaling: expected none, linear or sqrt, got {scaling!r}")


def learning_rate(
    schedule: Schedule,
    epoch: float,
    epochs: int,
    initial: float,
    final: float = 0.0,
    warmup_epochs: int = 0,
    decay: float = 0.97,
) -> float:
    """The learning rate at `epoch` (counted from 0; fractional for a schedule that moves with each step).

    cosine: from `initial` to `final` over `epochs` (Loshchilov and Hutter; DARTS and all that follow it).
    linear: to 0, the last five epochs with a gentler slope (PC-DARTS train_imagenet.py `adjust_lr`).
    step: times `decay` each epoch (quark0/darts train_imagenet.py).
    In the first `warmup_epochs` the rate is initial * (epoch + 1) / warmup_epochs (PC-DARTS).
    """
    if epoch < warmup_epochs:
        return initial * (math.floor(epoch) + 1) / warmup_epochs
    match schedule:
        case "cosine":
            return final + (initial - final) * (1 + math.cos(math.pi * epoch / epochs)) / 2
        case "linear":
            body = max(epochs - 5, 1)
            if epochs - epoch > 5:
                return initial * (body - epoch) / body
            return initial * (epochs - epoch) / (body * 5)
        case "step":
            return initial * decay ** math.floor(epoch)
        case "constant":
            return initial
    raise ValueError(f"schedule: expected cosine, linear, step or constant, got {schedule!r}")


def scheduled_rate(config: Any, schedule: Schedule, epoch: float, decay: float = 0.97) -> float:
    """The rate of SGD at `epoch` by the options of a search or training, scaled with the batch."""
    scale = batch_scale(config.learning_rate_scaling, config.batch_size, config.base_batch_size)
    return learning_rate(
        schedule,
        epoch,
        config.epochs,
        scale * config.learning_rate,
        scale * config.learning_rate_min,
        config.learning_rate_warmup_epochs,
        decay,
    )


def set_learning_rate(optimizer, rate: float) -> None:
    """In place where the rate is a tensor: a recorded step reads it there."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
