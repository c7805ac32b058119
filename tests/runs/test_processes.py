"""Several processes share a run: the same result as one, one writer, and clean ends."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from forked import asking
from killed import ENVIRONMENT
from same_run import assert_same_run, records

# two steps an epoch, the second of seven images: the processes' parts are unequal
SEARCH = (
    "search --space s2 --method rf-pcdarts --partial-channels 2 --channels 4 --layers 3 --batch-size 5 "
    "--epochs 2 --arch-warmup-epochs 1 --learning-rate 0.1 --backend reference"
)
TRAIN = "train --genotype DARTS_V2 --no-auxiliary --drop-path 0 --channels 4 --layers 2 --cutout 4 --epochs 2"
COMMANDS = {
    "search": SEARCH,
    "second-order": f"{SEARCH} --order second --arch-warmup-epochs 0",
    "one-level": f"{SEARCH} --levels 1",
    "compiled": SEARCH.replace("reference", "cpu"),
    "train": f"{TRAIN} --batch-size 17 --ema-decay 0.5",
}


# instead of a signal: the process changes a weight of its own
NUDGE = 0


@pytest.fixture(scope="module")
def ask():
    with asking("processes.py") as ask:
        yield ask


@pytest.fixture
def run(ask, tiny_npz, tmp_path):
    """Runs a command in several processes; their exit codes and logs."""

    def run(command, out, size, signalled=None):
        always = ["--dataset", "npz", "--data-root", str(tiny_npz), "--device", "cpu", "--out", str(out)]
        logs = tmp_path / "logs"
        name, *options = command.split()
        codes = ask([name, *always, *options], size, str(logs), signalled)
        return codes, [(logs / f"{rank}.txt").read_text() for rank in range(size)]

    return run


def done(codes, logs):
    assert set(codes) == {0}, "\n".join(logs)


def assert_close(a, b, where=""):
    if isinstance(a, torch.Tensor) and a.is_floating_point():
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-4, msg=lambda text: f"{where}: {text}")
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a.keys() - {"seconds", "history", "rng", "config"}:
            assert_close(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_close(x, y, f"{where}[{i}]")


@pytest.mark.parametrize("command", COMMANDS)
def test_two_processes_equal_one(run, command, tmp_path):
    """With synchronised BatchNorm, up to rounding: weights, alphas, momenta, running statistics, records."""
    options = f"{COMMANDS[command]} --sync-batch-norm"
    for size in (1, 2):
        done(*run(options, tmp_path / str(size), size))
    one, two = (torch.load(tmp_path / n / "checkpoint.pt", weights_only=True) for n in "12")
    assert_close(one, two, command)
    result = "genotype.json" if command != "train" else "result.json"
    assert (tmp_path / "2" / result).exists()
    both = (records(tmp_path / n / "metrics.jsonl") for n in "12")
    for a, b in zip(*both, strict=True):
        assert a["train"] == pytest.approx(b["train"], rel=1e-3)
    assert {p.name for p in (tmp_path / "1").iterdir()} == {p.name for p in (tmp_path / "2").iterdir()}


def test_without_synchronised_batch_norm_they_differ(run, tmp_path):
    """Or the test above could not fail."""
    for size in (1, 2):
        done(*run(SEARCH, tmp_path / str(size), size))
    one, two = (torch.load(tmp_path / n / "checkpoint.pt", weights_only=True) for n in "12")
    with pytest.raises(AssertionError):
        assert_close(one, two)


@pytest.mark.parametrize("command", ["search", "train"])
def test_one_process_dies(run, command, tmp_path):
    """The others leave and say so; the same command goes on, bit by bit, and with another number, too."""
    # drop path and noise draw numbers of their own in each process
    options = SEARCH.replace("s2", "s4") if command == "search" else TRAIN.replace("path 0", "path 0.5")
    # parts of unequal sizes: the processes' random states would part, too
    options += " --batch-size 7" if command == "search" else " --batch-size 13"
    options += " --checkpoint-minutes 1e-9"
    whole, folder, other = (tmp_path / name for name in ("whole", "run", "other"))
    done(*run(options, whole, 2))
    codes, logs = run(options, folder, 2, [1, 1, 1, signal.SIGKILL])
    assert codes == [1, -signal.SIGKILL], "\n".join(logs)
    last = logs[0].strip().splitlines()[-1]
    assert last.startswith(f"[process 0] rfdarts {command}: another process of the run is gone: ")
    assert last.endswith("epoch 1, step 1: the same command resumes")
    assert run(options, other, 2, [0, 1, 1, signal.SIGKILL])[0] == [-signal.SIGKILL, 1]
    done(*run(options, folder, 2))
    assert_same_run(folder, whole)
    codes, logs = run(options, other, 3)
    done(codes, logs)
    assert "3 processes share each batch" in logs[0]
    assert "resuming at epoch 1, step 1" in logs[0]
    assert not logs[1]


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_gradients_travel_in_one_message_a_step(run, tmp_path, micro_batches):
    """Of all trainable scalars, with four sums and four requests to stop, as float32."""
    options = f"{SEARCH} --levels 1 --grad-accum-steps {micro_batches}"
    codes, logs = run(options, tmp_path / "run", 2)
    done(codes, logs)
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["network"]
    frozen = ("num_batches_tracked", "running_mean", "running_var")
    scalars = {
        part: sum(
            x.numel()
            for name, x in state.items()
            if not name.endswith(frozen)
            and ((x.ndim == 1 and not name.startswith("classifier")) or name.startswith("alphas"))
            and (part or not name.startswith(("alphas", "betas")))
        )
        for part in (False, True)
    }
    # an epoch of warm-up, then one in which the architecture moves, of three steps each
    sent = ", ".join(f"3 of {4 * (scalars[part] + 8):,} bytes" for part in (False, True))
    assert f"gradient messages of each process: {sent}" in logs[0]


def test_a_signal_to_one_stops_all_after_the_same_step(run, tmp_path):
    whole, folder, options = tmp_path / "whole", tmp_path / "run", f"{TRAIN} --batch-size 8"
    done(*run(options, whole, 2))
    codes, logs = run(options, folder, 2, [1, 0, 1, signal.SIGUSR1])
    assert codes == [138, 138], "\n".join(logs)
    # process 0 heard of it with the gradients of that step
    assert "stopped and saved at epoch 0, step 2" in logs[0]
    assert not logs[1]
    done(*run(options, folder, 2))
    assert_same_run(folder, whole, unlike={"checkpoint.previous.pt"})


def test_processes_that_disagree_end(run, tmp_path):
    codes, logs = run(SEARCH, tmp_path / "run", 2, [1, 1, 1, NUDGE])
    assert codes == [1, 1]
    assert "process 1 has come to other weights or alphas than process 0 in epoch 1; the last good" in logs[0]
    assert not logs[1]
    # the epoch of warm-up is kept
    assert len(records(tmp_path / "run" / "metrics.jsonl")) == 1


def test_all_stop_at_the_step_that_diverges(run, tmp_path):
    options = f"{TRAIN} --batch-size 4 --learning-rate 1e9 --weight-decay 1e9 --grad-clip 0"
    codes, logs = run(options, tmp_path / "run", 2)
    assert codes == [1, 1]
    assert re.search(
        r": became NaN or infinite in epoch 0, step \d; the last good state is .*step 0", logs[0]
    )
    assert not logs[1]


def test_an_error_is_said_once(run, tmp_path):
    codes, logs = run(f"{SEARCH} --epochs 0", tmp_path / "run", 2)
    assert codes == [2, 2]
    assert logs == ["[process 0] rfdarts search: --epochs: expected a positive number, got 0\n", ""]
    codes, logs = run(f"{SEARCH} --batch-size 23", tmp_path / "run", 13)
    assert codes == [2] * 13
    assert "batch-size: expected an image for each of 13 processes in every step" in logs[0]
    assert not any(logs[1:])
    codes, logs = run(f"{SEARCH} --backend ALONE --sync-batch-norm", tmp_path / "run", 2)
    assert "sync-batch-norm: expected none on the backend cpu, got True" in logs[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("command", "option", "values"),
    [
        ("search", "seed", "1 and in process 0 0"),
        ("search", "arch_weight_decay", "1.0 and in process 0 0.0"),
        ("train", "weight_decay", "1.0 and in process 0 0.0"),
        ("train", "keep_checkpoints", "1 and in process 0 0"),
    ],
)
def test_other_options_are_refused(run, tmp_path, command, option, values):
    options = f"{COMMANDS[command]} --{option.replace('_', '-')} RANK"
    codes, logs = run(options, tmp_path / "run", 2)
    assert codes == [2, 2]
    said = f"options: expected the same in all processes, but in process 1 {option} is {values}"
    assert logs == [f"[process 0] rfdarts {command}: {said}\n", ""]
    assert not (tmp_path / "run").exists()


def test_another_version_is_refused(run, tmp_path):
    codes, logs = run(f"{SEARCH} --memory-format COMMIT", tmp_path / "run", 2)
    assert codes == [2, 2]
    assert "but in process 1 commit is 'commit 1' and in process 0 'commit 0'\n" in logs[0]
    assert not logs[1]


@pytest.mark.parametrize("command", ["search", "train"])
def test_other_data_are_refused(run, tiny_npz, tmp_path, command):
    """Paths may differ, what lies there may not."""
    arrays = dict(np.load(tiny_npz))
    folder = tmp_path / "data"
    folder.mkdir()
    np.savez(folder / "0.npz", **arrays)
    np.savez(folder / "1.npz", **arrays)
    options = f"{COMMANDS[command]} --data-root {folder}/RANK.npz"
    done(*run(options, tmp_path / "run", 2))
    arrays["x_train"] = 255 - arrays["x_train"]
    np.savez(folder / "1.npz", **arrays)
    codes, logs = run(options, tmp_path / "other", 2)
    assert codes == [2, 2]
    said = "data: expected the same in all processes, but in process 1 train has other images"
    assert logs == [f"[process 0] rfdarts {command}: {said}\n", ""]


@pytest.mark.slow
def test_torchrun_starts_anew_what_died(tiny_npz, tmp_path):
    """SIGKILL to process 0 once it has saved: torchrun ends the other, and both go on from the checkpoint."""
    whole, folder = tmp_path / "whole", tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [*torchrun, "--max-restarts", "2", "-m", "rfdarts_fast", *TRAIN.split(), "--batch-size", "6"]
    words += ["--epochs", "20", "--dataset", "npz", "--data-root", str(tiny_npz), "--device", "cpu", "--out"]
    subprocess.run([*words, str(whole)], env=ENVIRONMENT, check=True)
    started = dict(env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    with subprocess.Popen([*words, str(folder)], **started) as job:
        metrics = folder / "metrics.jsonl"
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 2:
            assert job.poll() is None, job.stdout.read()
            time.sleep(0.01)
        os.kill(json.loads((folder / ".lock.json").read_text())["pid"], signal.SIGKILL)
        log = job.communicate()[0].decode()
    assert job.returncode == 0, log
    assert "resuming at epoch " in log
    assert_same_run(folder, whole, unlike={"checkpoint.previous.pt"})


def test_a_process_dies_before_the_first_step(run, tmp_path):
    """While the others wait for what it has to say of its data."""
    codes, logs = run(SEARCH, tmp_path / "run", 2, [1, -1, -1, signal.SIGKILL])
    assert codes == [1, -signal.SIGKILL]
    assert logs[0].startswith("[process 0] rfdarts search: another process of the run is gone: ")
    assert logs[0].count("\n") == 1
