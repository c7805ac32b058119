"""Folders of image files, one folder per class: ImageNet's layout."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from rfdarts_fast.messages import first_few, reason, thing_at

from ..checks import unusable
from ..errors import DataError, require
from ..sets import ImageFolderSet
from .registry import Images

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff", ".gif"})
# decoding more files than this would hold up every start; of more the headers alone are checked
DECODED_FILES = 50_000


def training_images(root: Path) -> tuple[ImageFolderSet, list[str]]:
    """The images under root/train/<class>/, not checked, and the names of the classes; errors as `load`."""
    there = thing_at(root)
    require(there == "a folder", f"{root}: expected a folder that holds train/<class>/*, got {there}")
    classes = _class_folders(root / "train")
    return _image_set(root / "train", classes, classes), classes


def load(root: Path, download: bool, skip_corrupt: bool = False) -> Images:
    """The images under root/train/<class>/, and to evaluate root/val/<class>/ or else root/test/<class>/.

    Classes are numbered by name; files are told by suffix, in subfolders too, and ordered by path. A folder
    is read once for each class, however many links lead to it. Files of other suffixes and links back to a
    folder above are skipped and counted on stderr.

    All files are checked in parallel: decoded whole, or their headers alone if there are more than 50,000
    (`ImageFolderSet.verify` decodes them too). Raises DataError for a missing folder, for classes without
    images, held-out classes that training lacks, and for files that are no images, damaged or not to be
    converted (see `read_rgb`): their number and the first five. With `skip_corrupt` these are left out, and
    counted and named on stderr.
    """
    train, classes = training_images(root)
    test = None
    held_out = next((root / part for part in ("val", "test") if thing_at(root / part) == "a folder"), None)
    if held_out is not None:
        folders = _class_folders(held_out)
        unknown = sorted(set(folders) - set(classes))
        require(
            not unknown, f"{held_out}: expected classes of {root / 'train'}, got {first_few(unknown)} too"
        )
        test = _image_set(held_out, folders, classes)
    checked = [_checked(part, skip_corrupt) for part in ((train,) if test is None else (train, test))]
    return Images(checked[0], checked[1] if test is not None else None, tuple(classes))


def _checked(part: ImageFolderSet, skip_corrupt: bool) -> ImageFolderSet:
    problems = part.problems(decode=len(part) <= DECODED_FILES)
    if problems:
        text = unusable(list(problems.values()), len(part))
        require(skip_corrupt, text)
        tqdm.write(f"skipped: {text}", file=sys.stderr)
        part = part.without(set(problems))
    part.skip_corrupt = skip_corrupt
    return part


def _class_folders(part: Path) -> list[str]:
    there = thing_at(part)
    require(there == "a folder", f"{part}: expected a folder with one folder per class, got {there}")
    names = sorted(entry.name for entry in _entries(part) if _is_folder(entry) and entry.name[0] != ".")
    require(len(names) > 0, f"{part}: expected one folder per class, got none")
    return names


def _image_set(part: Path, folders: list[str], classes: list[str]) -> ImageFolderSet:
    number = {name: label for label, name in enumerate(classes)}
    paths: list[str] = []
    labels: list[int] = []
    empty: list[str] = []
    others: list[str] = []
    links: list[str] = []
    for name in folders:
        files = _image_files(part / name, others, links)
        if not files:
            empty.append(str(part / name))
        paths += files
        labels += [number[name]] * len(files)
    require(not empty, f"{first_few(empty)}: expected image files ({', '.join(sorted(SUFFIXES))}), got none")
    counted = {"files of other suffixes": others, "links to a folder read before": links}
    skipped = [f"{len(names)} {what} ({first_few(names)})" for what, names in counted.items() if names]
    if skipped:
        tqdm.write(f"{part}: {len(paths)} images; skipped {' and '.join(skipped)}", file=sys.stderr)
    return ImageFolderSet(paths, torch.tensor(labels, dtype=torch.int64))


def _image_files(folder: Path, others: list[str], links: list[str]) -> list[str]:
    """The image files below `folder`; the paths that are skipped are added to `others` and `links`."""
    files: list[str] = []
    # a folder above it, reached by a link, would give the class the images of all others
    above = {*folder.absolute().parents, *Path(os.path.realpath(folder)).parents}
    seen = {_identity(parent) for parent in above}
    stack = [str(folder)]
    while stack:
        parent = stack.pop()
        if _identity(parent) in seen:
            links.append(parent)
            continue
        seen.add(_identity(parent))
        for entry in _entries(parent):
            if _is_folder(entry):
                stack.append(entry.path)
            else:
                is_image = Path(entry.name).suffix.lower() in SUFFIXES
                (files if is_image else others).append(entry.path)
    return sorted(files)


def _identity(folder: str | Path) -> tuple[int, int]:
    try:
        info = Path(folder).stat()
    except OSError as error:
        raise DataError(f"{folder}: expected a readable folder, got {reason(error)}") from error
    return info.st_dev, info.st_ino


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise DataError(f"{folder}: expected a readable folder, got {reason(error)}") from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        # a link to itself, for one; a file, then, and the check of files says what is wrong with it
        return False
