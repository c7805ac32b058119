"""Folders that another version wrote: they resume bit by bit, or one error names what does not fit."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from interrupted_runs import COMMANDS
from same_run import assert_same_run, contents

from rfdarts_fast.ops import backends
from rfdarts_fast.retrain import evaluate_run
from rfdarts_fast.runs.checkpoint import CheckpointError, save_checkpoint
from rfdarts_fast.runs.run_folder import RunFolderError, read_config
from rfdarts_fast.runs.schema import LATER_PARTS
from rfdarts_fast.search import SearchConfig

WAY_OUT = "go on with the version of rfdarts_fast that wrote it (its environment.json names it), or start"


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
    # its checkpoints had no version and no checksum, and none was kept of the one before
    for file in folder.glob("*.pt"):
        state = torch.load(file, weights_only=True)
        torch.save({name: part for name, part in state.items() if name not in LATER_PARTS}, file)
    (folder / "checkpoint.previous.pt").unlink()
    (folder / "data.json").unlink()
    all_runs[command].go_on(folder)
    # the checkpoint that was gone on from is the previous one now
    assert_same_run(folder, all_runs[command].whole, ignored=LATER_PARTS)


@pytest.mark.parametrize(
    ("device", "backend"), [("cpu", "cpu"), ("cuda:1", "cuda"), ("auto", "cuda"), (None, "cuda")]
)
def test_native_was_the_backend_of_the_device(tmp_path, monkeypatch, device, backend):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    values = {"command": "search", "backend": "native", **({"device": device} if device else {})}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_config(tmp_path, "search", SearchConfig).backend == backend


def test_a_base_batch_size_counts_only_where_rates_are_scaled(runs, tmp_path):
    """Folders of earlier versions have none: their presets' were other ones than the field's default."""
    folder = runs.older(tmp_path / "run", lambda values: values.pop("base_batch_size"))
    runs.go_on(folder, base_batch_size=1024)
    assert_same_run(folder, runs.whole)
    with pytest.raises(RunFolderError, match=f"{folder} belongs to another run: base_batch_size is "):
        runs.go_on(folder, base_batch_size=1024, learning_rate_scaling="linear")


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
    save_checkpoint(folder / "checkpoint.pt", state)
    error = message(f"checkpoint: {folder}/checkpoint.pt ", f"has no '{part}'")
    with pytest.raises(CheckpointError, match=error):
        all_runs[command].go_on(folder)


def test_a_network_of_other_parameters(runs, tmp_path):
    folder = runs.older(tmp_path / "run", lambda values: None)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    state["network"]["head.weight"] = state["network"].pop("classifier.weight")
    save_checkpoint(folder / "checkpoint.pt", state)
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
        ({"channels": 8}, CheckpointError, "checkpoint: {}/best.pt", "channels is 4 in the checkpoint and 8"),
    ],
    ids=["option", "value", "network"],
)
def test_evaluation_names_what_does_not_fit(all_runs, tmp_path, change, error, start, part):
    folder = all_runs["train"].older(tmp_path / "run", lambda values: values.update(change))
    with pytest.raises(error, match=message(start.format(folder), part)):
        evaluate_run(folder)


def test_evaluation_of_another_network(all_runs, tmp_path):
    """A checkpoint of 0.1.0 does not tell its options, but its tensors do."""
    folder = all_runs["train"].older(tmp_path / "run", lambda values: values.update(channels=8))
    state = torch.load(folder / "best.pt", weights_only=True)
    torch.save({"network": state["network"]}, folder / "best.pt")
    shapes = "network.stem.0.weight: expected float32 [24, 3, 3, 3], got float32 [12, 3, 3, 3]"
    with pytest.raises(CheckpointError, match=message(f"checkpoint: {folder}/best.pt", shapes)):
        evaluate_run(folder)
