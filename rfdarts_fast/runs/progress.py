"""The output of a run: a progress bar on a terminal, plain lines elsewhere, TensorBoard if asked."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rfdarts_fast.messages import reason
from rfdarts_fast.runs.config import require_package
from rfdarts_fast.runs.output import say


class Progress:
    """A bar over all steps of a run, with the time left; `line` prints above it.

    Args:
        total: steps of the whole run.
        done: steps that an earlier start did.
        shown: False in a process that another one speaks for.
    """

    def __init__(self, total: int, done: int, label: str, shown: bool = True) -> None:
        self._shown = shown
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=label,
            unit="step",
            dynamic_ncols=True,
            disable=not (shown and sys.stderr.isatty()),
        )

    def step(self) -> None:
        self._draw(self._bar.update)

    def line(self, text: str) -> None:
        if self._shown:
            say(text)

    def close(self) -> None:
        self._draw(self._bar.close)

    def _draw(self, draw: Callable[[], object]) -> None:
        """No bar where the terminal is gone; the run goes on."""
        try:
            draw()
        except (OSError, ValueError):
            self._bar.disable = True


class EventWriter:
    """TensorBoard events of the numbers in a metrics record; does nothing unless enabled."""

    def __init__(self, folder: Path, enabled: bool) -> None:
        self._writer = None
        if enabled:
            require_package("tensorboard", "tensorboard", "log", "torch.utils.tensorboard")
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"))

    def add(self, record: dict) -> None:
        if self._writer is None:
            return
        try:
            for name, value in numbers(record):
                self._writer.add_scalar(name, value, record["epoch"])
            self._writer.flush()
        except OSError as error:
            self._writer = None
            say(f"tensorboard: no more events: {reason(error)}")

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def numbers(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a metrics record, those of nested parts as "train/loss"."""
    for name, value in record.items():
        if isinstance(value, dict):
            yield from numbers(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}{name}", value
