"""The options of a retraining, and the published ones by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from rfdarts_fast.runs.config import (
    MOST_SIDE,
    RunConfig,
    require,
    require_not_negative,
    require_positive,
)
from rfdarts_fast.runs.schedule import BatchScaling, Schedule

Preset = Literal[
    "quick", "cifar", "pc-darts-cifar", "robustdarts", "imagenet", "pc-darts-imagenet", "nasbench201"
]


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """Train the network of a genotype from scratch; keeps the last and the best checkpoint."""

    genotype: str = "DARTS_V2"
    """genotype.json of a search, a published name (DARTS_V1, DARTS_V2, PC_DARTS_cifar, PC_DARTS_image), the
    literal Genotype(normal=...), or a NAS-Bench-201 cell string."""
    preset: Preset = "cifar"
    """Published values for the options below. `quick` needs minutes on a CPU and no data set."""

    channels: int = 36
    """Channels of the first cells."""
    layers: int = 20
    """Cells (DARTS family)."""
    cells_per_stage: int = 5
    """Cells in each of the three stages (NAS-Bench-201)."""
    stem: Literal["cifar", "imagenet"] = "cifar"
    """First layers: cifar keeps the resolution, imagenet divides it by 8."""
    max_multiply_adds: float | None = None
    """The network has to stay below so many million multiply-adds: of convolutions and linear layers, for one
    image, without the auxiliary head (ImageNet's mobile setting: 600)."""
    auto_width: bool = False
    """Take the largest even number of channels, --channels at most, that stays below --max-multiply-adds."""
    auxiliary: bool = True
    """Train a second classifier at two thirds of the depth."""
    auxiliary_weight: float = 0.4
    """Weight of its loss."""
    drop_path: float = 0.2
    """Probability of dropping an op's output in the last epoch; it grows from 0."""

    epochs: int = 600
    """Passes over the training images."""
    batch_size: int = 96
    """Images in a step."""
    learning_rate: float = 0.025
    """Of SGD, at the start."""
    learning_rate_min: float = 0.0
    """Of SGD, at the end of the cosine."""
    learning_rate_warmup_epochs: int = 0
    """Epochs of linear warm-up: the first has 1/N of the rate, the second 2/N, and so on."""
    learning_rate_scaling: BatchScaling = "none"
    """Multiply SGD's rates, --learning-rate and --learning-rate-min, by --batch-size over --base-batch-size
    (linear), or by its square root (sqrt)."""
    base_batch_size: int = 96
    """The batch to which the learning rates belong: that of the preset."""
    schedule: Schedule = "cosine"
    """Course of the learning rate; linear has PC-DARTS's gentler last five epochs."""
    learning_rate_decay: float = 0.97
    """step: factor of each epoch."""
    momentum: float = 0.9
    """Of SGD."""
    nesterov: bool = False
    """Nesterov momentum."""
    weight_decay: float = 3e-4
    """Of SGD."""
    grad_clip: float = 5.0
    """Largest norm of the gradient; 0 for none."""
    label_smoothing: float = 0.0
    """Share of the label spread over all classes."""
    cutout: int = 16
    """Side of the square cut out of training images, in pixels; 0 for none."""
    colour_jitter: bool = False
    """Brightness, contrast, saturation (0.4 each) and hue (0.2), as published for ImageNet."""
    ema_decay: float = 0.0
    """Keep an exponential moving average of weights and running statistics, 0.9999 say, and evaluate and
    export that; 0 for none."""
    amp: Literal["off", "bf16"] = "off"
    """bf16: activations in bfloat16; weights, their gradients and statistics in float32."""
    compile: bool = False
    """torch.compile of the network, without drop path; the first step takes minutes."""
    evaluate_every: int = 1
    """Epochs between evaluations on the test images; the last epoch is always evaluated."""

    def check(self) -> None:
        super().check()
        require_positive(self, "layers", "cells_per_stage", most=1000)
        require_positive(self, "channels", most=65_536)
        require_positive(self, "epochs", "batch_size", "base_batch_size", most=10**6)
        require_positive(self, "learning_rate", "learning_rate_decay", "evaluate_every")
        require_not_negative(
            self, "auxiliary_weight", "learning_rate_min", "learning_rate_warmup_epochs", "momentum",
            "weight_decay", "grad_clip",
        )  # fmt: skip
        require_not_negative(self, "cutout", most=MOST_SIDE)
        require(self.momentum < 1, self, "momentum", "less than 1")
        if self.max_multiply_adds is not None:
            require_positive(self, "max_multiply_adds")
        limited = self.max_multiply_adds is not None
        require(limited or not self.auto_width, self, "auto_width", "a limit, --max-multiply-adds, beside it")
        require(0 <= self.ema_decay < 1, self, "ema_decay", "a share below 1")
        # its probability, which each epoch has another of, would be compiled in
        require(not (self.compile and self.drop_path), self, "compile", "--drop-path 0 beside it")
        require(0 <= self.drop_path < 1, self, "drop_path", "a probability below 1")
        require(0 <= self.label_smoothing < 1, self, "label_smoothing", "a share below 1")
        require(not self.nesterov or self.momentum > 0, self, "nesterov", "a momentum above 0 beside it")


# quark0/darts cnn/train_imagenet.py
_IMAGENET = {
    "dataset": "imagefolder",
    "image_size": 224,
    "channels": 48,
    "layers": 14,
    "stem": "imagenet",
    "max_multiply_adds": 600.0,
    "drop_path": 0.0,
    "epochs": 250,
    "batch_size": 128,
    "base_batch_size": 128,
    "learning_rate": 0.1,
    "schedule": "step",
    "weight_decay": 3e-5,
    "label_smoothing": 0.1,
    "cutout": 0,
    "colour_jitter": True,
}

PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        "dataset": "digits",
        "image_size": 16,
        "channels": 16,
        "layers": 3,
        "auxiliary": False,
        "drop_path": 0.0,
        "cutout": 0,
        "epochs": 10,
        "batch_size": 64,
        "base_batch_size": 64,
        "learning_rate": 0.1,
    },
    # quark0/darts cnn/train.py: the defaults of TrainConfig
    "cifar": {},
    # yuhuixu1993/PC-DARTS train.py
    "pc-darts-cifar": {"drop_path": 0.3},
    # RobustDARTS on CIFAR-100 and SVHN (ruocwang/darts-pt eval-c100.sh); on CIFAR-10 it is `cifar`
    "robustdarts": {"channels": 16, "layers": 8},
    "imagenet": _IMAGENET,
    # yuhuixu1993/PC-DARTS train_imagenet.py
    "pc-darts-imagenet": {
        **_IMAGENET,
        "batch_size": 1024,
        "base_batch_size": 1024,
        "learning_rate": 0.5,
        "learning_rate_warmup_epochs": 5,
        "schedule": "linear",
    },
    # NAS-Bench-201 (Dong and Yang 2020), table 1
    "nasbench201": {
        "channels": 16,
        "auxiliary": False,
        "drop_path": 0.0,
        "cutout": 0,
        "epochs": 200,
        "batch_size": 256,
        "base_batch_size": 256,
        "learning_rate": 0.1,
        "nesterov": True,
        "weight_decay": 5e-4,
        "grad_clip": 0.0,
    },
}
"""Published recipes: values of `TrainConfig` by the name of the preset."""


def preset_values(given: dict[str, Any]) -> dict[str, Any]:
    """The values of the preset that the given values name."""
    return PRESETS.get(given.get("preset", TrainConfig.preset), {})
