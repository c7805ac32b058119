"""Folders of image files, one folder per class: ImageNet's layout."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ..errors import DataError, require
from ..photo import check_header
from ..sets import ImageFolderSet
from .registry import Images

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff", ".gif"})
# opening more files than this would hold up every start; they are then checked as they are read
CHECKED_FILES = 20_000


def load(root: Path, download: bool) -> Images:
    """The images under root/train/<class>/, and to evaluate root/val/<class>/ or else root/test/<class>/.

    Classes are numbered by name; files are told by suffix, in subfolders too, and ordered by path. Up to
    20,000 files have their headers read at once; `ImageFolderSet.verify` decodes whole files. Raises
    DataError for a missing or empty folder, held-out classes that training lacks and an unreadable file.
    """
    require(root.is_dir(), f"{root}: expected a folder that holds train/<class>/*, got {_thing_at(root)}")
    classes = _class_folders(root / "train")
    train = _image_set(root / "train", classes, classes)
    test = None
    held_out = next((root / part for part in ("val", "test") if (root / part).is_dir()), None)
    if held_out is not None:
        folders = _class_folders(held_out)
        unknown = sorted(set(folders) - set(classes))
        require(
            not unknown, f"{held_out}: expected classes of {root / 'train'}, got {', '.join(unknown[:5])} too"
        )
        test = _image_set(held_out, folders, classes)
    return Images(train, test, tuple(classes))


def _class_folders(part: Path) -> list[str]:
    require(part.is_dir(), f"{part}: expected a folder with one folder per class, got {_thing_at(part)}")
    names = sorted(entry.name for entry in os.scandir(part) if entry.is_dir() and entry.name[0] != ".")
    require(len(names) > 0, f"{part}: expected one folder per class, got none")
    return names


def _image_set(part: Path, folders: list[str], classes: list[str]) -> ImageFolderSet:
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
    return ImageFolderSet(paths, torch.tensor(labels, dtype=torch.int64))


def _image_files(folder: Path) -> list[str]:
    files = []
    try:
        for parent, _, names in os.walk(folder, followlinks=True, onerror=_raise):
            files += [f"{parent}{os.sep}{name}" for name in names if Path(name).suffix.lower() in SUFFIXES]
    except OSError as error:
        raise DataError(f"{folder}: expected a readable folder, got {error}") from error
    return sorted(files)


def _raise(error: OSError) -> None:
    raise error


def _thing_at(path: Path) -> str:
    return "a file" if path.exists() else "nothing there"


def _suffixes() -> str:
    return ", ".join(sorted(SUFFIXES))
