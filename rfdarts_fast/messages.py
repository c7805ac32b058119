"""The words of error messages, for every part of the package: one line each, whatever came."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def one_line(text: str) -> str:
    """`text` on one line of at most 1,000 characters, without anything that a terminal would act upon."""
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))
    # the end is what came
    return line if len(line) <= 1000 else f"{line[:600]} ... {line[-395:]}"


def shown(value: object, length: int = 60) -> str:
    """`repr(value)` for a message: cut to `length` characters, whatever came."""
    try:
        text = repr(value)
    except Exception:
        # Python prints no integer of more than 4,300 digits
        text = f"a value of type {type(value).__name__} that is too long to print"
    return text if len(text) <= length else f"{text[:length]}..."


def reason(error: Exception) -> str:
    """The reason that an error gives, in the system's words where it has them, or the name of its class."""
    words = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
    return words or type(error).__name__


def first_few(names: list[str], separator: str = ", ") -> str:
    """The first five of `names`, and how many more there are."""
    more = [f"and {len(names) - 5} more"] if len(names) > 5 else []
    return separator.join([*names[:5], *more])


_TYPES = {
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def thing_at(path: str | os.PathLike[str]) -> str:
    """The thing at `path`, links followed: "a file", "a folder", ..., or why there is none."""
    try:
        return _TYPES.get(stat.S_IFMT(Path(path).stat().st_mode), "no file")
    except FileNotFoundError:
        return "a broken link" if Path(path).is_symlink() else "nothing there"
    except (OSError, ValueError) as error:
        return reason(error)
