"""One process at a time in a run's folder; what a dead one left is no hindrance."""

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rfdarts_fast.runs.lock import FolderLock, InUse, describe
from rfdarts_fast.runs.run_folder import RunFolder, RunFolderError
from rfdarts_fast.search import search

HOLD = """
import sys, time
from pathlib import Path
from rfdarts_fast.runs.lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of tmp_path until its stdin is closed."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], env=ENVIRONMENT, **pipes) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_the_second_process_is_told_of_the_first(holder, tmp_path):
    who = f"{tmp_path} is in use by process {holder.pid} on {socket.gethostname()} since 20.*00:00$"
    with pytest.raises(InUse, match=who):
        FolderLock(tmp_path)
    # and again: the first attempt has not taken it
    with pytest.raises(InUse, match=who):
        FolderLock(tmp_path)
    holder.stdin.close()
    holder.wait()
    FolderLock(tmp_path).release()


def test_the_lock_of_a_killed_process_is_taken_over(holder, tmp_path):
    holder.kill()
    holder.wait()
    assert str(holder.pid) in describe(tmp_path)
    lock = FolderLock(tmp_path)
    assert str(os.getpid()) in describe(tmp_path)
    lock.release()
    assert not (tmp_path / ".lock.json").exists()


def test_workers_of_a_killed_process_are_waited_for(holder, tmp_path):
    """They may have its lock until they notice."""
    holder.kill()
    holder.wait()
    with (tmp_path / ".lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        child = os.fork()
        if not child:
            time.sleep(0.5)
            os._exit(0)
    try:
        FolderLock(tmp_path).release()
    finally:
        os.waitpid(child, 0)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"pid": "x", "host": 3}', None])
def test_a_holder_that_did_not_say_who_it_is(holder, tmp_path, content):
    if content is None:
        (tmp_path / ".lock.json").unlink()
    else:
        (tmp_path / ".lock.json").write_text(content)
    with pytest.raises(InUse, match=r"is in use by (another process|process x on 3 since None)$"):
        FolderLock(tmp_path)


@pytest.mark.filterwarnings("ignore:flock not supported")
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_file_systems_without_locks(tmp_path, monkeypatch, number):
    """A file stands for the lock; one that a dead process left is taken over."""

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    lock = FolderLock(tmp_path)
    with pytest.raises(InUse, match=f"process {os.getpid()} on"):
        FolderLock(tmp_path)
    lock.release()
    child = os.fork()
    if not child:
        FolderLock(tmp_path)
        os._exit(0)
    os.waitpid(child, 0)
    assert json.loads((tmp_path / ".lock.json").read_text())["pid"] == child
    FolderLock(tmp_path).release()


def test_a_run_in_a_folder_in_use(tiny_search, holder, tmp_path):
    config = tiny_search(out=tmp_path)
    with pytest.raises(RunFolderError, match=f"out: {tmp_path} is in use by process {holder.pid}"):
        search(config)
    assert {path.name for path in tmp_path.iterdir()} == {".lock", ".lock.json"}


def test_the_lock_is_let_go_whatever_happens(tiny_search, monkeypatch):
    config = tiny_search(epochs=1)
    monkeypatch.setattr("rfdarts_fast.search.run.SearchRun.train_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        search(config)
    monkeypatch.undo()
    search(config)
    config = tiny_search(epochs=1, image_size=8)
    with RunFolder(config.out, "search", config), pytest.raises(RunFolderError, match="is in use"):
        search(config)
    search(config)
