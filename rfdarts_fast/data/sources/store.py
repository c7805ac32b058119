"""Stores of decoded images, as `rfdarts cache` makes them."""

from __future__ import annotations

from pathlib import Path

from rfdarts_fast.messages import thing_at

from ..errors import require
from ..store import StoredSet
from .registry import Images


def load(root: Path, download: bool) -> Images:
    """The store in the folder `root`; it has no test images. Raises DataError as `StoredSet`."""
    there = thing_at(root)
    require(there == "a folder", f"{root}: expected the folder of an image store, got {there}")
    images = StoredSet(root)
    return Images(images, None, tuple(images.header.classes))
