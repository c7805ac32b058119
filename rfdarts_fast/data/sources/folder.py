"""Folders of image files, one folder per class: ImageNet's layout."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ..constants import STATISTICS
from ..errors import DataError, require
from ..photo import check_header
from ..sets import ImageFolderSet
from .source import DataSource

DEFAULT_IMAGE_SIZE = 224
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff", ".gif"})
# opening more files than this would hold up every start; they are then checked as they are read
CHECKED_FILES = 20_000


def load(root: str | os.PathLike[str], image_size: int | None = None) -> DataSource:
    """The images under root/train/<class>/, and to evaluate root/val/<class>/ or else root/test/<class>/.

    Classes are numbered by name; files are told by suffix, found in subfolders too, and ordered by path. Mean
    and std are ImageNet's. Up to 20,000 files have their headers read at once; `ImageFolderSet.verify`
    decodes whole files. Raises DataError for a missing or empty folder, held-out classes that training lacks
    and an unreadable file.
    """
    top = Path(root)
    require(top.is_dir(), f"{top}: expected a folder that holds train/<class>/*, got {_kind(top)}")
    classes = _class_folders(top / "train")
    size = DEFAULT_IMAGE_SIZE if image_size is None else image_size
    train = _image_set(top / "train", classes, classes, size)
    test = None
    held_out = next((top / part for part in ("val", "test") if (top / part).is_dir()), None)
    if held_out is not None:
        found = _class_folders(held_out)
        unknown = sorted(set(found) - set(classes))
        require(
            not unknown, f"{held_out}: expected classes of {top / 'train'}, got {', '.join(unknown[:5])} too"
        )
        test = _image_set(held_out, found, classes, size)
    return DataSource("imagefolder", train, test, tuple(classes), *STATISTICS["imagefolder"])


def _class_folders(part: Path) -> list[str]:
    require(part.is_dir(), f"{part}: expected a folder with one folder per class, got {_kind(part)}")
    names = sorted(entry.name for entry in os.scandir(part) if entry.is_dir() and entry.name[0] != ".")
    require(len(names) > 0, f"{part}: expected one folder per class, got none")
    return names


def _image_set(part: Path, folders: list[str], classes: list[str], size: int) -> ImageFolderSet:
    number = {name: label for label, name in enumerate(classes)}
    paths: list[str] = []
    labels: list[int] = []
    for name in folders:
        files = _image_files(part / name)
        require(len(files) > 0, f"{part / name}: expected image files ({_suffixes()}), got none")
        paths += files
        labels += [number[name]] * len(files)
    if len(paths) <= CHECKED_FILES:
        for path in paths:
            check_header(path)
    return ImageFolderSet(paths, torch.tensor(labels, dtype=torch.int64), size)


def _image_files(folder: Path) -> list[str]:
    found = []
    try:
        for parent, _, names in os.walk(folder, followlinks=True, onerror=_raise):
            found += [f"{parent}{os.sep}{name}" for name in names if Path(name).suffix.lower() in SUFFIXES]
    except OSError as error:
        raise DataError(f"{folder}: expected a readable folder, got {error}") from error
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error


def _kind(path: Path) -> str:
    return "a file" if path.exists() else "nothing there"


def _suffixes() -> str:
    return ", ".join(sorted(SUFFIXES))
