"""A run that was killed at any moment and started again ends bit by bit like one that was left alone."""

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from killed import ENVIRONMENT, OPTIONS, SEARCH, arguments
from same_run import assert_same_run

# a run writes config, environment, data, five or six checkpoints, metrics, results: each with an open, one or
# more writes, two flushes and a rename
CALLS = 60
# killed runs of a command, here and in the slow tests
KILLS, SLOW_KILLS = 6, 100


def kill_and_resume(run_all, args, call, whole):
    (killed, resumed), log = run_all([[args, call, signal.SIGKILL], [args, None, 0]])
    assert (killed, resumed) == (-signal.SIGKILL, 0), f"call {call}: {log}"
    assert_same_run(Path(args[-1]), whole)


@pytest.mark.parametrize("kills", [KILLS, pytest.param(SLOW_KILLS, marks=pytest.mark.slow)])
@pytest.mark.parametrize("command", OPTIONS)
def test_killed_at_any_call(run_all, command, kills, wholes, tiny_npz, tmp_path):
    """SIGKILL at the n-th open, write, flush, rename or deletion, then the same command again."""
    whole, calls = wholes[command]
    assert calls > CALLS
    # evenly spread, from another first one each time
    start = random.Random().randrange(calls)
    for n in range(kills):
        args = arguments(command, tiny_npz, tmp_path / str(n))
        kill_and_resume(run_all, args, (start + n * max(calls // kills, 1)) % calls + 1, whole)


# before and between the renames of a checkpoint, and around a record
MOMENTS = [
    "replace checkpoint.pt 2",
    "replace .checkpoint.pt.tmp 3",
    "open metrics.jsonl 1",
    "write metrics.jsonl 2",
    "fsync metrics.jsonl 1",
]


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_a_weak_moment(run_all, moment, whole, tiny_npz, tmp_path):
    kill_and_resume(run_all, arguments("train", tiny_npz, tmp_path / "run"), moment, whole["train"])


@pytest.mark.parametrize("command", OPTIONS)
def test_killed_again_and_again(run_all, command, whole, tiny_npz, tmp_path):
    args = arguments(command, tiny_npz, tmp_path / "run")
    # a start that resumes writes its lock and the environment before its first new checkpoint
    codes, log = run_all([[args, 40, signal.SIGKILL] for _ in range(6)] + [[args, None, 0]])
    assert codes[0] == -signal.SIGKILL
    assert codes[-1] == 0, log
    assert codes.count(-signal.SIGKILL) > 1
    assert_same_run(tmp_path / "run", whole[command])


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda number: number.name
)
@pytest.mark.parametrize("command", OPTIONS)
def test_stops_when_asked_to(run_all, command, number, whole, tiny_npz, tmp_path):
    args = arguments(command, tiny_npz, tmp_path / "run")
    # rarely saving by itself, so that what is resumed is what the signal saved
    rare = [*args, "--checkpoint-minutes", "60"]
    codes, log = run_all([[rare, "fsync metrics.jsonl 1", number], [rare, None, 0]])
    assert codes == [128 + number, 0], log
    assert "stopped and saved at epoch 1, step 1" in log
    assert "resuming at epoch 1, step 1 of 2" in log
    assert_same_run(tmp_path / "run", whole[command], unlike={"checkpoint.previous.pt"})


def test_killed_at_a_random_moment(run_all, tiny_npz, tmp_path):
    """The installed program's own path, without any help from inside."""
    options = SEARCH.replace("--epochs 2", "--epochs 4")
    pair = [arguments("search", tiny_npz, tmp_path / name, options) for name in ("killed", "whole")]
    running = subprocess.Popen(
        [sys.executable, "-m", "rfdarts_fast.cli", *pair[0]],
        env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not (tmp_path / "killed" / "checkpoint.pt").exists():
        assert running.poll() is None
        time.sleep(0.01)
    time.sleep(random.Random().uniform(0, 0.5))
    running.kill()
    assert running.wait() in (-signal.SIGKILL, 0)
    codes, log = run_all([[args, None, 0] for args in pair])
    assert codes == [0, 0], log
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


@pytest.fixture
def finished(whole, tmp_path):
    """A copy of a finished run, by command."""

    def copy(command):
        return Path(shutil.copytree(whole[command], tmp_path / command))

    return copy


@pytest.mark.parametrize("command", OPTIONS)
def test_a_finished_run_stays_as_it_is(run_all, command, whole, finished, tiny_npz):
    folder = finished(command)
    codes, log = run_all([[arguments(command, tiny_npz, folder), None, 0]])
    assert codes == [0], log
    for file in whole[command].iterdir():
        # each start is noted there
        if file.name != "environment.json":
            assert (folder / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ("--epochs 3", "epochs is 2 there and 3 here"),
        ("--seed 7 --channels 8", "channels is 4 there and 8 here; seed is 2 there and 7 here"),
    ],
)
@pytest.mark.parametrize("command", OPTIONS)
def test_another_config_is_refused(run_all, command, options, difference, whole, finished, tiny_npz):
    folder = finished(command)
    codes, log = run_all([[[*arguments(command, tiny_npz, folder), *options.split()], None, 0]])
    assert codes == [2]
    assert f"belongs to another run: {difference}" in log
    assert_same_run(folder, whole[command])
    for name in ("config.json", "environment.json"):
        assert (folder / name).read_bytes() == (whole[command] / name).read_bytes()


def test_another_command_is_refused(run_all, whole, finished, tiny_npz):
    folder = finished("search")
    codes, log = run_all([[arguments("train", tiny_npz, folder), None, 0]])
    assert codes == [2]
    assert "command is 'search' there and 'train' here" in log
    assert_same_run(folder, whole["search"])
