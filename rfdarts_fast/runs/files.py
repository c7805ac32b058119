"""Files that are never seen half written: a temporary name first, then a rename."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


def temporary(path: Path) -> Path:
    """The file that is written before it becomes `path`; a kill may leave it, the next write replaces it."""
    return path.with_name(f".{path.name}.tmp")


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Calls `write` on a temporary file beside `path`, flushes it to disk and renames it to `path`."""
    with temporary(path).open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    temporary(path).replace(path)


def write_text(path: Path, text: str) -> None:
    write_atomic(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


class JsonLines:
    """A file of JSON objects, one a line. It grows; a resumed run drops the records behind its checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """All complete lines; a line cut off by a kill is dropped."""
        if not self.path.exists():
            return []
        text = self.path.read_text()
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def append(self, record: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Drops all records but those for which `wanted` is true."""
        records = filter(wanted, self.read())
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in records))
