"""Text files, plain or gzipped, of a limited size."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

from rfdarts_fast.messages import reason, thing_at

from .errors import DataError, require


def read_unzipped(file: Path, expected: str, most_bytes: int) -> bytes:
    """The content of a file, unpacked if it is gzipped.

    Raises DataError, which begins with `expected`, for what is no file, what is damaged and what is longer.
    """
    there = thing_at(file)
    require(there == "a file", f"{expected}, got {there}")
    try:
        with file.open("rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            # a few bytes may unpack to any number
            content = (gzip.GzipFile(fileobj=raw) if zipped else raw).read(most_bytes + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{expected}, got {reason(error)}") from error
    require(len(content) <= most_bytes, f"{expected} of at most {most_bytes:,} bytes, got more")
    return content
