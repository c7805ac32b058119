"""The bar of a long reading or writing of images."""

from __future__ import annotations

import sys

from tqdm import tqdm


def terminal_bar(total: int, what: str, unit: str, leave: bool = False) -> tqdm:
    """A bar on stderr if that is a terminal, else one that draws nothing; `leave` keeps it at the end."""
    hidden = not sys.stderr.isatty()
    return tqdm(total=total, desc=what, unit=unit, leave=leave, dynamic_ncols=True, disable=hidden)
