"""Any images in one NumPy archive."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import DataError, require
from ..sets import ImageSet
from .registry import Images

# what numpy raises for archives that are cut short, overwritten or hold Python objects
_DAMAGED = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error)

_Array = np.ndarray[Any, Any]


def load(root: Path, download: bool) -> Images:
    """The .npz file `root`.

    x_train, x_test  uint8 [N, S, S, 3]; or grey, [N, S, S] or [N, S, S, 1], made three equal channels
    y_train, y_test  integers [N] from 0 on, with at least one training image of every class
    class_names      optional: one string per class, which also allows classes without a training image
    The test pair may be left out. Raises DataError for anything else.
    """
    arrays = _read(root)
    train = _image_set(root, arrays, "train")
    test = _image_set(root, arrays, "test") if {"x_test", "y_test"} & arrays.keys() else None
    names = _class_names(root, arrays, train)
    if test is not None:
        require(
            test.image_size == train.image_size,
            f"{root}: x_test: expected the image size of x_train, {train.image_size}, got {test.image_size}",
        )
        top = int(test.labels.max())
        require(top < len(names), f"{root}: y_test: expected labels within 0..{len(names) - 1}, got {top}")
    return Images(train, test, names)


def _read(file: Path) -> dict[str, _Array]:
    require(
        file.is_file(),
        f"{file}: expected an .npz file, got {'a folder' if file.is_dir() else 'nothing there'}",
    )
    wanted = ("x_train", "y_train", "x_test", "y_test", "class_names")
    try:
        archive = np.load(file, allow_pickle=False)
        if isinstance(archive, np.lib.npyio.NpzFile):
            with archive:
                return {key: archive[key] for key in wanted if key in archive.files}
    except _DAMAGED as error:
        raise DataError(f"{file}: expected a readable .npz archive, got {error}") from error
    raise DataError(f"{file}: expected an .npz archive of several arrays, got a single array")


def _image_set(file: Path, arrays: dict[str, _Array], part: str) -> ImageSet:
    for key in (f"x_{part}", f"y_{part}"):
        require(key in arrays, f"{file}: expected the array {key}, got only {', '.join(arrays) or 'others'}")
    images = _images(f"{file}: x_{part}", arrays[f"x_{part}"])
    labels = _labels(f"{file}: y_{part}", arrays[f"y_{part}"], len(images))
    return ImageSet(torch.from_numpy(images), torch.from_numpy(labels))


def _images(name: str, x: _Array) -> _Array:
    require(x.dtype == np.uint8, f"{name}: expected uint8 pixels, got {x.dtype}")
    if x.ndim == 3:
        x = x[..., None]
    require(
        x.ndim == 4 and x.shape[3] in (1, 3),
        f"{name}: expected the shape [N, S, S, 3], [N, S, S, 1] or [N, S, S], got {list(x.shape)}",
    )
    require(len(x) > 0, f"{name}: expected at least one image, got none")
    require(x.shape[1] == x.shape[2] > 0, f"{name}: expected square images, got {x.shape[1]} x {x.shape[2]}")
    x = np.broadcast_to(x, (*x.shape[:3], 3))
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2))


def _labels(name: str, y: _Array, count: int) -> _Array:
    require(y.dtype.kind in "iu", f"{name}: expected integer labels, got {y.dtype}")
    require(y.ndim == 1, f"{name}: expected the shape [N], got {list(y.shape)}")
    require(len(y) == count, f"{name}: expected one label per image ({count}), got {len(y)}")
    require(int(y.min()) >= 0, f"{name}: expected labels from 0 on, got {int(y.min())}")
    require(int(y.max()) < 2**31, f"{name}: expected labels that count classes, got {int(y.max())}")
    return y.astype(np.int64)


def _class_names(file: Path, arrays: dict[str, _Array], train: ImageSet) -> tuple[str, ...]:
    top = int(train.labels.max())
    if "class_names" in arrays:
        names = arrays["class_names"]
        require(
            names.ndim == 1 and names.dtype.kind == "U",
            f"{file}: class_names: expected strings [classes], got {names.dtype} {list(names.shape)}",
        )
        require(top < len(names), f"{file}: y_train: expected labels within 0..{len(names) - 1}, got {top}")
        return tuple(str(name) for name in names)
    present = set(train.labels.unique().tolist())
    # the least label not there; found without counting up to a huge top
    missing = next(label for label in range(len(present) + 1) if label not in present)
    require(
        missing > top,
        f"{file}: y_train: expected every label from 0 to the largest, {top}, got none of class {missing} "
        "(add class_names if classes without training images are meant)",
    )
    return tuple(str(label) for label in range(top + 1))
