"""Folders that another version wrote: they resume bit by bit, or one error names what does not fit."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from same_run import assert_same_run

from rfdarts_fast.ops import backends
from rfdarts_fast.retrain import TrainConfig, evaluate_run, train
from rfdarts_fast.retrain.run import TrainRun
from rfdarts_fast.runs.checkpoint import CheckpointError
from rfdarts_fast.runs.run_folder import RunFolderError, read_config
from rfdarts_fast.search import SearchConfig, search
from rfdarts_fast.search.run import SearchRun

WAY_OUT = "go on with the version of rfdarts_fast that wrote it (its environment.json names it), or start"
COMMON = {"device": "cpu", "dataset": "npz", "channels": 4, "layers": 1, "batch_size": 4, "epochs": 2}
SEARCH = {
    **COMMON,
    "space": "s2",
    "method": "rf-pcdarts",
    "partial_channels": 2,
    "edge_norm": True,
    "learning_rate": 0.1,
    "learning_rate_min": 0.0,
    "arch_learning_rate": 6e-4,
    "backend": "cpu" if backends()["cpu"].status()["built"] else "reference",
}
TRAIN = {**COMMON, "auxiliary": False, "cutout": 0}
COMMANDS = {
    "search": (SearchConfig, SEARCH, search, SearchRun),
    "train": (TrainConfig, TRAIN, train, TrainRun),
}


class Interrupt(Exception):
    pass


class Runs:
    """A command's run that was left alone, and one that was interrupted in its second epoch."""

    def __init__(self, command, npz, folder):
        self.command = command
        self.config_class, options, self.start, run_class = COMMANDS[command]
        self.options = {**options, "data_root": npz}
        self.whole, self.interrupted = folder / "whole", folder / "interrupted"
        self.go_on(self.whole)
        with pytest.MonkeyPatch.context() as patch:
            step = run_class.train_step

            def interrupted_step(run, *batch):
                if (run.epoch, run.step) == (1, 1):
                    raise Interrupt
                step(run, *batch)

            patch.setattr(run_class, "train_step", interrupted_step)
            with pytest.raises(Interrupt):
                self.go_on(self.interrupted)

    def go_on(self, folder, **changes):
        return self.start(self.config_class(**{**self.options, "out": folder, **changes}))

    def older(self, folder, change):
        """A copy of the interrupted run's folder whose config.json is changed."""
        shutil.copytree(self.interrupted, folder)
        values = json.loads((folder / "config.json").read_text())
        change(values)
        (folder / "config.json").write_text(json.dumps(values))
        return folder


@pytest.fixture(scope="module")
def all_runs(tiny_npz, tmp_path_factory):
    return {command: Runs(command, tiny_npz, tmp_path_factory.mktemp(command)) for command in COMMANDS}


@pytest.fixture(params=COMMANDS)
def runs(request, all_runs):
    return all_runs[request.param]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def message(start, part, end=WAY_OUT):
    return f"{re.escape(start)}.*{re.escape(part)}.*{re.escape(end)}"


def test_options_that_a_folder_lacks_have_their_defaults(runs, tmp_path):
    def forget_defaults(values):
        for field in dataclasses.fields(runs.config_class):
            if field.name == "out" or values[field.name] == field.default:
                del values[field.name]

    folder = runs.older(tmp_path / "run", forget_defaults)
    config = (folder / "config.json").read_text()
    assert len(json.loads(config)) < len(dataclasses.fields(runs.config_class)) / 2
    runs.go_on(folder)
    assert_same_run(folder, runs.whole)
    assert (folder / "config.json").read_text() == config


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_of_0_1_0(all_runs, tmp_path, command):
    if command == "search" and not backends()["cpu"].status()["built"]:
        pytest.skip("needs the compiled CPU kernels")
    config = Path(__file__).parent / "folders" / f"{command}-0.1.0.json"
    folder = all_runs[command].older(tmp_path / "run", lambda values: None)
    shutil.copy(config, folder / "config.json")
    all_runs[command].go_on(folder)
    assert_same_run(folder, all_runs[command].whole)


