"""Reading one photo and cutting the square out of it that the network sees (Pillow, on the CPU)."""

from __future__ import annotations

import math
import os
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .errors import DataError

# what Pillow raises for damaged files; SyntaxError is its word for a broken PNG
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    try:
        with warnings.catch_warnings():
            # odd metadata and palettes with transparency are common in photo collections and harmless
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                yield image
    except _UNREADABLE as error:
        raise DataError(f"{os.fspath(path)}: expected a readable image, got {error}") from error


def read_rgb(path: str | os.PathLike[str]) -> Image.Image:
    """The image file at `path`, decoded completely, as RGB. DataError naming the file if that fails."""
    with _opened(path) as image:
        return image.convert("RGB")


def check_header(path: str | os.PathLike[str]) -> None:
    """DataError unless the file at `path` begins like an image; much cheaper than decoding it."""
    with _opened(path):
        pass


def random_resized_crop(
    image: Image.Image,
    size: int,
    area: tuple[float, float],
    ratio: tuple[float, float],
    random: np.random.Generator,
) -> Image.Image:
    """A random part of `image`, resized to size x size pixels: torchvision's RandomResizedCrop.

    Ten tries at a box whose area is a fraction of the image's within `area` and whose width over height is
    within `ratio` (log-uniform); then the largest centred box of an allowed ratio.
    """
    width, height = image.size
    for _ in range(10):
        target = width * height * random.uniform(*area)
        aspect = math.exp(random.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(random.integers(0, height - h + 1))
            left = int(random.integers(0, width - w + 1))
            return _resized_part(image, left, top, w, h, (size, size))
    w, h = width, height
    if width / height < ratio[0]:
        h = min(height, round(width / ratio[0]))
    elif width / height > ratio[1]:
        w = min(width, round(height * ratio[1]))
    return _resized_part(image, (width - w) // 2, (height - h) // 2, w, h, (size, size))


def centre_crop(image: Image.Image, size: int, fraction: float) -> Image.Image:
    """The centred square of size x size pixels after the short side is resized to size / fraction pixels."""
    width, height = image.size
    short = round(size / fraction)
    side = min(width, height)
    width, height = int(short * width / side), int(short * height / side)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).contiguous()


def _resized_part(
    image: Image.Image, left: int, top: int, width: int, height: int, size: tuple[int, int]
) -> Image.Image:
    # crop first: resize(box=...) would let the filter see pixels outside the box
    return image.crop((left, top, left + width, top + height)).resize(size, Image.Resampling.BILINEAR)
