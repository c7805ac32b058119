"""Files that are never seen half written: a temporary name first, then a rename."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rfdarts_fast.messages import reason, thing_at


class WriteError(RuntimeError):
    """A file cannot be written: the disk is full, say, or its folder is gone."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """WriteError that names `path` for an OSError inside."""
    try:
        yield
    except OSError as error:
        what = reason(error) if path.parent.exists() else f"the folder {path.parent} is gone"
        raise WriteError(f"{path} cannot be written: {what}") from None


def read_bytes(path: Path) -> bytes:
    """The bytes of a file; OSError for what is none, such as a FIFO, whose writer would be waited for."""
    there = thing_at(path)
    if there not in ("a file", "nothing there"):
        raise OSError(f"it is {there}")
    return path.read_bytes()


def temporary(path: Path) -> Path:
    """The file that is written before it becomes `path`; a kill may leave it, the next write replaces it."""
    return path.with_name(f".{path.name}.tmp")


def write_atomic(path: Path, *parts: bytes | memoryview, previous: Path | None = None) -> None:
    """Writes `parts` to a temporary file beside `path`, flushes it to disk and renames it to `path`.

    A file that was there becomes `previous` if that is given. Raises WriteError, everything as it was.
    """
    with writing(path):
        moved = False
        try:
            with temporary(path).open("wb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            if previous is not None and path.exists():
                path.replace(previous)
                moved = True
            temporary(path).replace(path)
            sync_folder(path.parent)
        except OSError:
            # on a full disk its bytes are needed
            with contextlib.suppress(OSError):
                temporary(path).unlink()
            if moved and previous is not None:
                with contextlib.suppress(OSError):
                    previous.replace(path)
            raise


def link_or_copy(path: Path, other: Path) -> None:
    """Makes `other` the same file as `path`, or a copy where the file system has no links."""
    with contextlib.suppress(FileNotFoundError):
        temporary(other).unlink()
    try:
        os.link(path, temporary(other))
    except OSError:
        shutil.copyfile(path, temporary(other))
    temporary(other).replace(other)


def sync_folder(path: Path) -> None:
    """Flushes the names in a folder to disk, where the file system can."""
    with contextlib.suppress(OSError):
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_text(path: Path, text: str) -> None:
    write_atomic(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


class JsonLines:
    """A file of JSON objects, one a line. It grows; a resumed run drops the records behind its checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self) -> list[bytes]:
        """All complete lines with their ends; a line cut off by a kill is left out."""
        if not self.path.exists():
            return []
        data = read_bytes(self.path)
        return data[: data.rfind(b"\n") + 1].splitlines(keepends=True)

    def read(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines()]

    def append(self, record: dict[str, Any]) -> None:
        with writing(self.path):
            new = not self.path.exists()
            with self.path.open("ab") as file:
                file.write(json.dumps(record).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            if new:
                sync_folder(self.path.parent)

    def keep(self, count: int) -> None:
        """Drops all but the first `count` lines, and what a kill left of another."""
        kept = b"".join(self.lines()[:count])
        if self.path.exists() and self.path.stat().st_size != len(kept):
            write_atomic(self.path, kept)
