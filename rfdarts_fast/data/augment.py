"""Augmentation of whole batches on the device that trains: crop, flip, colour jitter, normalise, cutout.

The random numbers are drawn on the CPU (`Augment.draw`) and applied anywhere (`Augment.apply`), so a GPU sees
the crops that a CPU would have seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .colour import ColourDraws, ColourJitter
from .device import per_channel, upload
from .errors import DataError, require, require_int


@dataclass(frozen=True)
class Augment:
    """The way of an image from its bytes to the network; the default only normalises.

    In this order:
      resized_crop  image folders only: a random part of the photo, with an area within this range of
                    fractions and a width over height within `resized_ratio`, resized to image_size.
                    None: the short side is resized to image_size / centre_fraction, then the centre cut out
      pad           pixels of black added on each side before a random crop to the original size
      flip          left-right mirror with probability one half
      jitter        brightness, contrast, saturation and hue, in a random order
      mean, std     per channel, of pixels scaled to 0..1
      cutout        side in pixels of one square per image that becomes 0 (the mean); 0 for none. Its centre
                    is uniform over the image and what hangs over the edge is lost; an odd side is rounded
                    down to an even one, as in the published code
    `channels_last` is the memory format of the result. Raises DataError for options out of range.
    """

    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    pad: int = 0
    flip: bool = False
    cutout: int = 0
    jitter: ColourJitter | None = None
    resized_crop: tuple[float, float] | None = None
    resized_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    centre_fraction: float = 1.0
    channels_last: bool = False

    def __post_init__(self) -> None:
        require(len(self.mean) == 3, f"mean: expected 3 channels, got {self.mean!r}")
        require(
            len(self.std) == 3 and min(self.std) > 0, f"std: expected 3 positive channels, got {self.std!r}"
        )
        require_int(self.pad, "pad", 0)
        require_int(self.cutout, "cutout", 0)
        if self.resized_crop is not None:
            low, high = self.resized_crop
            require(0 < low <= high <= 1, f"resized_crop: expected 0 < low <= high <= 1, got {low}, {high}")
        low, high = self.resized_ratio
        require(0 < low <= high, f"resized_ratio: expected 0 < low <= high, got {low}, {high}")
        require(
            0 < self.centre_fraction <= 1,
            f"centre_fraction: expected a number above 0 and at most 1, got {self.centre_fraction}",
        )

    def draw(self, count: int, size: int, generator: torch.Generator) -> Draws:
        """The random numbers for `count` images of size x size pixels, from a CPU generator.

        Switching one augmentation on or off does not change what the others draw.
        """
        spread = 2 * self.pad + 1
        shift = torch.randint(spread, (2, count), generator=generator)
        flip = torch.randint(2, (count,), generator=generator)
        centre = torch.randint(size, (2, count), generator=generator)
        places = torch.cat([shift, flip[None], centre])
        return Draws(places, self.jitter.draw(count, generator) if self.jitter is not None else None)

    def apply(self, images: Tensor, draws: Draws) -> Tensor:
        """uint8 [B, 3, S, S] to normalised float32 of the same shape, on the device that holds both."""
        images = self._crop_and_flip(images, draws.places)
        x = images.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
        if self.jitter is not None:
            if draws.colour is None:
                raise DataError("draws: expected those of an Augment with jitter, got none for the colours")
            x = self.jitter.apply(x, draws.colour)
        x = x.sub_(per_channel(self.mean, x.device)).div_(per_channel(self.std, x.device))
        if self.cutout > 1:
            x.mul_(self._outside_cutout(draws.places, x.shape[-1]))
        # converted last: the steps before it are several times slower on a CPU in channels_last
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x

    def _crop_and_flip(self, images: Tensor, places: Tensor) -> Tensor:
        if not (self.pad or self.flip):
            return images
        batch, channels, size, _ = images.shape
        top, left, mirrored = places[0, :, None], places[1, :, None], places[2, :, None]
        step = torch.arange(size, device=images.device)
        rows = step + top
        columns = torch.where(mirrored.bool(), step.flip(0), step) + left if self.flip else step + left
        padded = F.pad(images, (self.pad,) * 4)
        side = padded.shape[-1]
        # one gather over flat pixels: 2 to 6 times as fast on a CPU as indexing rows and columns
        pixels = (rows[:, :, None] * side + columns[:, None, :]).view(batch, 1, size * size)
        flat = padded.view(batch, channels, side * side)
        return flat.gather(2, pixels.expand(-1, channels, -1)).view(images.shape)

    def _outside_cutout(self, places: Tensor, size: int) -> Tensor:
        half = self.cutout // 2
        step = torch.arange(size, device=places.device)
        rows, columns = (
            (step >= centre[:, None] - half) & (step < centre[:, None] + half) for centre in places[3:5]
        )
        return ~(rows[:, :, None] & columns[:, None, :])[:, None]


@dataclass(frozen=True)
class Draws:
    """The random numbers of one batch of B images.

    `places` is int64 [5, B]: top and left of the crop within the padded image (0..2 pad), mirrored (0 or 1),
    row and column of the cutout's centre. `colour` is set when the colours are jittered.
    """

    places: Tensor
    colour: ColourDraws | None = None

    def part(self, first: int, last: int) -> Draws:
        """The draws of the images `first` to `last` - 1."""
        colour = self.colour.part(first, last) if self.colour is not None else None
        return Draws(self.places[:, first:last], colour)

    def to(self, device: torch.device) -> Draws:
        """The same draws on `device`."""
        if device.type == "cpu":
            return self
        colour = self.colour.to(device) if self.colour is not None else None
        return Draws(upload(self.places, device), colour)
