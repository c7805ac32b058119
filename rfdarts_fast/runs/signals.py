"""Signals and a time limit ask a run to save at the next step and leave."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType

# SIGUSR1 is what clusters send some time before they end a job
SIGNALS = [signal.SIGTERM, signal.SIGINT, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])]
TIME_IS_UP = 75
"""Exit code when the time limit is reached: EX_TEMPFAIL of sysexits.h, try again."""
CODES = (143, 130, 138, TIME_IS_UP)
"""Exit codes of runs that saved and left: 128 + the number of SIGTERM, SIGINT, SIGUSR1, or the time limit."""


class StopRequest:
    """While active, turns signals into an exit `code`; a second SIGINT interrupts at once.

    `seconds` from its making on, the code is TIME_IS_UP. Where a program has its own handler of SIGUSR1, that
    stays.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self._signalled: int | None = None
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._previous: dict[int, object] = {}

    @property
    def code(self) -> int | None:
        if self._signalled is not None:
            return self._signalled
        return TIME_IS_UP if self._deadline is not None and time.monotonic() >= self._deadline else None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._signalled == 128 + signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signalled = 128 + number

    def __enter__(self) -> StopRequest:
        # Python lets only the main thread set handlers
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                own = signal.getsignal(number)
                if number in (signal.SIGTERM, signal.SIGINT) or own is signal.SIG_DFL:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()


class Stopped(SystemExit):
    """The run saved its state and left because it was asked to; the exit code is one of CODES."""
