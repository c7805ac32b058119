"""Runs `rfdarts` in forked children, each of which may get a signal at a chosen system call on its folder.

A question, see `forked`, is [arguments, when, signal, log file], the answer the exit code (negative: died of
that signal) and the number of calls. `when` is null, the number of the call, or the call in words: "fsync
metrics.jsonl 2" is the second such. With -n in place of a signal, that call and all later ones of its kind
fail with error n. A fifth value may name a stdout: full, gone, closed or ascii.
"""

import builtins
import collections
import io
import os
import signal
import stat
import sys
from pathlib import Path

from forked import answer, leave

import rfdarts_fast.retrain
import rfdarts_fast.search  # noqa: F401


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
        self.failing, self.seen = None, collections.Counter()
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
        words = f"{call} {Path(path).name}"
        self.seen[words] += 1
        if self.failing == call or self.when in (self.done, f"{words} {self.seen[words]}"):
            if self.number < 0:
                self.failing = call
                raise OSError(-self.number, os.strerror(-self.number), path)
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


def lead_stdout(where, log):
    """Makes stdout and stderr the log, or stdout a place that cannot be written as it should."""
    with Path(log).open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if where == "full":
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    elif where == "gone":
        reader, writer = os.pipe()
        os.dup2(writer, 1)
        os.close(reader)
        os.close(writer)
    elif where == "closed":
        os.close(1)
        sys.stdout = None
    elif where == "ascii":
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(encoding="ascii", errors="strict")


def run(arguments, when, number, log, stdout=None):
    reads, writes = os.pipe()
    child = os.fork()
    if child:
        os.close(writes)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with open(reads) as count:  # noqa: PTH123
            return code, int(count.read() or 0)
    calls = None

    def prepare():
        nonlocal calls
        lead_stdout(stdout, log)
        out = arguments[arguments.index("--out") + 1] if "--out" in arguments else arguments[-1]
        calls = Calls(out, when, number)
        return arguments

    leave(prepare, lambda: os.write(writes, str(calls.done if calls else 0).encode()))


if __name__ == "__main__":
    answer(run)
