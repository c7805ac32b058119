"""The two kinds of image set: one that fits in memory, one that is decoded from files as it is read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from copy import copy
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .checks import check_photos, unusable
from .errors import DataError, require, require_int
from .fingerprint import of_files, of_tensor


class ImageSet:
    """Images held in memory as bytes: `images` uint8 [N, 3, H, W] with H == W, `labels` int64 [N].

    `on(device)` gives the set on a device; the copy is made once and shared by everyone who asks, so that
    a training and a validation half of the same images occupy the device's memory once.
    Raises DataError for another dtype or shape, for mismatched lengths and for an empty set.
    """

    # augmented as photos are, by crops of any size
    photos = False

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise DataError(f"images: expected uint8 [N, 3, H, W], got {_describe(images)}")
        require(
            images.shape[2] == images.shape[3] > 0,
            f"images: expected square images, got {images.shape[2]} x {images.shape[3]}",
        )
        _check_labels(labels, len(images))
        self.images = images.contiguous()
        self.labels = labels
        self._copies: dict[torch.device, ImageSet] = {}
        # of the images before they were resized, whose bytes no two machines need agree on
        self._images_hash: str | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"ImageSet({len(self)} images of {self.image_size} x {self.image_size})"

    @property
    def image_size(self) -> int:
        return self.images.shape[-1]

    def on(self, device: torch.device | str) -> ImageSet:
        """This set with its tensors on `device`."""
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            # or "cuda" and "cuda:0" would each get a copy
            device = torch.device("cuda", torch.cuda.current_device())
        if device == self.images.device:
            return self
        if device not in self._copies:
            there = copy(self)
            there.images, there.labels = self.images.to(device), self.labels.to(device)
            self._copies[device] = there
        return self._copies[device]

    def resized(self, image_size: int) -> ImageSet:
        """This set with images of image_size x image_size pixels: bilinear, antialiased when it shrinks."""
        require_int(image_size, "image_size", 1)
        if image_size == self.image_size:
            return self
        shrinks = image_size < self.image_size
        # in parts, since the floats of a whole set could be too many
        parts = [
            F.interpolate(part.float(), (image_size,) * 2, mode="bilinear", antialias=shrinks)
            .round_()
            .clamp_(0, 255)
            .to(torch.uint8)
            for part in self.images.split(1024)
        ]
        resized = ImageSet(torch.cat(parts), self.labels)
        resized._images_hash = self.fingerprint()["images"]
        return resized

    def names(self, indices: Sequence[int]) -> list[str]:
        """The numbers of the images, as they have no names."""
        return [str(int(index)) for index in indices]

    def fingerprint(self) -> dict[str, str]:
        """SHA-256 of the images, as they were before any resizing, and of the labels."""
        if self._images_hash is None:
            self._images_hash = of_tensor(self.images)
        return {"images": self._images_hash, "labels": of_tensor(self.labels)}


class ImageFolderSet:
    """Image files, decoded only when a batch asks for them: N `paths`, `labels` int64 [N].

    `image_size` is the side in pixels of the square that every image is cropped and resized to.
    With `skip_corrupt` an image that cannot be decoded gives way to the next one that can, with its label.
    Raises DataError for mismatched lengths, an empty set and an image_size below 1.
    """

    photos = True

    def __init__(
        self, paths: Sequence[str | os.PathLike[str]], labels: Tensor, image_size: int = 224
    ) -> None:
        _check_labels(labels, len(paths))
        self.image_size = require_int(image_size, "image_size", 1)
        self.labels = labels
        self.skip_corrupt = False
        # one array, not a million str objects: worker processes read it without touching reference counts,
        # which would copy the list into each of them page by page
        self._paths = np.array([os.fsencode(path) for path in paths])

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"ImageFolderSet({len(self)} files, read as {self.image_size} x {self.image_size})"

    def path(self, index: int) -> Path:
        return Path(os.fsdecode(self._paths[index]))

    def names(self, indices: Sequence[int]) -> list[str]:
        """The files below the folder that all are in."""
        folder = os.path.commonpath([self._paths[0], self._paths[-1]])
        return [os.fsdecode(self._paths[index][len(folder) + 1 :]) for index in indices]

    def without(self, indices: set[int]) -> ImageFolderSet:
        """This set without the images at `indices`; DataError if none is left."""
        kept = [index for index in range(len(self)) if index not in indices]
        other = ImageFolderSet([self.path(index) for index in kept], self.labels[kept], self.image_size)
        other.skip_corrupt = self.skip_corrupt
        return other

    def resized(self, image_size: int) -> ImageFolderSet:
        """This set, read as images of image_size x image_size pixels."""
        other = copy(self)
        other.image_size = require_int(image_size, "image_size", 1)
        return other

    def fingerprint(self) -> dict[str, str]:
        """SHA-256 of the files' names and of the labels, and of size and bytes of a sample of the files.

        Raises DataError for a file of the sample that cannot be read.
        """
        names, images = of_files(self._paths)
        return {"files": names, "images": images, "labels": of_tensor(self.labels)}

    def verify(self, indices: Sequence[int] | None = None, decode: bool = True) -> None:
        """Checks every file, or those at `indices`, in parallel: all of it, or with `decode` off the header.

        Raises DataError that counts the unusable files and names the first five.
        """
        problems = self.problems(indices, decode)
        total = len(self) if indices is None else len(indices)
        require(not problems, unusable(list(problems.values()), total))

    def problems(self, indices: Sequence[int] | None = None, decode: bool = True) -> dict[int, str]:
        """The unusable files among those, by index, with the reasons."""
        chosen = range(len(self)) if indices is None else indices
        wrong = check_photos([self.path(index) for index in chosen], decode)
        return {chosen[place]: why for place, why in wrong.items()}


def _check_labels(labels: Tensor, count: int) -> None:
    if labels.dtype != torch.int64 or labels.ndim != 1:
        raise DataError(f"labels: expected int64 [N], got {_describe(labels)}")
    require(len(labels) == count, f"labels: expected one per image ({count}), got {len(labels)}")
    require(count > 0, "images: expected at least one, got an empty set")
    require(int(labels.min()) >= 0, f"labels: expected none below 0, got {int(labels.min())}")


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
