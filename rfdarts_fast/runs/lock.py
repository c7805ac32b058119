"""The lock of a run's folder: one process at a time."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import filelock

from rfdarts_fast.runs.files import write_json

LOCK, HOLDER = ".lock", ".lock.json"
# the file system knows no locks
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


class InUse(ValueError):
    """Another process runs in the folder; the message names it."""


def holder(folder: Path) -> dict[str, Any]:
    """Host, process id and start time of the process that holds the lock, as far as it wrote them."""
    try:
        written = json.loads((folder / HOLDER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return written if isinstance(written, dict) else {}


def describe(folder: Path) -> str:
    """The holder in words."""
    there = holder(folder)
    if not there:
        return "another process"
    return f"process {there.get('pid')} on {there.get('host')} since {there.get('started')}"


def _is_dead(there: dict[str, Any]) -> bool:
    """True for a process of this host that is no more; of other hosts' nothing is known."""
    if there.get("host") != socket.gethostname() or not isinstance(there.get("pid"), int):
        return False
    try:
        os.kill(there["pid"], 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:
        pass
    return False


class FolderLock:
    """Holds the lock of `folder` until `release`.

    The operating system drops the lock of a process that died, on NFS when its client is gone, too. Where the
    file system has no such locks, a file stands for it, and one that a dead process of this host left is
    taken over.

    Raises:
        InUse: if another process, or another run of this one, holds it.
        OSError: if the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._holder = folder / HOLDER
        lock = filelock.FileLock(folder / LOCK)
        try:
            self._lock = _acquired(lock, folder)
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
                raise
            self._lock = _acquired(filelock.SoftFileLock(folder / f"{LOCK}.soft"), folder)
        try:
            write_json(
                self._holder,
                {
                    "host": socket.gethostname(),
                    "pid": os.getpid(),
                    "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                },
            )
        except BaseException:
            self._lock.release()
            raise

    def release(self) -> None:
        if self._lock.is_locked:
            with contextlib.suppress(OSError):
                self._holder.unlink()
            with contextlib.suppress(OSError):
                self._lock.release()


def _acquired(lock: filelock.BaseFileLock, folder: Path) -> filelock.BaseFileLock:
    # worker processes of a killed run may hold its lock for some seconds more
    timeout = 10.0 if _is_dead(holder(folder)) else 0.0
    try:
        lock.acquire(timeout=timeout)
    except filelock.Timeout:
        raise InUse(f"out: {folder} is in use by {describe(folder)}") from None
    return lock
