"""A store of decoded images: one memory-mapped file of bytes, with what it was made of and its checksums.

store.json     the settings it was made with, the classes, the numbers of images and of images in a chunk
files.json     of each image, in order: its file's name, its label and the part of the subset it belongs to
images.u8      the images, uint8 [N, 3, S, S]
chunks.jsonl   of each finished chunk: its number, its CRC-32, and the images in it that could not be read
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rfdarts_fast.messages import reason, shown, thing_at

from .bar import terminal_bar
from .errors import DataError, require, require_int
from .fingerprint import of_tensor
from .memory import available_memory, gigabytes

VERSION = 1
HEADER, FILES, IMAGES, CHUNKS = "store.json", "files.json", "images.u8", "chunks.jsonl"
PARTS = ("train", "val")
Where = Literal["auto", "host", "device"]
_MOST_BYTES = 1 << 30


@dataclass(frozen=True)
class Header:
    """The contents of store.json.

    Attributes:
        settings: the options that decide what is stored, by name; `size` is the side of the images.
        classes: their names.
        number: images.
        chunk: images in each chunk but the last.
        files: SHA-256 of files.json.
    """

    settings: dict[str, Any]
    classes: list[str]
    number: int
    chunk: int
    files: str
    version: int = VERSION

    @property
    def side(self) -> int:
        return self.settings["size"]

    @property
    def image_bytes(self) -> int:
        return 3 * self.side * self.side

    @property
    def chunks(self) -> int:
        return -(-self.number // self.chunk)

    def rows(self, chunk: int) -> range:
        """The images of a chunk."""
        return range(chunk * self.chunk, min((chunk + 1) * self.chunk, self.number))


@dataclass(frozen=True)
class Chunk:
    """A finished chunk; `bad` has the number and the reason of each image that could not be read."""

    chunk: int
    crc32: int
    bad: list[tuple[int, str]]


def read_header(root: Path) -> Header:
    """The header of the store in the folder `root`; DataError if there is none, or none of this version."""
    values = _json(root / HEADER, _read(root / HEADER))
    try:
        header = Header(**values)
        numbers = header.number, header.chunk, header.settings["size"], header.version
        fractions = header.settings["train_fraction"], header.settings["val_fraction"]
        sound = (
            all(type(n) is int and 0 < n < 2**40 for n in numbers)
            and all(type(f) in (int, float) for f in fractions)
            and isinstance(header.classes, list)
            and all(type(name) is str for name in header.classes)
            and len(header.classes) > 0
        )
    except (TypeError, KeyError):
        sound = False
    require(sound, f"{root / HEADER}: expected the header of an image store, got {shown(values)}")
    require(
        header.version == VERSION, f"{root / HEADER}: expected version {VERSION}, got {shown(header.version)}"
    )
    return header


def read_files(root: Path, header: Header) -> tuple[list[str], Tensor, Tensor]:
    """Names, labels int64 [N] and parts int64 [N] (places in PARTS) of the images; DataError if damaged."""
    data = _read(root / FILES)
    require(
        hashlib.sha256(data).hexdigest() == header.files,
        f"{root / FILES}: expected the list of files that {HEADER} was written with, got another one",
    )
    values = _json(root / FILES, data)
    lists = names, labels, parts = [values.get(name) for name in ("names", "labels", "parts")]
    require(
        all(isinstance(x, list) and len(x) == header.number for x in lists)
        and all(type(name) is str for name in names)
        and all(type(label) is int and 0 <= label < len(header.classes) for label in labels)
        and all(type(part) is int and 0 <= part < len(PARTS) for part in parts),
        f"{root / FILES}: expected a name, a label and a part for each of {header.number} images, got others",
    )
    return names, torch.tensor(labels), torch.tensor(parts)


def read_chunks(root: Path, header: Header) -> dict[int, Chunk]:
    """The finished chunks by number; a line that a kill cut off is left out. DataError if damaged."""
    path = root / CHUNKS
    if not path.exists():
        return {}
    data = _read(path)
    chunks: dict[int, Chunk] = {}
    for line in data[: data.rfind(b"\n") + 1].splitlines():
        values = _json(path, line)
        try:
            bad = [(int(row), str(why)) for row, why in values["bad"]]
            chunk = Chunk(int(values["chunk"]), int(values["crc32"]), bad)
        except (TypeError, KeyError, ValueError):
            raise DataError(f"{path}: expected records of chunks, got {shown(values)}") from None
        require(0 <= chunk.chunk < header.chunks, f"{path}: there is no chunk {chunk.chunk}")
        chunks[chunk.chunk] = chunk
    return chunks


def open_images(root: Path, header: Header) -> np.ndarray[Any, Any]:
    """The images, uint8 [N, 3, S, S], mapped: what is written there stays in this process.

    Raises DataError for a file of another size.
    """
    path, expected = root / IMAGES, header.number * header.image_bytes
    there = thing_at(path)
    require(there == "a file", f"{path}: expected the images of the store, got {there}")
    got = path.stat().st_size
    require(
        got == expected,
        f"{path}: expected {expected:,} bytes, got {got:,}: truncated, or another store's",
    )
    # "c": PyTorch wants memory that may be written
    return np.memmap(path, np.uint8, "c", shape=(header.number, 3, header.side, header.side))


def damaged_chunks(images: np.ndarray[Any, Any], header: Header, chunks: dict[int, Chunk]) -> list[int]:
    """The chunks whose bytes are not those of their checksums; all are read, in a thread for each CPU."""
    bar = terminal_bar(len(chunks), "checking the store", "chunk")

    def is_damaged(chunk: Chunk) -> bool:
        rows = header.rows(chunk.chunk)
        damaged = zlib.crc32(images[rows.start : rows.stop].data) != chunk.crc32
        bar.update()
        return damaged

    with bar, ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
        results = pool.map(is_damaged, chunks.values())
        return [number for number, damaged in zip(chunks, results, strict=True) if damaged]


class StoredSet:
    """The images of a store that can be read: N of them, `labels` int64 [N], `parts` int64 [N].

    `image_size` is the side in pixels of what a batch crops of them; `side` theirs. Batches are gathered from
    the mapped file, or with `where` "device" from a copy on their device; "auto" takes that for a GPU half of
    whose free memory holds it.

    Raises DataError for a store that is not finished, truncated or damaged; every byte of it is read.
    """

    photos = True

    def __init__(self, root: Path) -> None:
        self.header = header = read_header(root)
        names, labels, parts = read_files(root, header)
        images = open_images(root, header)
        chunks = read_chunks(root, header)
        require(
            len(chunks) == header.chunks,
            f"{root}: expected a finished store, got {len(chunks)} of {header.chunks} chunks: the "
            "command that made it goes on",
        )
        damaged = damaged_chunks(images, header, chunks)
        require(
            not damaged,
            f"{root / IMAGES}: damaged: the checksums of chunks {shown(damaged)} are of other bytes",
        )
        bad = {row for chunk in chunks.values() for row, _ in chunk.bad}
        self._rows = torch.tensor([row for row in range(header.number) if row not in bad])
        require(len(self._rows) > 0, f"{root}: expected an image that could be read, got none")
        self.labels, self.parts = labels[self._rows], parts[self._rows]
        self.side = self.image_size = header.side
        self.where: Where = "auto"
        self._names = names
        self._images = torch.from_numpy(images)
        self._crcs = torch.tensor([chunks[k].crc32 for k in range(header.chunks)])
        self._copies: dict[torch.device, Tensor] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def names(self, indices: Sequence[int]) -> list[str]:
        return [self._names[int(self._rows[index])] for index in indices]

    def resized(self, image_size: int) -> StoredSet:
        """This set, cropped to image_size x image_size pixels; DataError if it has fewer."""
        require(
            require_int(image_size, "image_size", 1) <= self.side,
            f"image_size: expected at most the {self.side} pixels of the store, got {image_size}",
        )
        other = copy(self)
        other.image_size = image_size
        return other

    def placed(self, where: Where) -> StoredSet:
        """This set, read from there."""
        other = copy(self)
        other.where = where
        return other

    def split(self, fractions: tuple[float, float]) -> tuple[Tensor, Tensor]:
        """Indices of the two parts; DataError unless the store was made with these fractions."""
        names = ("train_fraction", "val_fraction")
        stored = tuple(self.header.settings[name] for name in names)
        for name, there, wanted in zip(names, stored, fractions, strict=True):
            require(there == wanted, f"{name}: expected the store's, {there:g}, got {wanted:g}")
        train, val = ((self.parts == k).nonzero().flatten() for k in range(len(PARTS)))
        return train, val

    def fingerprint(self) -> dict[str, str]:
        """SHA-256 of the settings and the list of files, of the chunks' checksums, and of the labels."""
        settings = json.dumps([self.header.settings, self.header.files], sort_keys=True)
        return {
            "files": hashlib.sha256(settings.encode()).hexdigest(),
            "images": of_tensor(self._crcs),
            "labels": of_tensor(self.labels),
        }

    def read(
        self, order: Iterator[tuple[int, int, Tensor]], device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of `order`, uint8 [B, 3, S, S] and int64 [B], on the device or on the CPU."""
        if self._on_device(device):
            images = self._copy_on(device)
            for _, _, indices in order:
                yield images.index_select(0, self._rows[indices].to(device)), self.labels[indices].to(device)
            return

        def gathered(indices: Tensor) -> tuple[Tensor, Tensor]:
            batch = self._images.index_select(0, self._rows[indices]), self.labels[indices]
            return (batch[0].pin_memory(), batch[1].pin_memory()) if device.type == "cuda" else batch

        chosen = (indices for _, _, indices in order)
        yield from (map(gathered, chosen) if device.type == "cpu" else _ahead(gathered, chosen))

    def _on_device(self, device: torch.device) -> bool:
        if self.where != "auto":
            return self.where == "device"
        return device.type == "cuda" and (
            device in self._copies or self._images.numel() <= torch.cuda.mem_get_info(device)[0] // 2
        )

    def _copy_on(self, device: torch.device) -> Tensor:
        if device not in self._copies:
            free = available_memory() if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
            needed = self._images.numel()
            require(
                needed <= free,
                f"cache_on: expected host for a store of {gigabytes(needed)}, got device, which has "
                f"{gigabytes(free)} free",
            )
            self._copies[device] = self._images.clone() if device.type == "cpu" else self._images.to(device)
        return self._copies[device]


def _ahead(make: Callable[[Tensor], Any], items: Iterator[Tensor]) -> Iterator[Any]:
    """make(item) for each item, the next one made in another thread while the last is used."""
    with ThreadPoolExecutor(1) as pool:
        waiting = [pool.submit(make, item) for item in (next(items, None),) if item is not None]
        while waiting:
            item = next(items, None)
            if item is not None:
                waiting.append(pool.submit(make, item))
            yield waiting.pop(0).result()


def _read(path: Path) -> bytes:
    there = thing_at(path)
    require(there == "a file", f"{path}: expected a file of an image store, got {there}")
    try:
        require(
            path.stat().st_size <= _MOST_BYTES, f"{path}: expected at most {_MOST_BYTES:,} bytes, got more"
        )
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: expected a readable file of an image store, got {reason(error)}") from error


def _json(path: Path, data: bytes) -> Any:
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: expected JSON, got {reason(error)}") from error
    require(isinstance(values, dict), f"{path}: expected named values, got {shown(values)}")
    return values
