"""A run that was killed at any moment and started again ends bit by bit like one that was left alone."""

import itertools
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
# how many files a run writes at least: config, environment, five or six checkpoints, metrics, results
WRITES = 11


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
                codes.append(int(server.stdout.readline()))
            return codes, log.read_text()

        yield run_all
        server.stdin.close()


@pytest.fixture(scope="module")
def whole(run_all, tiny_npz, tmp_path_factory):
    """Runs that were left alone, by command."""
    folders = {command: tmp_path_factory.mktemp("whole") / command for command in OPTIONS}
    codes, log = run_all([[arguments(command, tiny_npz, out), None, 0] for command, out in folders.items()])
    assert codes == [0, 0], log
    return folders


@pytest.mark.parametrize("command", OPTIONS)
def test_killed_in_any_write(run_all, command, whole, tiny_npz, tmp_path):
    """SIGKILL in the n-th write of the run, its file cut short, then the same command again; for every n."""
    for n in itertools.count(1):
        args = arguments(command, tiny_npz, tmp_path / str(n))
        (killed,), log = run_all([[args, n, signal.SIGKILL]])
        if killed == 0:
            # the run has fewer writes
            break
        (resumed,), log = run_all([[args, None, 0]])
        assert (killed, resumed) == (-signal.SIGKILL, 0), log
        assert_same_run(tmp_path / str(n), whole[command])
    assert n > WRITES


@pytest.mark.parametrize("command", OPTIONS)
def test_killed_again_and_again(run_all, command, whole, tiny_npz, tmp_path):
    args = arguments(command, tiny_npz, tmp_path / "run")
    # a start that resumes writes environment, metrics and alphas before its first new checkpoint
    codes, log = run_all([[args, 6, signal.SIGKILL] for _ in range(12)] + [[args, None, 0]])
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
    first_record = 5 if command == "train" else 4
    codes, log = run_all([[rare, first_record, number], [rare, None, 0]])
    assert codes == [128 + number, 0], log
    assert "stopped and saved at epoch 1, step 1" in log
    assert "resuming at epoch 1, step 1 of 2" in log
    assert_same_run(tmp_path / "run", whole[command])


def test_killed_at_a_random_moment(run_all, tiny_npz, tmp_path):
    """The installed program's own path, without any help from inside."""
    options = SEARCH.replace("--epochs 2", "--epochs 8")
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


def test_damaged_files_give_one_clear_error(run_all, finished, tiny_npz):
    damages = {
        "checkpoint.pt": [b"", b"PK\3\4", b"not a checkpoint", None],
        "config.json": [b"", b"{"],
        "environment.json": [b"["],
        "metrics.jsonl": [b"{\n", b"[]\n"],
    }
    folder = finished("search")
    args, cases, backups = arguments("search", tiny_npz, folder), [], []
    for name, contents in damages.items():
        for content in contents:
            backups.append(shutil.copytree(folder, folder.with_name(f"damaged{len(backups)}")))
            file = backups[-1] / name
            # None: the first half
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if content is None else content)
            cases.append([[*args[:-1], str(backups[-1])], None, 0])
    codes, log = run_all(cases)
    lines = log.strip().splitlines()
    assert codes == [2] * len(cases), log
    assert len(lines) == len(cases), log
    names = [name for name, contents in damages.items() for _ in contents]
    for line, name in zip(lines, names, strict=True):
        assert line.startswith("rfdarts search: ")
        assert name in line
