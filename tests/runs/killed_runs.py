"""Runs `rfdarts` in forked children, each of which may get a signal in the midst of writing its n-th file.

A program of its own, so that a child inherits no threads and no state of pytest, and one that stays, so that
torch is imported once. Each line of stdin is JSON, [arguments, n or null, signal, log file]; the answer is a
line with the exit code (negative: died of that signal).
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch

import rfdarts_fast.retrain
import rfdarts_fast.search  # noqa: F401
from rfdarts_fast import cli


def signal_in_write(n: int, number: int) -> None:
    """From now on the n-th flush to disk loses the last bytes of its file and sends this process a signal."""
    fsync, count = os.fsync, 0

    def counting(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count == n:
            if number == signal.SIGKILL:
                os.ftruncate(descriptor, max(os.fstat(descriptor).st_size - 9, 0))
            os.kill(os.getpid(), number)
        fsync(descriptor)

    os.fsync = counting


def run(arguments: list[str], n: int | None, number: int, log: str) -> int:
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code: object = 1
    try:
        torch.set_num_threads(1)
        with Path(log).open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        if n is not None:
            signal_in_write(n, number)
        sys.argv = ["rfdarts", *arguments]
        cli.main()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    # torch puts off some of its imports to the first optimiser
    torch.optim.SGD([torch.zeros(1)])
    for line in sys.stdin:
        print(run(*json.loads(line)), flush=True)
