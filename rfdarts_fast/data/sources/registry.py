"""The data sets by name: `register_dataset` adds one, `load` reads one."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from ..errors import DataError, require_int
from ..sets import ImageSet
from .source import AnyImageSet, DataSource, Statistics, statistics


class Images(NamedTuple):
    """The images of a data set to train on, those to evaluate on, if any, and a name for each class."""

    train: AnyImageSet
    test: AnyImageSet | None
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class Dataset:
    """A data set that can be loaded.

    Attributes:
        name: the choice of `--dataset`.
        load: load(root, download) -> its images, at the size they have. `root` is the user's path, empty if
            none is given; `download` allows to fetch files into it. DataError for what is missing or damaged.
        root: a description of the path that `load` needs, None if it needs none.
        image_size: side in pixels that images are resized to by default, None for the size they have.
        statistics: mean and standard deviation to normalise with, None for those of the training images.
        mirrored: training mirrors images, unless --no-flip says otherwise.
        skip: a `load` that leaves out and reports images that cannot be read; None if there is none.
    """

    name: str
    load: Callable[[Path, bool], Images]
    root: str | None = None
    image_size: int | None = None
    statistics: Statistics | None = None
    mirrored: bool = True
    skip: Callable[[Path, bool], Images] | None = None


DATASETS: dict[str, Dataset] = {}
"""Registered data sets by name."""


def register_dataset(dataset: Dataset) -> None:
    """Makes `dataset` a choice of `--dataset`.

    Raises:
        ValueError: if its name is taken or no identifier, or `load` cannot be called.
    """
    name = dataset.name
    if name in DATASETS or not name.isidentifier():
        raise ValueError(f"dataset: expected a new name, an identifier, got {name!r}")
    if not callable(dataset.load):
        raise ValueError(f"dataset {name}: expected load(root, download), got {dataset.load!r}")
    DATASETS[name] = dataset


def load(
    name: str,
    *,
    root: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
    download: bool = False,
    corrupt: Literal["fatal", "skip"] = "fatal",
) -> DataSource:
    """The data set `name`, checked.

    Args:
        name: one of DATASETS.
        root: the file or folder that holds it; see `Dataset.root`.
        image_size: side of the images in pixels, reached by bilinear resizing; None for the data set's own.
        corrupt: "skip" leaves out images that cannot be read, where the data set can do without.
        download: fetch what is missing into `root`, where the data set can be fetched.

    Raises:
        DataError: for anything that is missing, damaged or of the wrong kind.
    """
    if name not in DATASETS:
        raise DataError(f"dataset: expected one of {', '.join(DATASETS)}, got {name!r}")
    dataset = DATASETS[name]
    size = dataset.image_size if image_size is None else require_int(image_size, "image_size", 1)
    if dataset.root is not None and root is None:
        raise DataError(f"data root: expected {dataset.root} for the data set {name}, got none")
    read = dataset.load if corrupt == "fatal" else dataset.skip
    if read is None:
        raise DataError(f"corrupt: expected fatal for the data set {name}, got {corrupt!r}")
    train, test, class_names = read(Path(root or ""), download)
    if size is not None:
        train, test = train.resized(size), None if test is None else test.resized(size)
    scale = dataset.statistics
    if scale is None:
        if not isinstance(train, ImageSet):
            raise DataError(f"dataset {name}: expected statistics for images in files, got none")
        scale = statistics(train)
    return DataSource(name, train, test, class_names, *scale, dataset.mirrored)
