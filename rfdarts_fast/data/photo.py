"""Reading one photo and cutting the square out of it that the network sees (Pillow, on the CPU)."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from rfdarts_fast.messages import reason, thing_at

from .errors import DataError, require

# the decoders that may run: Pillow has others that start a program (EPS) or read what no photo is
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# Pillow warns beyond as many and refuses twice as many; decoded they take 256 MiB
MOST_PIXELS = 89_478_485
_EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB")
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")


def read_rgb(path: str | os.PathLike[str], side: int | None = None) -> Image.Image:
    """The image file at `path`, decoded completely, as RGB of 8 bits.

    Transparent pixels are laid over white. Grey of 16 bits is scaled from 0..65535 to 0..255; of colours of
    16 bits the high byte is taken. CMYK and YCbCr are converted by their formulas, CIE L*a*b* from D50 to
    sRGB; embedded colour profiles and orientations are ignored. Of a JPEG with several pictures (MPO) the
    first is read. With `side` a JPEG may be decoded smaller, its sides at least that long.

    Raises DataError naming the file if it is damaged, no image, or one that cannot be converted without a
    guess: floating-point and 32-bit pixels, 12 bits in a TIFF, animations, files of several pages; and if
    it has more than `MOST_PIXELS`.
    """
    with warnings.catch_warnings():
        # odd metadata and palettes with transparency are common in photo collections and harmless
        warnings.simplefilter("ignore")
        with _opened(path) as image:
            return _to_rgb(_drafted(image, side))


def decode_rgb(file: IO[bytes], name: str, side: int | None = None) -> Image.Image:
    """`read_rgb` of an open file, which errors call by `name`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with _decoded(file, name) as image:
            return _to_rgb(_drafted(image, side))


def _drafted(image: Image.Image, side: int | None) -> Image.Image:
    if side is not None:
        # JPEGs alone: by 8, 4 or 2 in each direction
        image.draft(None, (side, side))  # type: ignore[arg-type]
    return image


def check_photo(path: str | os.PathLike[str], decode: bool) -> None:
    """DataError unless `read_rgb` can read the file at `path`; by its header alone unless `decode`.

    A JPEG is decoded at an eighth of its size: all of the file is read, in a third of the time.
    """
    with _opened(path) as image:
        if decode:
            image.draft("RGB", (1, 1))
            image.load()


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    name = os.fspath(path)
    # opening a FIFO would wait for its writer
    there = thing_at(path)
    require(there == "a file", f"{name}: expected a readable image, got {there}")
    with _decoded(path, name) as image:
        yield image


@contextmanager
def _decoded(file: str | os.PathLike[str] | IO[bytes], name: str) -> Iterator[Image.Image]:
    try:
        with Image.open(file, formats=_FORMATS) as image:
            got = _unsuitable(image)
            require(not got, f"{name}: expected one image of 8 bits a channel, or 16-bit grey, got {got}")
            yield image
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError(f"{name}: expected a readable image ({', '.join(_FORMATS)}), got none") from None
    # whatever damaged bytes may make of a decoder
    except Exception as error:
        raise DataError(f"{name}: expected a readable image, got {reason(error)}") from error


def _unsuitable(image: Image.Image) -> str:
    """The trait that keeps an image from being converted, by its header; empty if there is none."""
    width, height = image.size
    if width * height > MOST_PIXELS:
        return f"{width} x {height} pixels, more than {MOST_PIXELS:,}"
    # the second picture of an MPO is a preview or another view
    if image.format != "MPO" and getattr(image, "is_animated", False):
        return f"an animation or several pages ({image.format}, mode {image.mode})"
    if image.mode in _EIGHT_BITS:
        return ""
    tags = getattr(image, "tag_v2", {})
    bits, inverted = tags.get(258, (16,)), tags.get(262) == 0
    if image.mode in _SIXTEEN_BITS and bits == (16,) and not inverted and not image.has_transparency_data:
        return ""
    # Pillow's word for 16 bits of these formats is, or was, a mode of 32
    if image.mode == "I" and image.format in ("PNG", "PPM") and not image.has_transparency_data:
        return ""
    variant = ""
    if image.mode in _SIXTEEN_BITS:
        variant = ", white is zero" if inverted else f", {bits[0]} bits" if tags else ", a transparent grey"
    return f"mode {image.mode} ({image.format}{variant})"


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode not in _EIGHT_BITS:
        grey = (np.asarray(image).astype(np.int64) * 255 + 32767) // 65535
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


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


def centre_square(image: Image.Image, size: int, interpolation: Image.Resampling) -> Image.Image:
    """The centred square of an image, resized to size x size pixels: that of its resized short side."""
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    # the box lies within the image, so that the filter sees nothing that the square has not
    square = (round(left), round(top), round(left) + side, round(top) + side)
    return image.crop(square).resize((size, size), interpolation)


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).contiguous()


def _resized_part(
    image: Image.Image, left: int, top: int, width: int, height: int, size: tuple[int, int]
) -> Image.Image:
    # crop first: resize(box=...) would let the filter see pixels outside the box
    return image.crop((left, top, left + width, top + height)).resize(size, Image.Resampling.BILINEAR)
