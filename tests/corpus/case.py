"""A hostile input, what should become of it, and whether it does."""

import contextlib
import io
import os
import signal
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SECONDS = 20
# what may be where a file should be, and how to put it there
NO_FILES: dict[str, Callable[[Path], object]] = {
    "FIFO": os.mkfifo,
    "folder": Path.mkdir,
    "loop": lambda path: path.symlink_to(path),
}


@dataclass(frozen=True)
class Case:
    """An input of a family.

    Attributes:
        family: the parser that it is for.
        name: what is hostile in it; unique in its family.
        run: run(folder) hands the input to the parser; the folder is empty and its own.
        accepted: True if it is to be read, False if it is to be refused, None if either will do.
        names: what the error has to name.
    """

    family: str
    name: str
    run: Callable[[Path], object]
    accepted: bool | None
    names: str = ""

    @property
    def id(self) -> str:
        return f"{self.family}: {self.name}"


class Payload:
    """An object whose loading ends the program."""

    def __reduce__(self):
        return exec, ("raise SystemExit('a payload ran')",)


class TooSlow(BaseException):
    """A parser does not come to an end."""


def _ring(*_: object) -> None:
    raise TooSlow


def failure(case: Case, folder: Path) -> str | None:
    """What is wrong with the parser's answer, None if nothing is.

    Right is a value, or one line of an error class of the package that names what is at fault; never another
    error, and never more than `SECONDS`.
    """
    before = signal.signal(signal.SIGALRM, _ring)
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            case.run(folder)
    except TooSlow:
        return f"no answer in {SECONDS} s"
    except Exception as error:
        text = str(error)
        if not type(error).__module__.startswith("rfdarts_fast."):
            return f"{type(error).__name__}: {text[:200]}"
        if not text.isprintable():
            return f"more than one plain line: {text[:200]!r}"
        if len(text) > 1000 or "Traceback" in text:
            return f"a message of {len(text)} characters: {text[:200]}"
        if case.names not in text:
            return f"a message without {case.names!r}: {text[:200]}"
        return f"refused: {text[:200]}" if case.accepted else None
    except SystemExit as stop:
        return f"SystemExit({stop.code})"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return "accepted" if case.accepted is False else None


def tried(case: Case) -> str | None:
    """`failure` of a case in a temporary folder, which is also the working directory."""
    with tempfile.TemporaryDirectory() as folder:
        back = Path.cwd()
        os.chdir(folder)
        try:
            return failure(case, Path(folder))
        finally:
            os.chdir(back)


def damaged(content: bytes, cuts: int, flips: int):
    """(name, bytes): `content` cut short at `cuts` places, and `flips` times a few bytes overwritten."""
    for i in range(cuts):
        yield f"cut to {i}/{cuts}", content[: len(content) * i // cuts]
    yield "without its last byte", content[:-1]
    for i in range(flips):
        random = np.random.RandomState(i)
        changed = bytearray(content)
        for at in random.randint(0, len(content), 1 + i % 8):
            changed[at] = random.randint(256)
        yield f"flips {i}", bytes(changed)
