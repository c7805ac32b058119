"""The first layers of a network, for small and for large images."""

from __future__ import annotations

from torch import nn


def cifar_stem(c: int) -> nn.Sequential:
    """3x3 convolution and BatchNorm, [N, 3, H, W] -> [N, c, H, W] (quark0/darts `stem`)."""
    return nn.Sequential(nn.Conv2d(3, c, 3, padding=1, bias=False), nn.BatchNorm2d(c))


def imagenet_stem(c: int) -> tuple[nn.Sequential, nn.Sequential]:
    """Three 3x3 convolutions of stride 2, 3 -> c/2 -> c -> c channels (quark0/darts `stem0`, `stem1`).

    Returns [N, 3, H, W] -> [N, c, H/4, W/4], and from there -> [N, c, H/8, W/8].
    """
    if c % 2:
        raise ValueError(f"channels: the ImageNet stem needs an even number of channels, got {c}")
    stem0 = nn.Sequential(
        nn.Conv2d(3, c // 2, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(c // 2),
        nn.ReLU(),
        nn.Conv2d(c // 2, c, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(c),
    )
    stem1 = nn.Sequential(nn.ReLU(), nn.Conv2d(c, c, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(c))
    return stem0, stem1
