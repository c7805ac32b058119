"""Checking image files before a run starts: all of them, in parallel, with one summary of what is wrong."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from rfdarts_fast.messages import first_few

from .bar import terminal_bar
from .errors import DataError
from .photo import check_photo

# a future for each file would cost more than most of the checks
_CHUNK = 64


def unusable(problems: list[str], total: int) -> str:
    """The number of images that cannot be used, in words, and the first five."""
    return f"{len(problems)} of {total} images cannot be used: {first_few(problems, separator='; ')}"


def check_photos(paths: Sequence[str | os.PathLike[str]], decode: bool) -> dict[int, str]:
    """Reads the header of every file, or all of it with `decode`; a thread for each CPU, a bar on a terminal.

    Returns the reason for each file that cannot be used, by its place in `paths`.
    """
    problems: dict[int, str] = {}
    chunks = [paths[start : start + _CHUNK] for start in range(0, len(paths), _CHUNK)]
    bar = terminal_bar(len(paths), "checking images", "file")
    # filters are the process's, not the thread's
    with bar, warnings.catch_warnings(), ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
        warnings.simplefilter("ignore")
        try:
            checked = pool.map(lambda chunk: _problems(chunk, decode), chunks)
            for number, (chunk, wrong) in enumerate(zip(chunks, checked, strict=True)):
                problems |= {number * _CHUNK + place: why for place, why in wrong.items()}
                bar.update(len(chunk))
        finally:
            # Ctrl-C does not wait for the rest
            pool.shutdown(cancel_futures=True)
    return problems


def _problems(paths: Sequence[str | os.PathLike[str]], decode: bool) -> dict[int, str]:
    problems = {}
    for place, path in enumerate(paths):
        try:
            check_photo(path, decode)
        except DataError as error:
            problems[place] = str(error)
    return problems
