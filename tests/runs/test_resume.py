"""A run that was killed at any moment and started again ends bit by bit like one that was left alone."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from same_run import assert_same_run

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

# the noise of S4 and drop path draw from the global random state, which must be put back too
SEARCH = (
    "--method rf-pcdarts --space s4 --partial-channels 2 --channels 4 --layers 1 --batch-size 6 --epochs 2 "
    "--arch-warmup-epochs 0"
)
TRAIN = (
    "--genotype DARTS_V2 --no-auxiliary --drop-path 0.5 --channels 4 --layers 2 --cutout 4 --batch-size 12 "
    "--epochs 2"
)
OPTIONS = {"search": SEARCH, "train": TRAIN}
# a run writes config, environment, data, five or six checkpoints, metrics, results: each with an open, one or
# more writes, two flushes and a rename
CALLS = 60
# killed runs of a command, here and in the slow tests
KILLS, SLOW_KILLS = 6, 100


def arguments(command, npz, out, options=None):
    words = (options or OPTIONS[command]).split()
    always = ["--dataset", "npz", "--data-root", str(npz), "--device", "cpu", "--checkpoint-minutes", "1e-9"]
    return [command, *words, *always, "--out", str(out)]


@pytest.fixture(scope="module")
def run_all(tmp_path_factory):
    """Runs cases (arguments, n, signal) one after the other; returns their exit codes and output."""
    program = [sys.executable, str(Path(__file__).with_name("killed_runs.py"))]
    log = tmp_path_factory.mktemp("log") / "log.txt"
    with subprocess.Popen(
        program, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:

        def run_all(cases):
            log.write_text("")
            codes = []
            for case in cases:
                server.stdin.write(json.dumps([*case, str(log)]) + "\n")
                server.stdin.flush()
                code, run_all.calls = map(int, server.stdout.readline().split())
                codes.append(code)
            return codes, log.read_text()

        yield run_all
        server.stdin.close()


@pytest.fixture(scope="module")
def wholes(run_all, tiny_npz, tmp_path_factory):
    """Runs that were left alone, by command, and how many calls each made."""
    wholes = {}
    for command in OPTIONS:
        folder = tmp_path_factory.mktemp("whole") / command
        codes, log = run_all([[arguments(command, tiny_npz, folder), None, 0]])
        assert codes == [0], log
        wholes[command] = folder, run_all.calls
    return wholes


@pytest.fixture(scope="module")
def whole(wholes):
    return {command: folder for command, (folder, _) in wholes.items()}


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


# between the two renames of a checkpoint there is none; after the second the one before is the one that was
MOMENTS = ["replace checkpoint.pt", "open metrics.jsonl", "write metrics.jsonl", "fsync metrics.jsonl"]


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("command", OPTIONS)
def test_stops_when_asked_to(run_all, command, number, whole, tiny_npz, tmp_path):
    args = arguments(command, tiny_npz, tmp_path / "run")
    # rarely saving by itself, so that what is resumed is what the signal saved
    rare = [*args, "--checkpoint-minutes", "60"]
    codes, log = run_all([[rare, "fsync metrics.jsonl", number], [rare, None, 0]])
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
