"""Checking image files before a run starts: all of them, in parallel, with one summary of what is wrong."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from rfdarts_fast.messages import first_few

from .errors import DataError
from .photo import check_photo

# a future for each file would cost more than most of the checks
_CHUNK = 64


def check_photos(paths: Sequence[str | os.PathLike[str]], decode: bool) -> None:
    """Reads the header of every file, or all of it with `decode`; a thread for each CPU, a bar on a terminal.

    Raises DataError that counts the unusable files and names the first five.
    """
    problems: list[str] = []
    chunks = [paths[start : start + _CHUNK] for start in range(0, len(paths), _CHUNK)]
    bar = tqdm(
        total=len(paths),
        desc="checking images",
        unit="file",
        dynamic_ncols=True,
        leave=False,
        disable=not sys.stderr.isatty(),
    )
    # filters are the process's, not the thread's
    with bar, warnings.catch_warnings(), ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
        warnings.simplefilter("ignore")
        try:
            checked = pool.map(lambda chunk: _problems(chunk, decode), chunks)
            for chunk, wrong in zip(chunks, checked, strict=True):
                problems += wrong
                bar.update(len(chunk))
        finally:
            # Ctrl-C does not wait for the rest
            pool.shutdown(cancel_futures=True)
    if problems:
        raise DataError(
            f"{len(problems)} of {len(paths)} images cannot be used: {first_few(problems, separator='; ')}"
        )


def _problems(paths: Sequence[str | os.PathLike[str]], decode: bool) -> list[str]:
    problems = []
    for path in paths:
        try:
            check_photo(path, decode)
        except DataError as error:
            problems.append(str(error))
    return problems
