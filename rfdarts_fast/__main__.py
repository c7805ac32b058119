"""The program `rfdarts`, also `python -m rfdarts_fast`: loading it may fail or be interrupted, too."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from types import FrameType


def _leave(number: int, frame: FrameType | None) -> None:
    with contextlib.suppress(OSError):
        os.write(2, b"rfdarts: interrupted\n")
    # at once: a module that is half imported answers an exception with others
    os._exit(128 + number)


def main() -> None:
    """Runs the command line. Exit code 1 if it cannot be loaded, for lack of memory or of a package, say."""
    before = signal.signal(signal.SIGINT, _leave)
    try:
        from rfdarts_fast import cli
    except (ImportError, MemoryError, OSError, RuntimeError) as error:
        what = (str(error).strip() or type(error).__name__).splitlines()[0]
        with contextlib.suppress(OSError, AttributeError):
            print(f"rfdarts: cannot be loaded: {what}", file=sys.stderr)
        raise SystemExit(1) from None
    finally:
        signal.signal(signal.SIGINT, before)
    cli.main()


if __name__ == "__main__":
    main()