@pytest.mark.parametrize(
    ("device", "backend"), [("cpu", "cpu"), ("cuda:1", "cuda"), ("auto", "cuda"), (None, "cuda")]
)
def test_native_was_the_backend_of_the_device(tmp_path, monkeypatch, device, backend):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    values = {"command": "search", "backend": "native", **({"device": device} if device else {})}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_config(tmp_path, "search", SearchConfig).backend == backend


REFUSED = {
    "option": (lambda v: v.update(latyers=3, swish=True), "latyers (3 there), swish (True there)", WAY_OUT),
    "value": (lambda v: v.update(memory_format="blocked"), "memory_format: expected channels_last", WAY_OUT),
    "not-the-default": (lambda v: v.pop("momentum"), "another run: momentum is 0.9 there and 0.5 here", ""),
}


@pytest.mark.parametrize(("change", "part", "end"), REFUSED.values(), ids=REFUSED.keys())
def test_a_folder_that_does_not_fit_stays_as_it_is(runs, tmp_path, change, part, end):
    folder = runs.older(tmp_path / "run", change)
    before = contents(folder)
    with pytest.raises(RunFolderError, match=message(f": {folder} ", part, end)):
        runs.go_on(folder, momentum=0.5)
    assert contents(folder) == before


PARTS = {
    "search": ("epoch", "meter", "rng", "val_meter", "arch_optimizer"),
    "train": ("epoch", "meter", "rng", "best", "optimizer"),
}


@pytest.mark.parametrize(
    ("command", "part"), [(command, part) for command, parts in PARTS.items() for part in parts]
)
def test_a_part_that_a_checkpoint_lacks(all_runs, tmp_path, command, part):
    folder = all_runs[command].older(tmp_path / "run", lambda values: None)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    del state[part]
    torch.save(state, folder / "checkpoint.pt")
    error = message(f"checkpoint: {folder}/checkpoint.pt ", f"has no '{part}'")
    with pytest.raises(CheckpointError, match=error):
        all_runs[command].go_on(folder)


def test_a_network_of_other_parameters(runs, tmp_path):
    folder = runs.older(tmp_path / "run", lambda values: None)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    state["network"]["head.weight"] = state["network"].pop("classifier.weight")
    torch.save(state, folder / "checkpoint.pt")
    error = message(f"checkpoint: {folder}/checkpoint.pt ", "head.weight")
    with pytest.raises(CheckpointError, match=error) as raised:
        runs.go_on(folder)
    assert "\n" not in str(raised.value)


def test_evaluation_of_older_folders(all_runs, tmp_path):
    trained = all_runs["train"]
    expected = evaluate_run(trained.interrupted, "last")
    for name in ("momentum", "auxiliary_weight", "memory_format", "out"):
        folder = trained.older(tmp_path / name, lambda values, name=name: values.pop(name))
        assert evaluate_run(folder, "last") == expected
    renamed = trained.older(tmp_path / "0.1.0", lambda values: values.update(recipe=values.pop("preset")))
    assert evaluate_run(renamed, "last") == expected


@pytest.mark.parametrize(
    ("change", "error", "start", "part"),
    [
        ({"swish": True}, RunFolderError, "run: {}", "swish (True there)"),
        ({"schedule": "poly"}, RunFolderError, "run: {}", "schedule: expected cosine"),
        ({"channels": 8}, CheckpointError, "checkpoint: {}/best.pt", "size mismatch"),
    ],
    ids=["option", "value", "network"],
)
def test_evaluation_names_what_does_not_fit(all_runs, tmp_path, change, error, start, part):
    folder = all_runs["train"].older(tmp_path / "run", lambda values: values.update(change))
    with pytest.raises(error, match=message(start.format(folder), part)):
        evaluate_run(folder)
