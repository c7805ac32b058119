"""Derived networks as timm models, known to timm once this module is imported.

import rfdarts_fast.export.timm
model = timm.create_model("rfdarts_imagenet", genotype="runs/search/genotype.json")

`checkpoint_path` takes the safetensors files of `rfdarts export`. There are no pretrained weights.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from rfdarts_fast.nn import Network
from rfdarts_fast.retrain.run import read_genotype
from rfdarts_fast.spaces import Genotype


class TimmNetwork(Network):
    """The derived network with timm's interface: `forward` returns logits alone.

    Args:
        genotype: of the DARTS family: a Genotype, a genotype.json, a published name or a literal.
        num_classes: 0 for features without a classifier.
        channels: of the first cells; published: 48.
        layers: cells; published: 14.
        stem: "imagenet" or "cifar".
        drop_path_rate: probability of dropping an op's output in training.
        in_chans: 3.

    Raises ValueError for another genotype or number of input channels.
    """

    def __init__(
        self,
        genotype: Genotype | str,
        num_classes: int = 1000,
        channels: int = 48,
        layers: int = 14,
        stem: Any = "imagenet",
        drop_path_rate: float = 0.0,
        in_chans: int = 3,
    ) -> None:
        read = read_genotype(str(genotype)) if not isinstance(genotype, Genotype) else genotype
        if not isinstance(read, Genotype):
            raise ValueError(f"genotype: expected one of the DARTS family, got {genotype!r}")
        if in_chans != 3:
            raise ValueError(f"in_chans: expected 3, got {in_chans}")
        super().__init__(read, channels, max(num_classes, 1), layers, stem=stem)
        assert isinstance(self.classifier, nn.Linear)
        self.num_features = self.head_hidden_size = self.classifier.in_features
        self.drop_path_prob = drop_path_rate
        self.reset_classifier(num_classes)

    def get_classifier(self) -> nn.Module:
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier for so many classes, or none for 0; the one that fits stays."""
        self.num_classes = num_classes
        if not num_classes:
            self.classifier = nn.Identity()
        elif getattr(self.classifier, "out_features", 0) != num_classes:
            self.classifier = nn.Linear(self.num_features, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [N, 3, H, W] -> [N, num_features, H', W']."""
        return self.features(x)[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[N, num_features, H', W'] -> logits [N, num_classes], or pooled features with `pre_logits`."""
        x = self.global_pooling(x).flatten(1)
        return x if pre_logits else self.classifier(x)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.forward_head(self.forward_features(x))

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return set()


_CFG = {
    "url": "",
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "pool_size": (7, 7),
    "crop_pct": 0.875,
    "interpolation": "bilinear",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "first_conv": "stem0.0",
    "classifier": "classifier",
}
default_cfgs = generate_default_cfgs({"rfdarts_imagenet.untrained": _CFG})


@register_model
def rfdarts_imagenet(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The network of a genotype for ImageNet; arguments as of `TimmNetwork`."""
    if "genotype" not in kwargs:
        raise ValueError(
            'genotype: expected one, as in timm.create_model("rfdarts_imagenet", genotype="DARTS_V2")'
        )
    if pretrained:
        raise ValueError("pretrained: expected False, as no weights are published, got True")
    return build_model_with_cfg(TimmNetwork, "rfdarts_imagenet", pretrained, **kwargs)
