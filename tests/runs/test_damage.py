"""Damaged, edited and foreign files in a run's folder: one error that names them, and nothing changed."""

import io
import json
import random
import shutil

import numpy as np
import pytest
import torch
from interrupted_runs import COMMANDS
from same_run import assert_same_run, contents

from rfdarts_fast.retrain import evaluate_run
from rfdarts_fast.runs.checkpoint import CheckpointError, DamagedError, load_checkpoint, save_checkpoint
from rfdarts_fast.runs.run_folder import RunFolderError

LAST, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"


def refused(runs, folder, error, *parts):
    """The run is refused in one line with these parts, and its folder stays as it is."""
    before = contents(folder)
    with pytest.raises(error) as raised:
        runs.go_on(folder)
    text = str(raised.value)
    for part in (*parts, str(folder)):
        assert part in text
    assert "\n" not in text
    assert "weights_only" not in text
    assert contents(folder) == before
    return text


class Payload:
    """An object whose loading would run code."""

    def __reduce__(self):
        return exec, ("raise SystemExit('the payload ran')",)


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def flipped(data, position):
    changed = bytearray(data)
    changed[position] ^= 1
    return bytes(changed)


# bytes of the checkpoint -> what is found there instead, and a part of the message
DAMAGE = {
    "empty": (lambda data: b"", "it is empty"),
    "text": (lambda data: b"not a checkpoint", "it begins with b'not a ch'"),
    "zeros": (lambda data: bytes(len(data)), "it begins with"),
    "random": (lambda data: random.Random(0).randbytes(1000), "it begins with"),
    "random-zip": (lambda data: b"PK\3\4" + random.Random(0).randbytes(1000), "in its archive"),
    "header-only": (lambda data: data[:4], "in its archive"),
    "first-half": (lambda data: data[: len(data) // 2], "in its archive"),
    "last-byte": (lambda data: data[:-1], "is damaged"),
    "doubled": (lambda data: data + data, "is damaged"),
    "appended": (lambda data: data + b"\0", "is damaged"),
    "flip-start": (lambda data: flipped(data, 20), "its checksum is of other bytes"),
    "flip-middle": (lambda data: flipped(data, len(data) // 2), "its checksum is of other bytes"),
    "flip-checksum": (lambda data: flipped(data, len(data) - 5), "is damaged"),
    "flip-comment": (lambda data: flipped(data, len(data) - 80), "its checksum is missing"),
    "none": (lambda data: saved(None), "it holds NoneType"),
    "list": (lambda data: saved([1]), "it holds list"),
    "payload": (lambda data: saved({"network": Payload()}), "other things than numbers and tensors"),
    "array": (lambda data: saved({"network": np.zeros(3)}), "other things than numbers and tensors"),
}


@pytest.mark.parametrize(("change", "part"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_checkpoint(all_runs, tmp_path, change, part):
    """The one before is gone on from, and the run ends as the one left alone; without it, an error."""
    runs = all_runs["search"]
    folder = runs.copy(tmp_path / "run")
    damaged = change((folder / LAST).read_bytes())
    (folder / LAST).write_bytes(damaged)
    with pytest.raises(DamagedError, match=part):
        load_checkpoint(folder / LAST)
    alone = runs.copy(tmp_path / "alone")
    for name in (LAST, PREVIOUS):
        (alone / name).write_bytes(damaged)
    refused(runs, alone, CheckpointError, part, LAST, "--restart")
    if part in ("is damaged", "it is empty"):
        runs.go_on(folder)
        assert (folder / "checkpoint.damaged.pt").read_bytes() == damaged
        (folder / "checkpoint.damaged.pt").unlink()
        assert_same_run(folder, runs.whole, unlike={PREVIOUS})


@pytest.mark.parametrize("seed", range(20))
def test_any_flipped_bit_is_seen(all_runs, tmp_path, seed):
    data = (all_runs["train"].interrupted / LAST).read_bytes()
    file = tmp_path / LAST
    file.write_bytes(flipped(data, random.Random(seed).randrange(len(data))))
    with pytest.raises(DamagedError):
        load_checkpoint(file)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_checkpoint_that_is_missing(all_runs, tmp_path, command, capsys):
    runs = all_runs[command]
    folder = runs.copy(tmp_path / "run")
    (folder / LAST).unlink()
    runs.go_on(folder)
    assert f"{LAST} is missing; going on from {PREVIOUS}, epoch 0, step 0" in capsys.readouterr().out
    assert_same_run(folder, runs.whole, unlike={PREVIOUS})
    alone = runs.copy(tmp_path / "alone")
    (alone / LAST).unlink()
    (alone / PREVIOUS).unlink()
    refused(runs, alone, RunFolderError, "metrics.jsonl", f"no {LAST} to go on from", "--restart")


def weights(state):
    return state["network"]["classifier.weight"]


def set_in(*path):
    """A change of a state: the value at `path`, whose last entry is the new one."""

    def change(state):
        *keys, last, value = path
        for key in keys:
            state = state[key]
        state[last] = value

    return change


def optimizer(state):
    return state["weight_optimizer" if "weight_optimizer" in state else "optimizer"]


def other_step(state):
    kept = next(iter(optimizer(state)["state"].values()))
    kept["momentum_buffer"] = kept["momentum_buffer"][:1]


# changes of a state that is then saved with a right checksum, and a part of the message
MISFITS = {
    "empty": (lambda state: state.clear(), "it has no 'network'"),
    "no-epoch": (lambda state: state.pop("epoch"), "it has no 'epoch'"),
    "unknown-part": (set_in("swish", 1), "it has 'swish', which the run has not"),
    "newer": (set_in("version", 3), "has format 3, and this version reads up to 2"),
    "version-text": (set_in("version", "new"), "has format 'new'"),
    "no-network": (set_in("network", None), "network: expected named parts, got None"),
    "tensor-network": (set_in("network", torch.zeros(3)), "network: expected named parts, got float32 [3]"),
    "no-classifier": (
        lambda state: state["network"].pop("classifier.weight"),
        "no 'network.classifier.weight'",
    ),
    "unknown-tensor": (set_in("network", "head", torch.zeros(1)), "it has 'network.head'"),
    "shape": (set_in("network", "classifier.weight", torch.zeros(3, 2)), "got float32 [3, 2]"),
    "dtype": (lambda s: set_in("network", "classifier.weight", weights(s).double())(s), "got float64"),
    "huge": (
        lambda s: set_in("network", "classifier.weight", torch.zeros(1).expand(10**9, 10**9))(s),
        "got float32 [1000000000, 1000000000]",
    ),
    "text-weight": (set_in("network", "classifier.weight", "1"), "got '1'"),
    "nan": (lambda state: weights(state)[0].fill_(float("nan")), "classifier.weight: expected finite values"),
    "inf": (
        lambda state: weights(state)[0, 0].fill_(float("inf")),
        "classifier.weight: expected finite values",
    ),
    "nan-meter": (lambda state: state["meter"].fill_(float("nan")), "meter: expected finite values"),
    "epoch-text": (set_in("epoch", "1"), "epoch: expected a whole number, got '1'"),
    "epoch-true": (set_in("epoch", True), "epoch: expected a whole number, got True"),
    "epoch-negative": (set_in("epoch", -1), "epoch: expected 0 to 2, got -1"),
    "epoch-late": (set_in("epoch", 3), "epoch: expected 0 to 2, got 3"),
    "step-late": (set_in("step", 99), "step: expected 0 to"),
    "seconds-nan": (set_in("seconds", float("nan")), "seconds: expected a finite number, got nan"),
    "rng-part": (lambda state: state["rng"].pop("torch"), "it has no 'rng.torch'"),
    "rng-short": (set_in("rng", "torch", torch.zeros(3, dtype=torch.uint8)), "rng.torch: expected uint8 ["),
    "rng-python": (set_in("rng", "python", (3, [1, 2], None)), "rng.python[1]: expected 625 values"),
    "rng-name": (set_in("rng", "numpy", ("XT", 1, 2, 3, 4)), "rng.numpy[0]: expected 'MT19937', got 'XT'"),
    "rng-values": (lambda state: state["rng"]["torch"].fill_(255), "RuntimeError"),
    "no-groups": (lambda state: optimizer(state)["param_groups"].clear(), "expected 1 groups of parameters"),
    "groups-none": (
        lambda state: optimizer(state).update(param_groups=None),
        "groups of parameters, got None",
    ),
    "group-params": (
        lambda state: optimizer(state)["param_groups"][0]["params"].pop(),
        "param_groups[0]: expected",
    ),
    "group-rate": (
        lambda state: optimizer(state)["param_groups"][0].update(lr=float("nan")),
        "param_groups[0].lr: expected a learning rate, got nan",
    ),
    "group-momentum": (
        lambda state: optimizer(state)["param_groups"][0].update(momentum=0.5),
        "param_groups[0].momentum: expected 0.9, got 0.5",
    ),
    "kept-index": (
        lambda state: optimizer(state)["state"].update({9999: {}}),
        "state[9999]: expected one of",
    ),
    "kept-names": (
        lambda state: optimizer(state)["state"].update({0: {"step": 1}}),
        "expected momentum_buffer",
    ),
    "kept-shape": (other_step, "momentum_buffer: expected float32 ["),
    "optimizer-list": (lambda state: optimizer(state).pop("state"), "expected the state of SGD"),
    "config": (set_in("config", "seed", 7), "seed is 7 in the checkpoint and 2 in config.json"),
    "config-none": (set_in("config", None), "config: expected named options"),
    "history-none": (set_in("history", None), "history: expected named parts"),
}


@pytest.mark.parametrize(("change", "part"), MISFITS.values(), ids=MISFITS.keys())
def test_a_state_of_something_else(runs, tmp_path, change, part):
    folder = runs.copy(tmp_path / "run")
    state = load_checkpoint(folder / LAST)
    version = state.pop("version")
    change(state)
    save_checkpoint(folder / LAST, {"version": version, **state} if state else {"version": 1})
    refused(runs, folder, CheckpointError, part, LAST)


def line(number, change):
    def changed(lines):
        lines[number] = change(lines[number])
        return lines

    return changed


def relabelled(text):
    return json.dumps({**json.loads(text), "epoch": 5})


# lines of a history of one epoch and of the one begun -> other lines, and a part of the message
RECORDS = {
    "no-lines": (lambda lines: [], "is damaged: it has 0 records, but checkpoint.pt is from after 1 epochs"),
    "cut": (line(0, lambda text: text[: len(text) // 2]), "line 1 is not JSON"),
    "not-json": (line(0, lambda text: "{"), "line 1 is not JSON"),
    "deep": (line(0, lambda text: "[" * 100_000), "line 1 is not JSON"),
    "binary": (line(0, lambda text: "\udcff"), "line 1 is not JSON"),
    "list": (line(0, lambda text: "[]"), "line 1: expected an object, got list"),
    "number": (line(0, lambda text: "3"), "line 1: expected an object, got int"),
    "no-epoch": (line(0, lambda text: "{}"), "line 1: expected the record of epoch 0, got epoch None"),
    "epoch": (line(0, relabelled), "line 1: expected the record of epoch 0, got epoch 5"),
    "twice": (lambda lines: lines * 2, "line 2: expected the record of epoch 1, got epoch 0"),
    "blank": (lambda lines: ["", *lines], "line 1 is not JSON"),
    "edited": (
        line(0, lambda text: text.replace("{", '{"note": "good", ', 1)),
        "was changed: its first 1 rec",
    ),
}


@pytest.mark.parametrize(
    ("command", "name"), [("search", "metrics.jsonl"), ("search", "alphas.jsonl"), ("train", "metrics.jsonl")]
)
@pytest.mark.parametrize(("change", "part"), RECORDS.values(), ids=RECORDS.keys())
def test_records_that_are_not_the_run_s(all_runs, tmp_path, command, name, change, part):
    folder = all_runs[command].copy(tmp_path / "run")
    lines = change((folder / name).read_text().splitlines())
    text = "".join(f"{text}\n" for text in lines)
    (folder / name).write_bytes(text.encode(errors="surrogateescape"))
    refused(all_runs[command], folder, RunFolderError, part, name)


def test_what_a_kill_left_of_a_record(runs, tmp_path):
    """Half a line, or a record behind the checkpoint, is dropped and written anew."""
    folder = runs.copy(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 1, "train": 3}\n{"epoch": 2')
    runs.go_on(folder)
    assert_same_run(folder, runs.whole)


JSON = {
    "empty": (b"", "is damaged"),
    "cut": (b'{"command": "sea', "is damaged"),
    "binary": (b"\xff\xfe\0", "is damaged"),
    "deep": (b"[" * 100_000, "is damaged"),
    "huge-number": (b'{"epochs": ' + b"9" * 5000 + b"}", "is damaged"),
}


@pytest.mark.parametrize("name", ["config.json", "environment.json", "data.json"])
@pytest.mark.parametrize(("content", "part"), JSON.values(), ids=JSON.keys())
def test_json_that_is_damaged(all_runs, tmp_path, name, content, part):
    folder = all_runs["train"].copy(tmp_path / "run")
    (folder / name).write_bytes(content)
    refused(all_runs["train"], folder, RunFolderError, part, name)


OTHER_JSON = {
    "config-list": ("config.json", [], "another command's"),
    "config-number": ("config.json", 3, "another command's"),
    "config-other": ("config.json", {"command": "deploy"}, "command is 'deploy' there"),
    "config-value": (
        "config.json",
        {"command": "train", "epochs": "many"},
        "epochs: expected int, got 'many'",
    ),
    "starts-number": ("environment.json", 3, "expected a list of starts"),
    "starts-numbers": ("environment.json", [1], "expected a list of starts"),
    "data-list": ("data.json", [], "expected the facts of each part"),
    "data-number": ("data.json", {"train": 3}, "expected the facts of each part"),
}


@pytest.mark.parametrize(("name", "value", "part"), OTHER_JSON.values(), ids=OTHER_JSON.keys())
def test_json_of_something_else(all_runs, tmp_path, name, value, part):
    folder = all_runs["train"].copy(tmp_path / "run")
    (folder / name).write_text(json.dumps(value))
    refused(all_runs["train"], folder, RunFolderError, part)


def test_an_edited_config(runs, tmp_path):
    """Even if the command line agrees with it."""
    folder = runs.older(tmp_path / "run", lambda values: values.update(momentum=0.5))
    with pytest.raises(CheckpointError, match=r"momentum is 0\.9 in the checkpoint and 0\.5 in config\.json"):
        runs.go_on(folder, momentum=0.5)


@pytest.mark.parametrize("name", ["config.json", LAST, "metrics.jsonl", "environment.json"])
def test_folders_in_the_place_of_files(all_runs, tmp_path, name):
    runs = all_runs["train"]
    folder = runs.copy(tmp_path / "run")
    (folder / name).unlink()
    (folder / name).mkdir()
    (folder / PREVIOUS).unlink()
    with pytest.raises((RunFolderError, CheckpointError), match="it is a folder"):
        runs.go_on(folder)


EVALUATED = ["empty", "text", "first-half", "flip-middle", "none", "payload"]


@pytest.mark.parametrize("case", EVALUATED)
@pytest.mark.parametrize("checkpoint", ["best", "last"])
def test_evaluation_of_a_damaged_checkpoint(all_runs, tmp_path, case, checkpoint):
    folder = all_runs["train"].copy(tmp_path / "run")
    change, part = DAMAGE[case]
    file = folder / ("best.pt" if checkpoint == "best" else LAST)
    file.write_bytes(change(file.read_bytes()))
    # nothing stands in for the best
    (folder / PREVIOUS).unlink()
    with pytest.raises(CheckpointError, match=part) as raised:
        evaluate_run(folder, checkpoint)
    assert str(file) in str(raised.value)
    assert "weights_only" not in str(raised.value)


def test_evaluation_of_the_checkpoint_before_the_last(all_runs, tmp_path, capsys):
    """As a run goes on from it."""
    folder = all_runs["train"].copy(tmp_path / "run")
    (folder / LAST).replace(tmp_path / "last.pt")
    shutil.copy(folder / PREVIOUS, folder / LAST)
    expected = evaluate_run(folder, "last")
    assert capsys.readouterr().err == ""
    for said in ("is missing", "is damaged or no checkpoint: it is empty"):
        (folder / LAST).unlink() if said == "is missing" else (folder / LAST).touch()
        assert evaluate_run(folder, "last") == expected
        [line] = capsys.readouterr().err.splitlines()
        assert f"{folder / LAST} {said}; evaluating {PREVIOUS}, epoch 0, step 0" in line


@pytest.mark.parametrize("case", ["empty", "no-network", "no-classifier", "shape", "nan", "newer", "config"])
def test_evaluation_of_something_else(all_runs, tmp_path, case):
    folder = all_runs["train"].copy(tmp_path / "run")
    state = load_checkpoint(folder / "best.pt")
    change, part = MISFITS[case]
    change(state)
    save_checkpoint(folder / "best.pt", state or {"version": 1})
    with pytest.raises(CheckpointError) as raised:
        evaluate_run(folder)
    assert part.replace("it has no 'network'", "network: expected named parts") in str(raised.value)


def test_a_state_that_is_not_finite_is_not_saved(runs, tmp_path):
    """The good checkpoints stay."""
    folder = runs.copy(tmp_path / "run")
    run_class, before = COMMANDS[runs.command][3], (folder / LAST).read_bytes()

    def poisoned(run, *batch):
        next(run.network.buffers()).fill_(float("inf"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_class, "train_step", poisoned)
        with pytest.raises(
            RuntimeError, match=r"became NaN or infinite in epoch 1; the last good state is .*"
        ):
            runs.go_on(folder, checkpoint_minutes=1e-9)
    assert (folder / LAST).read_bytes() == before


def test_restart_sets_the_run_aside(runs, tmp_path, capsys):
    """Even one that cannot be read; the options may be others then."""
    folder = runs.copy(tmp_path / "run")
    (folder / LAST).write_bytes(b"")
    (folder / "notes.txt").write_text("mine")
    before = {n: c for n, c in contents(folder).items() if n not in (".lock", "notes.txt")}
    runs.go_on(folder, restart=True, epochs=1)
    assert contents(folder / "before-restart-1") == before
    assert (folder / "notes.txt").read_text() == "mine"
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1
    assert "before-restart-1" in capsys.readouterr().out
    runs.go_on(folder, restart=True)
    assert (folder / "before-restart-2" / "checkpoint.pt").exists()
    (folder / "notes.txt").unlink()
    for n in (1, 2):
        shutil.rmtree(folder / f"before-restart-{n}")
    assert_same_run(folder, runs.whole)


def test_restart_in_a_foreign_folder(all_runs, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(RunFolderError, match="with other files"):
        all_runs["train"].go_on(tmp_path, restart=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
