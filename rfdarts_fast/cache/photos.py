"""The photos that a store is made of: an image folder, or tar shards."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from rfdarts_fast.data import DataError, ImageFolderSet
from rfdarts_fast.data.photo import decode_rgb, read_rgb
from rfdarts_fast.data.sources.folder import training_images
from rfdarts_fast.messages import first_few, reason
from rfdarts_fast.runs.config import require_package

# of a sample in a shard: its image under one of these, its class under one of those
_IMAGES, _CLASSES = ("jpg", "jpeg", "png", "webp"), ("cls", "cls.txt")


class Photos(Protocol):
    """N photos with names and labels int64 [N]; `classes` are the names of the labels."""

    names: list[str]
    labels: Tensor
    classes: list[str]

    def read(self, indices: Sequence[int], side: int | None) -> Iterator[tuple[int, Image.Image | DataError]]:
        """Each of the photos at `indices` once, in any order, or the reason why it cannot be read.

        With `side`, JPEGs are decoded at the smallest scale whose short side is at least that long.
        """


class FolderPhotos:
    """The photos under root/train/<class>/. Raises DataError as the data set imagefolder."""

    def __init__(self, root: Path) -> None:
        self._set: ImageFolderSet
        self._set, self.classes = training_images(root)
        self.names = self._set.names(range(len(self._set)))
        self.labels = self._set.labels

    def read(self, indices: Sequence[int], side: int | None) -> Iterator[tuple[int, Image.Image | DataError]]:
        for index in indices:
            try:
                yield index, read_rgb(self._set.path(index), side)
            except DataError as error:
                yield index, error


class ShardPhotos:
    """The photos of tar shards of the webdataset format; needs the extra `webdataset`.

    Args:
        shards: "train-{000000..000146}.tar", say. A sample is one image (jpg, jpeg, png, webp) with its
            class, a number from 0 on, under cls.

    Raises DataError without the package, for shards that cannot be read and samples without class or image.
    """

    def __init__(self, shards: str) -> None:
        self._urls = _urls(shards)
        self.names: list[str] = []
        labels = []
        self._places: dict[str, int] = {}
        for sample in _samples(self._urls):
            name = f"{Path(sample['__url__']).name}/{sample['__key__']}"
            _image(sample, name)
            labels.append(_label(sample, name))
            if name in self._places:
                raise DataError(f"{name}: expected each key once, got it twice")
            self._places[name] = len(self.names)
            self.names.append(name)
        if not labels:
            raise DataError(f"{shards}: expected samples, got none")
        self.labels = torch.tensor(labels)
        self.classes = [str(k) for k in range(max(labels) + 1)]
        missing = sorted(set(range(len(self.classes))) - set(labels))
        if missing:
            raise DataError(
                f"{shards}: expected samples of every class from 0 to {max(labels)}, got none of "
                f"{first_few([str(k) for k in missing])}"
            )

    def read(self, indices: Sequence[int], side: int | None) -> Iterator[tuple[int, Image.Image | DataError]]:
        wanted = set(indices)
        shards = {self.names[index].partition("/")[0] for index in wanted}
        for sample in _samples([url for url in self._urls if Path(url).name in shards]):
            name = f"{Path(sample['__url__']).name}/{sample['__key__']}"
            index = self._places.get(name, -1)
            if index not in wanted:
                continue
            try:
                yield index, decode_rgb(io.BytesIO(_image(sample, name)), name, side)
            except DataError as error:
                yield index, error


def _webdataset() -> Any:
    return require_package("shards", "webdataset", "webdataset", error=DataError)


def _urls(shards: str) -> list[str]:
    urls = list(_webdataset().shardlists.expand_urls(shards))
    missing = [url for url in urls if not Path(url).is_file()]
    if missing or not urls:
        raise DataError(f"shards: expected tar files, got none at {first_few(missing) or shards}")
    if len({Path(url).name for url in urls}) < len(urls):
        raise DataError(f"shards: expected files of different names, got {shards}")
    return urls


def _samples(urls: list[str]) -> Iterator[dict[str, Any]]:
    web = _webdataset()
    try:
        yield from web.WebDataset(urls, shardshuffle=False, empty_check=False)
    except DataError:
        raise
    # whatever damaged bytes may make of tarfile
    except Exception as error:
        raise DataError(f"shards: expected readable tar files, got {reason(error)}") from error


def _image(sample: dict[str, Any], name: str) -> bytes:
    image = next((sample[suffix] for suffix in _IMAGES if suffix in sample), None)
    if not isinstance(image, bytes):
        raise DataError(f"{name}: expected an image ({', '.join(_IMAGES)}), got {first_few(sorted(sample))}")
    return image


def _label(sample: dict[str, Any], name: str) -> int:
    text = next((sample[suffix] for suffix in _CLASSES if suffix in sample), b"none")
    if not text.strip().isdigit() or len(text) > 9:
        raise DataError(f"{name}: expected its class under cls, a number from 0 on, got {text!r}")
    return int(text)
