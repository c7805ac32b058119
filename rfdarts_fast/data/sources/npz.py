"""Any images in one NumPy archive."""

from __future__ import annotations

import math
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from rfdarts_fast.messages import reason, shown, thing_at

from ..errors import DataError, require
from ..memory import available_memory, gigabytes
from ..sets import ImageSet
from .registry import Images

# the longest header that numpy reads of a file that is not trusted
_MOST_HEADER_BYTES = 10_000
MOST_CLASSES = 1_000_000

_Array = np.ndarray[Any, Any]


def load(root: Path, download: bool) -> Images:
    """The .npz file `root`.

    x_train, x_test  uint8 [N, S, S, 3]; or grey, [N, S, S] or [N, S, S, 1], made three equal channels
    y_train, y_test  integers [N] from 0 on, with at least one training image of every class
    class_names      optional: one string per class, which also allows classes without a training image
    The test pair may be left out, other arrays are ignored. Types, shapes and sizes are checked against each
    other and against the memory that is available before any array is read; nothing is unpickled. Raises
    DataError for anything else.
    """
    there = thing_at(root)
    require(there == "a file", f"{root}: expected an .npz file, got {there}")
    try:
        with root.open("rb") as file:
            require(
                file.read(6) != b"\x93NUMPY",
                f"{root}: expected an .npz archive of several arrays, got a single array",
            )
            with zipfile.ZipFile(file) as archive:
                return _load(root, _Reader(root, archive))
    except DataError:
        raise
    # whatever damaged bytes may make of zipfile, zlib and numpy
    except Exception as error:
        raise DataError(f"{root}: expected a readable .npz archive, got {reason(error)}") from error


def _load(root: Path, arrays: _Reader) -> Images:
    parts = ["train", "test"] if {"x_test", "y_test"} & arrays.headers.keys() else ["train"]
    for part in parts:
        _check_headers(arrays, part)
    sizes = {part: arrays.headers[f"x_{part}"].shape[1] for part in parts}
    require(
        sizes["train"] == sizes[parts[-1]],
        f"{root}: x_test: expected the image size of x_train, {sizes['train']}, got {sizes[parts[-1]]}",
    )
    arrays.check_memory()
    train = _image_set(arrays, "train")
    names = _class_names(arrays, train)
    test = _image_set(arrays, "test") if "test" in parts else None
    if test is not None:
        top = int(test.labels.max())
        require(top < len(names), f"{root}: y_test: expected labels within 0..{len(names) - 1}, got {top}")
    return Images(train, test, names)


class _Header(NamedTuple):
    """An array as its archive announces it."""

    member: zipfile.ZipInfo
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class _Reader:
    """The arrays of an archive that are images, labels or names; `headers` describes them by key."""

    def __init__(self, file: Path, archive: zipfile.ZipFile) -> None:
        self.file = file
        self._archive = archive
        self.headers: dict[str, _Header] = {}
        wanted = ("x_train", "y_train", "x_test", "y_test", "class_names")
        for member in archive.infolist():
            key = member.filename.removesuffix(".npy")
            if key in wanted:
                require(key not in self.headers, f"{file}: expected the array {key} once, got it twice")
                self.headers[key] = self._header(key, member)

    def read(self, key: str) -> _Array:
        with self._archive.open(self.headers[key].member) as stream:
            return np.lib.format.read_array(stream, allow_pickle=False)

    def check_memory(self) -> None:
        # the bytes of a file and the images made of them, grey in three channels
        needed = sum((4 if h.shape[3:] in ((), (1,)) else 2) * h.bytes for h in self.headers.values())
        free = available_memory()
        require(
            needed <= free,
            f"{self.file}: expected arrays that fit into {gigabytes(free)} of memory, got some that take "
            f"{gigabytes(needed)}",
        )

    def _header(self, key: str, member: zipfile.ZipInfo) -> _Header:
        name = f"{self.file}: {key}"
        require(not member.flag_bits & 1, f"{name}: expected an array in the clear, got an encrypted one")
        require(
            member.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED),
            f"{name}: expected a stored or deflated array, got compression method {member.compress_type}",
        )
        with self._archive.open(member) as stream:
            start = BytesIO(stream.read(_MOST_HEADER_BYTES))
        version = np.lib.format.read_magic(start)
        require(version in ((1, 0), (2, 0)), f"{name}: expected an array of version 1 or 2, got {version}")
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read(start)
        require(all(side >= 0 for side in shape), f"{name}: expected sizes from 0 on, got {shown(shape)}")
        header = _Header(member, shape, dtype)
        expected = start.tell() + header.bytes
        require(
            dtype.hasobject or member.file_size == expected,
            f"{name}: expected the {shown(expected)} bytes of its header's array, got {member.file_size}",
        )
        return header


