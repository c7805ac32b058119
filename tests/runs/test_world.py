"""What the world does to a run: full disks, lost output, memory, interrupts. The last good state stays."""

import errno
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from interrupted_runs import COMMANDS
from killed import ENVIRONMENT, OPTIONS, arguments
from same_run import assert_same_run

from rfdarts_fast.runs.run import RunFailed
from rfdarts_fast.runs.run_folder import RunFolderError

SAVED = "the last good state is"

# a call that fails and its error -> exit code and parts of the message
FAILURES = {
    "new-folder": ("open .config.json.tmp 1", errno.EACCES, 2, ["config.json", "Permission denied"]),
    "read-only": ("open .config.json.tmp 1", errno.EROFS, 2, ["config.json", "Read-only file system"]),
    "lock": ("open ..lock.json.tmp 1", errno.ENOSPC, 2, [".lock.json", "No space left on device"]),
    "environment": ("write .environment.json.tmp 1", errno.ENOSPC, 2, ["environment.json", "No space left"]),
    "first-checkpoint": ("write .checkpoint.pt.tmp 1", errno.ENOSPC, 1, ["checkpoint.pt", "nothing is lost"]),
    "checkpoint": (
        "write .checkpoint.pt.tmp 8",
        errno.ENOSPC,
        1,
        ["No space left", SAVED, "epoch 0, step 1"],
    ),
    "checkpoint-flush": ("fsync .checkpoint.pt.tmp 3", errno.EIO, 1, ["Input/output error", SAVED]),
    "quota": ("fsync .checkpoint.pt.tmp 4", errno.EDQUOT, 1, ["quota exceeded", SAVED, "epoch 0, step 2"]),
    "rename": (
        "replace .checkpoint.pt.tmp 3",
        errno.EACCES,
        1,
        ["Permission denied", SAVED, "epoch 0, step 1"],
    ),
    "record": ("write metrics.jsonl 1", errno.ENOSPC, 1, ["metrics.jsonl", "No space left", SAVED]),
    "genotype": ("open .genotype.json.tmp 1", errno.ENOSPC, 1, ["genotype.json", "No space left"]),
}


@pytest.mark.parametrize("case", FAILURES)
@pytest.mark.parametrize("command", OPTIONS)
def test_a_call_that_fails(run_all, command, case, whole, tiny_npz, tmp_path):
    """Then the same command goes on, and ends as the run that was left alone."""
    when, number, code, parts = FAILURES[case]
    args = arguments(command, tiny_npz, tmp_path / "run")
    codes, log = run_all([[args, when, -number]])
    message = log.strip().splitlines()[-1]
    assert codes == [code], log
    assert message.startswith(f"rfdarts {command}: ")
    for part in parts:
        assert part in message
    assert "Traceback" not in log
    assert not list((tmp_path / "run").glob("*.tmp"))
    codes, log = run_all([[args, None, 0]])
    assert codes == [0], log
    # after a failed rename the one before is not what it was
    assert_same_run(tmp_path / "run", whole[command], unlike={"checkpoint.previous.pt"})


@pytest.mark.parametrize("stdout", ["full", "gone", "closed", "ascii"])
@pytest.mark.parametrize("command", OPTIONS)
def test_a_run_goes_on_without_its_output(run_all, command, stdout, whole, tiny_npz, tmp_path):
    folder = tmp_path / "größe 日本\udcff"
    codes, log = run_all([[arguments(command, tiny_npz, folder), None, 0, stdout]])
    assert codes == [0], log
    assert_same_run(folder, whole[command])
    assert "Traceback" not in log
    if stdout == "full":
        assert log == "stdout cannot be written: No space left on device; the run goes on without\n"
    elif stdout == "ascii":
        assert r"gr\xf6\xdfe \u65e5\u672c\udcff" in log
    else:
        assert not log


@pytest.mark.parametrize("args", [["--help"], ["search", "--help"], ["env"]])
@pytest.mark.parametrize(("stdout", "code"), [("full", 1), ("gone", 141), ("closed", 0), ("ascii", 0)])
def test_commands_whose_output_is_all_they_do(run_all, args, stdout, code):
    codes, log = run_all([[args, None, 0, stdout]])
    assert codes == [code], log
    assert log.endswith("stdout: No space left on device\n") if stdout == "full" else "Error" not in log
    if stdout != "ascii":
        assert log.count("\n") == (stdout == "full")


def test_errors_on_an_ascii_terminal(run_all, tiny_npz, tmp_path):
    folder = tmp_path / "größe"
    folder.write_text("a file")
    codes, log = run_all([[arguments("search", tiny_npz, folder), None, 0, "ascii"]])
    assert codes == [2]
    assert log == f"rfdarts search: --out: expected a folder, got the file {tmp_path}/gr\\xf6\\xdfe\n"


def stopped_in_step(runs, folder, action, error):
    """The message of the error with which a run ends whose first step is the action."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(COMMANDS[runs.command][3], "train_step", lambda *_: action())
        with pytest.raises(error) as raised:
            runs.go_on(folder)
    return str(raised.value)


def raising(error):
    def action():
        raise error

    return action


MEMORY = [
    MemoryError(),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried\nmore"
    ),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation"),
]


@pytest.mark.parametrize("error", MEMORY, ids=["MemoryError", "CPU", "CUDA"])
def test_memory_runs_out(runs, tmp_path, error):
    folder = runs.copy(tmp_path / "run")
    text = stopped_in_step(runs, folder, raising(error), RunFailed)
    assert text.startswith("memory: ")
    assert text.endswith(f"; {SAVED} {folder}/checkpoint.pt, epoch 1, step 0: the same command resumes")
    assert "\n" not in text
    runs.go_on(folder)
    assert_same_run(folder, runs.whole)


def test_other_errors_are_not_taken_for_memory(runs, tmp_path):
    folder = runs.copy(tmp_path / "run")
    assert stopped_in_step(runs, folder, raising(RuntimeError("a bug")), RuntimeError) == "a bug"


def test_the_folder_vanishes(all_runs, tmp_path):
    runs = all_runs["search"]
    folder = runs.copy(tmp_path / "run")

    def vanish():
        shutil.rmtree(folder, ignore_errors=True)
        os.kill(os.getpid(), signal.SIGTERM)

    text = stopped_in_step(runs, folder, vanish, RunFailed)
    assert f"checkpoint.pt cannot be written: the folder {folder} is gone" in text


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(all_runs, tmp_path):
    folder = all_runs["search"].copy(tmp_path / "run")
    folder.chmod(0o500)
    with pytest.raises(RunFolderError, match=f"out: {folder} cannot be used: Permission denied"):
        all_runs["search"].go_on(folder)


INTERRUPTED = """
import sys, time
class Slow:
    def find_spec(self, name, *_):
        if name == "rfdarts_fast.cli":
            print("loading", flush=True)
            time.sleep(60)
sys.meta_path.insert(0, Slow())
sys.argv[0] = "rfdarts"
from rfdarts_fast.__main__ import main
main()
"""


def test_interrupted_while_it_loads():
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", INTERRUPTED, "env"], env=ENVIRONMENT, **pipes) as process:
        assert process.stdout.readline() == b"loading\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == b"rfdarts: interrupted\n"
    assert process.returncode == 130


UNLOADABLE = """
import sys
sys.modules["torch"] = None
from rfdarts_fast.__main__ import main
main()
"""


def test_a_package_is_missing():
    done = subprocess.run([sys.executable, "-c", UNLOADABLE], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("rfdarts: cannot be loaded: ")
    assert done.stderr.count("\n") == 1
