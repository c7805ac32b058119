"""Colour jitter of a whole batch, every image with its own strengths and order of the four changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .device import per_channel, upload
from .errors import require

# the luma weights of ITU-R 601, as torchvision rounds them
_LUMA = (0.2989, 0.587, 0.114)


@dataclass(frozen=True)
class ColourJitter:
    """Strengths as torchvision's ColorJitter takes them; the defaults are those of the DARTS ImageNet recipe.

    Brightness, contrast and saturation are each blended by a factor uniform in [1 - s, 1 + s]; the hue is
    turned by a fraction of the circle uniform in [-hue, hue], with hue at most 0.5.
    """

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.2

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"jitter {name}: expected a number within 0..1, got {value!r}")
        require(0 <= self.hue <= 0.5, f"jitter hue: expected a number within 0..0.5, got {self.hue!r}")

    def draw(self, count: int, generator: torch.Generator) -> ColourDraws:
        """Factors and orders for `count` images, from a CPU generator."""
        strength = torch.tensor([self.brightness, self.contrast, self.saturation, self.hue])
        neutral = torch.tensor([1.0, 1.0, 1.0, 0.0])
        factors = neutral + (2 * torch.rand(count, 4, generator=generator) - 1) * strength
        order = torch.rand(count, 4, generator=generator).argsort(dim=1)
        return ColourDraws.of(factors, order)

    def apply(self, x: Tensor, draws: ColourDraws) -> Tensor:
        """float32 RGB [B, 3, H, W] within 0..1, changed in place and returned."""
        for images, sizes in zip(draws.by_change, draws.sizes, strict=True):
            for change, (function, rows) in enumerate(zip(CHANGES, images.split(sizes), strict=True)):
                if len(rows):
                    x[rows] = function(x[rows], draws.factors[rows, change].view(-1, 1, 1, 1))
        return x


@dataclass(frozen=True)
class ColourDraws:
    """Random colour changes for B images.

    `factors` float32 [B, 4], one per change (brightness, contrast, saturation, hue). Row k of `by_change`,
    int64 [4, B], lists the images by the change that comes k-th for them, and `sizes[k]` says how many images
    have each change there: every round is then four calls on parts of the batch, with nothing read back
    from the device.
    """

    factors: Tensor
    by_change: Tensor
    sizes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, factors: Tensor, order: Tensor) -> ColourDraws:
        """From `order`, int64 [B, 4]: the change that each image undergoes first, second, third, fourth."""
        rounds = order.t()
        sizes = tuple(tuple(torch.bincount(r, minlength=4).tolist()) for r in rounds)
        return cls(factors, rounds.argsort(dim=1, stable=True), sizes)

    def part(self, first: int, last: int) -> ColourDraws:
        """The draws of the images `first` to `last` - 1."""
        order = torch.empty_like(self.by_change)
        for row, images, sizes in zip(order, self.by_change, self.sizes, strict=True):
            row[images] = torch.arange(4).repeat_interleave(torch.tensor(sizes))
        return ColourDraws.of(self.factors[first:last], order[:, first:last].t())

    def to(self, device: torch.device) -> ColourDraws:
        """The same draws on `device`."""
        return ColourDraws(upload(self.factors, device), upload(self.by_change, device), self.sizes)


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    """x scaled by factor; x is float [B, 3, H, W] within 0..1 and so is the result, factor [B, 1, 1, 1]."""
    return (x * factor).clamp_(0, 1)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    """x blended with the mean grey of each image; shapes as in `adjust_brightness`."""
    return _blend(x, _grey(x).mean(dim=(1, 2, 3), keepdim=True), factor)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    """x blended with its grey version; shapes as in `adjust_brightness`."""
    return _blend(x, _grey(x), factor)


def adjust_hue(x: Tensor, turn: Tensor) -> Tensor:
    """x with its hue turned by `turn` circles; shapes as in `adjust_brightness`."""
    hue, saturation, value = _rgb_to_hsv(x)
    # back to RGB: v - v s max(0, min(k, 4 - k, 1)) with k = (n + 6 h) mod 6, where n = 5, 3, 1 for R, G, B
    k = (per_channel((5.0, 3.0, 1.0), x.device) + 6 * (hue + turn)).remainder(6)
    return value - value * saturation * torch.minimum(k, 4 - k).clamp_(0, 1)


CHANGES: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
    adjust_hue,
)


def _blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return (factor * x + (1 - factor) * other).clamp_(0, 1)


def _grey(x: Tensor) -> Tensor:
    red, green, blue = _LUMA
    return (red * x[:, 0] + green * x[:, 1] + blue * x[:, 2])[:, None]


def _rgb_to_hsv(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    red, green, blue = x[:, 0:1], x[:, 1:2], x[:, 2:3]
    value = x.amax(dim=1, keepdim=True)
    chroma = value - x.amin(dim=1, keepdim=True)
    # grey pixels have no hue and black ones no saturation: 0 for both, without dividing by it
    safe = torch.where(chroma > 0, chroma, 1)
    hue = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    return (hue / 6).remainder(1), chroma / torch.where(value > 0, value, 1), value
