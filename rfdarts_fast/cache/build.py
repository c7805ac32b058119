"""Decodes a subset of photos into a store: in parallel, and going on where a killed build was."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from rfdarts_fast.cache.photos import FolderPhotos, Photos, ShardPhotos
from rfdarts_fast.data import DataError, split_per_class
from rfdarts_fast.data.bar import terminal_bar
from rfdarts_fast.data.checks import unusable
from rfdarts_fast.data.photo import centre_square
from rfdarts_fast.data.store import (
    CHUNKS,
    FILES,
    HEADER,
    IMAGES,
    Header,
    damaged_chunks,
    open_images,
    read_chunks,
    read_header,
)
from rfdarts_fast.messages import first_few
from rfdarts_fast.runs.config import ConfigError, require, require_positive
from rfdarts_fast.runs.files import JsonLines, WriteError, temporary, write_atomic, write_json, writing
from rfdarts_fast.runs.lock import HOLDER, LOCK, FolderLock, InUse

# images decoded by a thread at a time
CHUNK = 256
# of the options, those that decide what is stored
_SETTINGS = ("size", "interpolation", "quality", "train_fraction", "val_fraction", "seed", "corrupt")
_FILTERS = {name: Image.Resampling[name.upper()] for name in ("bilinear", "bicubic", "lanczos")}


@dataclass(frozen=True)
class CacheOptions:
    """Decode a class-balanced subset of photos once, for rfdarts search --dataset cache --data-root OUT.

    The short side of each photo is resized, antialiased, and the centred square is kept. The same command
    goes on where a killed one was. Search crops and resizes the stored squares anew in every epoch.
    """

    out: Path
    """The store's folder."""
    data_root: Path | None = None
    """The folder that holds train/<class>/*, ImageNet's layout."""
    shards: str | None = None
    """Instead of a folder: tar files of the webdataset format, as train-{000000..000146}.tar (needs the extra
    `webdataset`; all are read once for their labels, before the chosen ones are decoded)."""
    size: int = 256
    """Side of the stored squares in pixels: 3 * size * size bytes each."""
    interpolation: Literal["bilinear", "bicubic", "lanczos"] = "bilinear"
    """Filter that resizes photos."""
    quality: Literal["exact", "fast"] = "exact"
    """fast: JPEGs are decoded at the smallest of the scales 1/8, 1/4, 1/2 that is not below the size."""
    train_fraction: float = 0.1
    """Share of each class that trains the weights, as of rfdarts search --split per-class."""
    val_fraction: float = 0.025
    """Share of each class that trains the architecture; 0 for a store of one part, to be split by search."""
    seed: int = 2
    """Chooses the images."""
    corrupt: Literal["fatal", "skip"] = "fatal"
    """An image that cannot be read ends the command, or is left out, named and counted."""
    threads: int | None = None
    """Threads that decode (default: one for each CPU)."""

    def check(self) -> None:
        """Raises ConfigError for the first value that cannot be used."""
        require_positive(self, "size", most=4096)
        require(0 < self.train_fraction <= 1, self, "train_fraction", "a share above 0")
        require(
            0 <= self.val_fraction <= 1 - self.train_fraction + 1e-9, self, "val_fraction",
            f"a share of what train_fraction={self.train_fraction} leaves",
        )  # fmt: skip
        require(0 <= self.seed < 2**32, self, "seed", "a number from 0 to 2**32 - 1")
        if self.threads is not None:
            require_positive(self, "threads", most=4096)
        require(
            (self.data_root is None) != (self.shards is None), self, "data_root", "either this or --shards"
        )


def build_store(options: CacheOptions) -> str:
    """Makes the store, or what is missing of it; a line about it.

    Raises ConfigError, also for a folder that holds another store, DataError for photos that cannot be read,
    and WriteError; what is done by then is kept.
    """
    options.check()
    photos: Photos = (
        FolderPhotos(options.data_root) if options.data_root else ShardPhotos(options.shards or "")
    )
    wanted = [f for f in (options.train_fraction, options.val_fraction) if f]
    chosen = split_per_class(photos.labels, wanted, options.seed, ("train-fraction", "val-fraction"))
    with writing(options.out):
        options.out.mkdir(parents=True, exist_ok=True)
    try:
        lock = FolderLock(options.out)
    except InUse as error:
        raise ConfigError(str(error)) from None
    except OSError as error:
        raise WriteError(f"{options.out} cannot be written: {error.strerror}") from None
    try:
        header = _prepared(options, photos, chosen)
        return _Builder(options, photos, torch.cat(chosen).tolist(), header).run()
    finally:
        lock.release()


