"""Runs `rfdarts` in forked children, each of which may get a signal at a chosen system call on its folder.

A program of its own, so that a child inherits no threads and no state of pytest, and one that stays, so that
torch is imported once. Each line of stdin is JSON, [arguments, when, signal, log file]; the answer is a line
with the exit code (negative: died of that signal) and the number of calls. `when` is null, the number of the
call, or the first call in words: "fsync metrics.jsonl".
"""

import builtins
import io
import json
import os
import signal
import stat
import sys
from pathlib import Path

import torch

import rfdarts_fast.retrain
import rfdarts_fast.search  # noqa: F401
from rfdarts_fast import cli


class Written:
    """A file open for writing whose writes are calls, too."""

    def __init__(self, file, calls):
        self.file, self.calls = file, calls

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        def torn():
            self.file.write(data[: len(data) // 2])
            self.file.flush()

        self.calls.count("write", self.file.name, torn)
        return self.file.write(data)


class Calls:
    """Counts open, write, fsync, replace and unlink in a folder, and sends this process a signal at one.

    SIGKILL leaves a write half done, and of what is not yet flushed to disk the last bytes are lost.
    """

    def __init__(self, folder, when, number):
        self.folder, self.when, self.number = os.path.abspath(folder), when, number  # noqa: PTH100
        self.done = 0
        self.fsync = os.fsync
        os.fsync = self._fsync
        for name in ("replace", "unlink"):
            setattr(os, name, self._counting(name, getattr(os, name)))
        self.open = io.open
        io.open = builtins.open = self._open

    def count(self, call, path, before=lambda: None):
        path = os.path.abspath(path)  # noqa: PTH100
        if not path.startswith(self.folder):
            return
        self.done += 1
        if self.when in (self.done, f"{call} {Path(path).name}"):
            if self.number == signal.SIGKILL:
                before()
            os.kill(os.getpid(), self.number)

    def _fsync(self, descriptor):
        def lose():
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.ftruncate(descriptor, max(os.fstat(descriptor).st_size - 9, 0))

        self.count("fsync", os.readlink(f"/proc/self/fd/{descriptor}"), lose)  # noqa: PTH115
        self.fsync(descriptor)

    def _counting(self, name, function):
        def counting(path, *rest, **named):
            self.count(name, path)
            return function(path, *rest, **named)

        return counting

    def _open(self, path, mode="r", *rest, **named):
        if isinstance(path, int) or not set(mode) & set("wax+"):
            return self.open(path, mode, *rest, **named)
        self.count("open", path)
        return Written(self.open(path, mode, *rest, **named), self)


def run(arguments, when, number, log):
    reads, writes = os.pipe()
    child = os.fork()
    if child:
        os.close(writes)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with open(reads) as answer:  # noqa: PTH123
            return code, int(answer.read() or 0)
    code = 1
    calls = None
    try:
        torch.set_num_threads(1)
        with Path(log).open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        calls = Calls(arguments[arguments.index("--out") + 1], when, number)
        sys.argv = ["rfdarts", *arguments]
        cli.main()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(writes, str(calls.done if calls else 0).encode())
        os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        # see tests/search/conftest.py
        torch.backends.mkldnn.enabled = False
    # torch puts off some of its imports to the first optimiser
    torch.optim.SGD([torch.zeros(1)])
    for line in sys.stdin:
        print(*run(*json.loads(line)), flush=True)
