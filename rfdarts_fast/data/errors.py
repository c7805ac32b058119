"""The one exception that bad input data raises, and the words of its message."""

from __future__ import annotations

import os
import stat
from pathlib import Path


class DataError(ValueError):
    """Input data or a data option is unusable: one line that names it, what was expected and what came."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """`text` on one line, without anything that a terminal would act upon."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))


def shown(value: object, length: int = 60) -> str:
    """`repr(value)` for a message: cut to `length` characters, whatever came."""
    try:
        text = repr(value)
    except Exception:
        # Python prints no integer of more than 4,300 digits
        text = f"a value of type {type(value).__name__} that is too long to print"
    return text if len(text) <= length else f"{text[:length]}..."


def reason(error: Exception) -> str:
    """The reason that an error of a library gives, or the name of its class where it gives none."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def first_few(names: list[str], count: int = 5, separator: str = ", ") -> str:
    """The first `count` of `names`, and how many more there are."""
    more = f"{separator}and {len(names) - count} more" if len(names) > count else ""
    return separator.join(names[:count]) + more


def require(condition: bool, message: str) -> None:
    """Raise `DataError(message)` unless `condition` holds."""
    if not condition:
        raise DataError(message)


def require_int(value: object, name: str, minimum: int) -> int:
    """`value` as an int of at least `minimum`; DataError naming `name` otherwise (bool is no int here)."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise DataError(f"{name}: expected an integer of at least {minimum}, got {shown(value)}")
    return value


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
