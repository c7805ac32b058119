"""Where the images come from: `load(name)` and what it returns. One module per kind of source."""

from __future__ import annotations

import os

from ..errors import DataError, require_int
from . import digits, folder, npz, vision
from .source import DataSource

NAMES = ("digits", "npz", "cifar10", "cifar100", "svhn", "imagefolder")


def load(
    name: str,
    *,
    root: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
    download: bool = False,
) -> DataSource:
    """The data set `name`, checked.

    digits       the 1,797 handwritten digits that come with scikit-learn; needs no `root`
    npz          `root` is an .npz file with x_train, y_train, x_test, y_test
    cifar10, cifar100, svhn
                 through torchvision, in the folder `root`; fetched into it only with `download`
    imagefolder  `root` holds train/<class>/* and, to evaluate, val/<class>/* or test/<class>/*

    `image_size` is the side of the images in pixels: by default 16 for digits, 224 for imagefolder and the
    size they have elsewhere. Other sizes are reached by bilinear resizing. Raises DataError for anything
    that is missing, damaged or of the wrong kind.
    """
    if name not in NAMES:
        raise DataError(f"dataset: expected one of {', '.join(NAMES)}, got {name!r}")
    if image_size is not None:
        require_int(image_size, "image_size", 1)
    if name == "digits":
        return digits.load(image_size)
    if root is None:
        raise DataError(
            f"data root: expected {_ROOTS.get(name, 'a folder')} for the data set {name}, got none"
        )
    if name == "npz":
        return npz.load(root, image_size)
    if name == "imagefolder":
        return folder.load(root, image_size)
    return vision.load(name, root, image_size, download)


_ROOTS = {"npz": "an .npz file", "imagefolder": "the folder that holds train/<class>/*"}

__all__ = ["NAMES", "DataSource", "load"]