def _check_headers(arrays: _Reader, part: str) -> None:
    for key in (f"x_{part}", f"y_{part}"):
        there = ", ".join(arrays.headers) or "others"
        require(key in arrays.headers, f"{arrays.file}: expected the array {key}, got only {there}")
    _, shape, dtype = arrays.headers[f"x_{part}"]
    name = f"{arrays.file}: x_{part}"
    require(dtype == np.uint8, f"{name}: expected uint8 pixels, got {dtype}")
    require(
        len(shape) == 3 or (len(shape) == 4 and shape[3] in (1, 3)),
        f"{name}: expected the shape [N, S, S, 3], [N, S, S, 1] or [N, S, S], got {shown(list(shape))}",
    )
    count, height, width = shape[:3]
    require(count > 0, f"{name}: expected at least one image, got none")
    require(height == width > 0, f"{name}: expected square images, got {height} x {width}")
    _, shape, dtype = arrays.headers[f"y_{part}"]
    name = f"{arrays.file}: y_{part}"
    require(dtype.kind in "iu", f"{name}: expected integer labels, got {dtype}")
    require(len(shape) == 1, f"{name}: expected the shape [N], got {shown(list(shape))}")
    require(shape[0] == count, f"{name}: expected one label per image ({count}), got {shape[0]}")


def _image_set(arrays: _Reader, part: str) -> ImageSet:
    y, name = arrays.read(f"y_{part}"), f"{arrays.file}: y_{part}"
    require(int(y.min()) >= 0, f"{name}: expected labels from 0 on, got {int(y.min())}")
    require(int(y.max()) < 2**31, f"{name}: expected labels that count classes, got {int(y.max())}")
    x = arrays.read(f"x_{part}")
    x = np.broadcast_to(x.reshape(*x.shape[:3], -1), (*x.shape[:3], 3))
    images = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    return ImageSet(torch.from_numpy(images), torch.from_numpy(y.astype(np.int64)))


def _class_names(arrays: _Reader, train: ImageSet) -> tuple[str, ...]:
    file, top = arrays.file, int(train.labels.max())
    if "class_names" in arrays.headers:
        _, shape, dtype = arrays.headers["class_names"]
        require(
            len(shape) == 1 and dtype.kind == "U" and shape[0] <= MOST_CLASSES,
            f"{file}: class_names: expected strings [classes], at most {MOST_CLASSES}, got {dtype} "
            f"{shown(list(shape))}",
        )
        require(top < shape[0], f"{file}: y_train: expected labels within 0..{shape[0] - 1}, got {top}")
        return tuple(str(name) for name in arrays.read("class_names"))
    present = set(train.labels.unique().tolist())
    # the least label not there; found without counting up to a huge top
    missing = next(label for label in range(len(present) + 1) if label not in present)
    require(
        missing > top,
        f"{file}: y_train: expected every label from 0 to the largest, {top}, got none of class {missing} "
        "(add class_names if classes without training images are meant)",
    )
    return tuple(str(label) for label in range(top + 1))