def _prepared(options: CacheOptions, photos: Photos, chosen: Sequence[torch.Tensor]) -> Header:
    """The header of the store in the folder, which is written if the folder is new."""
    out, indices = options.out, torch.cat(tuple(chosen))
    parts = [part for part, members in enumerate(chosen) for _ in members]
    files = {
        "names": [photos.names[index] for index in indices.tolist()],
        "labels": photos.labels[indices].tolist(),
        "parts": parts,
    }
    text = json.dumps(files, indent=0).encode() + b"\n"
    settings = {name: getattr(options, name) for name in _SETTINGS}
    header = Header(settings, list(photos.classes), len(indices), CHUNK, hashlib.sha256(text).hexdigest())
    if (out / HEADER).exists():
        there = read_header(out)
        for name, value in settings.items():
            if there.settings.get(name) != value:
                raise ConfigError(
                    f"out: {out} holds a store made with other settings: {name} is "
                    f"{there.settings.get(name)!r} there and {value!r} here"
                )
        if there != header:
            raise ConfigError(f"out: {out} holds a store made of other images")
        return there
    begun = {temporary(out / name).name for name in (HEADER, FILES, HOLDER)}
    own = {FILES, IMAGES, CHUNKS, LOCK, f"{LOCK}.soft", HOLDER}
    others = sorted({path.name for path in out.iterdir()} - own - begun)
    if others:
        raise ConfigError(f"out: expected a new folder, got {out} with {first_few(others)}")
    with writing(out / IMAGES), (out / IMAGES).open("wb") as file:
        _reserve(file.fileno(), header.number * header.image_bytes)
    (out / CHUNKS).unlink(missing_ok=True)
    write_atomic(out / FILES, text)
    write_json(out / HEADER, asdict(header))
    return header


def _reserve(descriptor: int, size: int) -> None:
    """Makes a file that long; on a disk that is too full OSError now, not after hours."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        # a file system that reserves nothing
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.truncate(descriptor, size)


class _Builder:
    """Decodes the chunks that are missing, each in a thread."""

    def __init__(self, options: CacheOptions, photos: Photos, indices: list[int], header: Header) -> None:
        self._options = options
        self._photos = photos
        self._indices = indices
        self._header = header
        self._journal = JsonLines(options.out / CHUNKS)
        self._lock = threading.Lock()
        self._bar = terminal_bar(header.number, "decoding", "image", leave=True)

    def run(self) -> str:
        path = self._options.out / IMAGES
        missing = self._missing()
        before = time.monotonic()
        threads = min(self._options.threads or os.cpu_count() or 1, max(len(missing), 1))
        with writing(path), path.open("r+b") as file, self._bar, ThreadPoolExecutor(threads) as pool:
            try:
                for _ in pool.map(lambda chunk: self._make(chunk, file.fileno()), missing):
                    pass
            finally:
                # Ctrl-C and errors do not wait for the rest
                pool.shutdown(cancel_futures=True)
        seconds = time.monotonic() - before
        made = sum(len(self._header.rows(chunk)) for chunk in missing)
        bad = [why for chunk in read_chunks(self._options.out, self._header).values() for _, why in chunk.bad]
        skipped = f"; skipped {unusable(bad, self._header.number)}" if bad else ""
        rate = f", {made} of them now, {made / seconds:.0f} a second in {threads} threads" if made else ""
        return (
            f"{self._header.number} images of {self._header.side} x {self._header.side} pixels{rate}; "
            f"{path.stat().st_size / 1e9:.3g} GB in {self._options.out}{skipped}"
        )

    def _missing(self) -> list[int]:
        """The chunks that are not there, or whose bytes are others than were written."""
        out, header = self._options.out, self._header
        with writing(out / IMAGES):
            if (
                not (out / IMAGES).exists()
                or (out / IMAGES).stat().st_size != header.number * header.image_bytes
            ):
                with (out / IMAGES).open("ab") as file:
                    os.truncate(file.fileno(), header.number * header.image_bytes)
        done = read_chunks(out, header)
        damaged = set(damaged_chunks(open_images(out, header), header, done))
        kept = [asdict(chunk) for number, chunk in done.items() if number not in damaged]
        # and without what a kill left of a line
        write_atomic(out / CHUNKS, b"".join(json.dumps(chunk).encode() + b"\n" for chunk in kept))
        self._bar.update(sum(len(header.rows(chunk["chunk"])) for chunk in kept))
        return sorted({*range(header.chunks)} - {chunk["chunk"] for chunk in kept})

    def _make(self, chunk: int, descriptor: int) -> None:
        options, rows = self._options, self._header.rows(chunk)
        images = np.zeros((len(rows), 3, options.size, options.size), np.uint8)
        row_of = {self._indices[row]: row for row in rows}
        side = options.size if options.quality == "fast" else None
        bad: list[tuple[int, str]] = []
        for index, photo in self._photos.read(list(row_of), side):
            row = row_of.pop(index)
            if isinstance(photo, DataError):
                bad.append((row, str(photo)))
            else:
                square = centre_square(photo, options.size, _FILTERS[options.interpolation])
                images[row - rows.start] = np.asarray(square).transpose(2, 0, 1)
            self._bar.update()
        if row_of:
            raise DataError(
                f"{first_few([self._photos.names[index] for index in row_of])}: expected a photo, got none"
            )
        if bad and options.corrupt == "fatal":
            raise DataError(unusable([why for _, why in bad], len(rows)))
        data = images.data.cast("B")
        written = 0
        while written < len(data):
            written += os.pwrite(descriptor, data[written:], rows.start * self._header.image_bytes + written)
        # the bytes first, then the record of them
        os.fsync(descriptor)
        with self._lock:
            self._journal.append({"chunk": chunk, "crc32": zlib.crc32(data), "bad": bad})
