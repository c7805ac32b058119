"""A loaded data set: images, class names and the statistics that normalise them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..errors import DataError, require
from ..sets import ImageFolderSet, ImageSet
from ..store import StoredSet

AnyImageSet = ImageSet | ImageFolderSet | StoredSet


class Statistics(NamedTuple):
    """Mean and standard deviation of the red, green and blue channel, of pixels scaled to 0..1."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class DataSource:
    """A data set, checked: every label is within 0..num_classes-1.

    `test` holds the images that only evaluation may use, None where there are none. `mean` and `std` are per
    channel, of pixels scaled to 0..1; `mirrored` tells whether training mirrors images unless asked not to.
    """

    name: str
    train: AnyImageSet
    test: AnyImageSet | None
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mirrored: bool = True

    def __post_init__(self) -> None:
        for part, images in (("train", self.train), ("test", self.test)):
            if images is not None:
                top = int(images.labels.max())
                require(
                    top < self.num_classes,
                    f"{self.name}: expected {part} labels within 0..{self.num_classes - 1}, got {top}",
                )

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return self.train.image_size

    def require_test(self) -> AnyImageSet:
        """The test images; DataError where the source has none."""
        if self.test is None:
            raise DataError(f"{self.name}: expected test images (x_test, or a val or test folder), got none")
        return self.test


def statistics(images: ImageSet) -> Statistics:
    """Mean and standard deviation per channel, over all pixels; a constant channel has deviation 1."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean: list[float] = []
    std: list[float] = []
    for channel in images.images.unbind(dim=1):
        # counts instead of a float copy of every image
        share = torch.zeros(256, dtype=torch.float64)
        for part in channel.split(4096):
            share += torch.bincount(part.reshape(-1), minlength=256)
        share /= channel.numel()
        centre = (share * levels).sum()
        spread = (share * (levels - centre) ** 2).sum().sqrt().item()
        mean.append(centre.item())
        std.append(spread if spread > 1e-6 else 1.0)
    return Statistics((mean[0], mean[1], mean[2]), (std[0], std[1], std[2]))
