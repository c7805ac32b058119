"""Output that may fail without harm: onto a full disk, to a reader that has left, in characters not known."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TextIO

from tqdm import tqdm

from rfdarts_fast.messages import reason


def repair_streams() -> None:
    """Makes sure of stdout and stderr, even closed ones; both escape what they cannot encode."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            # it takes the lowest free descriptor, or a file of the run would get it
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def silence(stream: TextIO) -> None:
    """Leads a stream that cannot be written nowhere, so that the end of the program does not fail on it."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def say(text: str) -> None:
    """Prints a line above a progress bar. If that fails, the program goes on without its output."""
    try:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
    except (OSError, ValueError) as error:
        silence(sys.stdout)
        # a reader that has left, such as head, has what it wants
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            complain(f"stdout cannot be written: {reason(error)}; the run goes on without")


def complain(text: str) -> None:
    """Prints a line to stderr, if that can be; under torchrun with the number of the process before it."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        text = f"[process {os.environ.get('RANK')}] {text}"
    try:
        print(text, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        silence(sys.stderr)
