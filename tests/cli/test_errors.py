"""Every error of a user: one clear line on stderr, exit code 2, and nothing written to the run's folder."""

import json

import numpy as np
import pytest

CELL = "|skip_connect~0|+|none~0|nor_conv_1x1~1|+|nor_conv_1x1~0|nor_conv_3x3~1|none~2|"


@pytest.fixture
def search_args(tiny_npz):
    options = {
        "dataset": "npz", "data-root": tiny_npz, "space": "s2", "method": "rf-darts", "channels": 4,
        "layers": 3, "epochs": 2, "batch-size": 4, "device": "cpu",
    }  # fmt: skip
    return [word for name, value in options.items() for word in (f"--{name}", value)]


@pytest.fixture
def train_args(tiny_npz):
    options = {
        "dataset": "npz", "data-root": tiny_npz, "channels": 4, "layers": 3, "epochs": 2, "batch-size": 4,
        "device": "cpu", "cutout": 0,
    }  # fmt: skip
    return ["--no-auxiliary", *(word for name, value in options.items() for word in (f"--{name}", value))]


SEARCH = {
    "epochs": "--epochs 0 | epochs: expected a positive number, got 0",
    "epochs-negative": "--epochs -3 | epochs: expected a positive number",
    "channels": "--channels 0 | channels: expected a positive number",
    "layers": "--layers 0 | layers: expected a positive number",
    "cells-per-stage": "--cells-per-stage 0 | cells-per-stage: expected a positive number",
    "batch-size": "--batch-size 0 | batch-size: expected a positive number",
    "learning-rate": "--learning-rate 0 | learning-rate: expected a positive number",
    "learning-rate-nan": "--learning-rate nan | learning-rate: expected a positive number",
    "learning-rate-inf": "--learning-rate inf | learning-rate: expected a positive number",
    "learning-rate-min": "--learning-rate-min -1 | learning-rate-min: expected 0 or more",
    "warm-up": "--learning-rate-warmup-epochs -1 | learning-rate-warmup-epochs: expected 0 or more",
    "arch-learning-rate": "--arch-learning-rate 0 | arch-learning-rate: expected a positive number",
    "momentum": "--momentum -0.1 | momentum: expected 0 or more",
    "nesterov": "--nesterov --momentum 0 | nesterov: expected a momentum above 0",
    "weight-decay": "--weight-decay -1 | weight-decay: expected 0 or more",
    "arch-weight-decay": "--arch-weight-decay -1 | arch-weight-decay: expected 0 or more",
    "grad-clip": "--grad-clip -1 | grad-clip: expected 0 or more",
    "arch-grad-clip": "--arch-grad-clip -1 | arch-grad-clip: expected 0 or more",
    "arch-warmup-negative": "--arch-warmup-epochs -1 | arch-warmup-epochs: expected 0 or more",
    "arch-warmup-all": "--arch-warmup-epochs 2 | arch-warmup-epochs: expected fewer than the 2 epochs",
    "levels": "--levels 3 | levels: expected 1 or 2, got 3",
    "levels-second-order": "--levels 1 --order second | order: expected first with --levels 1",
    "genotype-rule": "--genotype-rule without-none | genotype-rule: expected published in the space s2",
    "table-space": "--table x.csv | table: expected none in the space s2, whose cells no table has",
    "table-absent": "--space nasbench201 --table x.csv | table: expected a CSV file or NATS-Bench's files",
    "diagnose-every": "--diagnose-every -1 | diagnose-every: expected 0 or more",
    "diagnose-images": "--diagnose-images 0 | diagnose-images: expected a positive number",
    "diagnose-cells": "--diagnose-cells 0 | diagnose-cells: expected a positive number",
    "cutout": "--cutout -1 | cutout: expected 0 or more",
    "validate-every": "--validate-every -1 | validate-every: expected 0 or more",
    "partial-channels-0": "--partial-channels 0 | partial-channels: expected a positive number",
    "partial-channels-of-darts": "--partial-channels 2 | partial-channels: expected 1 with rf-darts",
    "partial-channels-3": "--method rf-pcdarts --partial-channels 3 | partial-channels: expected a divisor",
    "edge-norm": "--edge-norm | edge-norm: expected no edge weights with rf-darts",
    "affine": "--no-affine | affine: expected affine BatchNorm with rf-darts",
    "nasbench201-pc": "--space nasbench201 --method pc-darts | method: expected darts or rf-darts",
    "nasbench201-stem": "--space nasbench201 --stem imagenet | stem: expected cifar",
    "train-portion": "--train-portion 1 | train-portion: expected a share between 0 and 1",
    "train-portion-tiny": "--train-portion 0.01 | train-portion: 0.01 of 24 images leaves one part empty",
    "train-fraction": "--train-fraction 0 | train-fraction: expected a share between 0 and 1",
    "val-fraction": "--train-fraction 0.9 --val-fraction 0.2 | val-fraction: expected a share of what",
    "per-class-too-few": "--split per-class --train-fraction 0.01 | train-fraction: 0.01 of class 0",
    "split-file-missing": "--split nasbench201 | split_file: expected a file with --split nasbench201",
    "split-file-alone": "--split-file x.txt | split-file: expected a file with --split nasbench201, and only",
    "split-file-absent": "--split nasbench201 --split-file absent.txt | absent.txt",
    "imagenet-odd-channels": "--stem imagenet --channels 5 --image-size 32 | channels: ",
    "image-too-small": "--image-size 2 | image-size: expected a size that fits the network's reductions",
    "backend": "--backend cpu --method darts | backend: cpu cannot run",
    "image-odd": "--image-size 10 | image-size: expected a size that fits the network's reductions",
    "single-pixel": "--image-size 4 --batch-size 11 | batch-size: expected no batch of 1 in an epoch",
}

COMMON = {
    "image-size": "--image-size 0 | image-size: expected a positive number",
    "workers": "--workers -1 | workers: expected 0 or more",
    "seed": "--seed -1 | seed: expected a number from 0",
    "seed-huge": "--seed 4294967296 | seed: expected a number from 0 to 2**32 - 1",
    "threads": "--threads 0 | threads: expected a positive number",
    "checkpoint-minutes": "--checkpoint-minutes 0 | checkpoint-minutes: expected a positive number",
    "grad-accum-steps": "--grad-accum-steps 0 | grad-accum-steps: expected a positive number, got 0",
    "grad-accum-steps-many": "--grad-accum-steps 5 | grad-accum-steps: expected at most 4, the images in a",
    "base-batch-size": "--base-batch-size 0 | base-batch-size: expected a positive number",
    "keep-checkpoints": "--keep-checkpoints -1 | keep-checkpoints: expected 0 or more",
    "time-limit": "--time-limit-minutes 0 | time-limit-minutes: expected a positive number",
    "device-unknown": "--device toaster | device: 'toaster' cannot be used",
    "device-absent": "--device cuda:99 | device: 'cuda:99' cannot be used",
    "device-empty": "--device meta | device: 'meta' cannot be used",
    "no-data-root": "--dataset npz --data-root None | data root: expected an .npz file",
    "no-npz": "--data-root absent.npz | absent.npz: expected an .npz file, got nothing there",
    "no-folder": "--dataset imagefolder --data-root absent | absent",
    "no-config": "--config absent.yaml | config: there is no file absent.yaml",
}

TRAIN = {
    "epochs": "--epochs 0 | epochs: expected a positive number",
    "learning-rate": "--learning-rate -1 | learning-rate: expected a positive number",
    "learning-rate-decay": "--learning-rate-decay 0 | learning-rate-decay: expected a positive number",
    "evaluate-every": "--evaluate-every 0 | evaluate-every: expected a positive number",
    "auxiliary-weight": "--auxiliary-weight -1 | auxiliary-weight: expected 0 or more",
    "cutout": "--cutout -1 | cutout: expected 0 or more",
    "drop-path": "--drop-path 1 | drop-path: expected a probability below 1",
    "drop-path-negative": "--drop-path -0.5 | drop-path: expected a probability below 1",
    "max-multiply-adds": "--max-multiply-adds 0 | max-multiply-adds: expected a positive number",
    "max-multiply-adds-small": "--max-multiply-adds 0.001 | max-multiply-adds: expected a network below",
    "auto-width": "--auto-width | auto-width: expected a limit, --max-multiply-adds, beside it",
    "ema-decay": "--ema-decay 1 | ema-decay: expected a share below 1",
    "compile": "--compile | compile: expected --drop-path 0 beside it",
    "label-smoothing": "--label-smoothing 1 | label-smoothing: expected a share below 1",
    "nesterov": "--nesterov --momentum 0 | nesterov: expected a momentum above 0",
    "genotype": "--genotype DARTS_V9 | genotype: expected one of DARTS_V1",
    "genotype-file": "--genotype absent.json | genotype: absent.json cannot be read: No such file",
    "auxiliary-small": "--auxiliary | auxiliary: expected images of at least 32 pixels",
    "cell-auxiliary": f"--auxiliary --genotype {CELL.replace('|', '!')} | auxiliary: expected none",
    "cell-drop-path": f"--drop-path 0.2 --genotype {CELL.replace('|', '!')} | drop-path: expected none",
    "cell-stem": f"--drop-path 0 --stem imagenet --genotype {CELL.replace('|', '!')} | stem: expected cifar",
    "image-odd": "--layers 4 --image-size 10 | image-size: expected a size that fits",
    "imagenet-odd-channels": "--stem imagenet --channels 5 --image-size 32 | channels: ",
    "single-pixel": "--image-size 2 --batch-size 23 | batch-size: expected no batch of 1 in an epoch",
}


def check_refused(rfdarts, command, args, case, out):
    """Runs `command` with the options of a case, 'OPTIONS | start of the message'."""
    options, message = case.split(" | ")
    code, stdout, stderr = rfdarts(command, *args, "--out", out, *options.replace("!", "|").split())
    assert code == 2, stderr
    assert stderr.startswith(f"rfdarts {command}: ")
    assert message in stderr
    assert stderr.count("\n") == 1
    assert "Traceback" not in stderr
    assert not stdout
    assert not out.exists()


@pytest.mark.parametrize("case", [*SEARCH.values(), *COMMON.values()], ids=[*SEARCH, *COMMON])
def test_search_refuses(rfdarts, search_args, tmp_path, case):
    check_refused(rfdarts, "search", search_args, case, tmp_path / "run")


@pytest.mark.parametrize("case", [*TRAIN.values(), *COMMON.values()], ids=[*TRAIN, *COMMON])
def test_train_refuses(rfdarts, train_args, tmp_path, case):
    check_refused(rfdarts, "train", train_args, case, tmp_path / "run")


USAGE = {
    "unknown-option": ["--latyers", "3"],
    "unknown-choice": ["--method", "snas"],
    "unknown-preset": ["--preset", "slow"],
    "unknown-backend": ["--backend", "native"],
    "text-for-number": ["--epochs", "many"],
    "fraction-for-number": ["--epochs", "1.5"],
    "no-value": ["--epochs"],
}


@pytest.mark.parametrize("options", USAGE.values(), ids=USAGE.keys())
def test_usage_errors(rfdarts, search_args, tmp_path, options):
    code, _, err = rfdarts("search", *search_args, "--out", tmp_path / "run", *options)
    assert code == 2
    assert "Traceback" not in err
    assert options[0] in err
    assert not (tmp_path / "run").exists()


def test_out_is_required(rfdarts, search_args):
    code, _, err = rfdarts("search", *search_args)
    assert code == 2
    assert "--out" in err


YAML = {
    "unknown-name": ("latyers: 3", "config.yaml, line 1: has no such option: 'latyers'"),
    "wrong-type": ("epochs: many", "epochs: expected int, got 'many'"),
    "fraction": ("epochs: 1.5", "epochs: expected int, got 1.5"),
    "truth": ("epochs: true", "epochs: expected int, got True"),
    "choice": ("method: snas", "method: expected darts, pc-darts"),
    "registered-name": ("backend: native", "backend: expected auto, reference"),
    "text-for-truth": ("affine: maybe", "affine: expected bool, got 'maybe'"),
    "not-closed": ("'epochs", "line 1, cannot be read as YAML"),
    "list": ("- epochs", "expected names and values"),
    "text": ("epochs", "expected names and values"),
    "not-yaml": ("epochs: {", "line 1: expected a plain value, got a mapping"),
    "null": ("epochs:", "epochs: expected int, got None"),
}


@pytest.mark.parametrize(("text", "message"), YAML.values(), ids=YAML.keys())
def test_yaml_file_is_refused(rfdarts, search_args, tmp_path, text, message):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    code, _, err = rfdarts("search", *search_args, "--config", file, "--out", tmp_path / "run")
    assert code == 2
    assert err.startswith("rfdarts search: ")
    assert message in err
    assert not (tmp_path / "run").exists()


def test_tensorboard_missing(rfdarts, search_args, tmp_path, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "tensorboard" else find(name, *a)
    )
    case = "--tensorboard | tensorboard: expected tensorboard to be installed"
    check_refused(rfdarts, "search", search_args, case, tmp_path / "run")


def test_without_test_images(rfdarts, train_args, tmp_path):
    file = tmp_path / "no_test.npz"
    np.savez(file, x_train=np.zeros((8, 8, 8, 3), np.uint8), y_train=np.arange(8) % 2)
    case = f"--data-root {file} | expected test images"
    check_refused(rfdarts, "train", train_args, case, tmp_path / "run")


def test_out_is_a_file(rfdarts, search_args, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    for out in (file, file / "below"):
        code, _, err = rfdarts("search", *search_args, "--out", out)
        assert code == 2
        assert err.startswith("rfdarts search: --out: ")
        assert err.count("\n") == 1
    assert file.read_text() == "mine"


def test_foreign_folder(rfdarts, search_args, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    code, _, err = rfdarts("search", *search_args, "--out", tmp_path / "run")
    assert code == 2
    assert "with other files" in err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "without config.json"), ("{", "is damaged"), ("[]", "another command's")],
    ids=["none", "cut-off", "list"],
)
@pytest.mark.parametrize("command", ["eval"])
def test_eval_of_something_else(rfdarts, tmp_path, command, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    code, _, err = rfdarts(command, tmp_path)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_eval_of_a_search(rfdarts, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"command": "search"}))
    code, _, err = rfdarts("eval", tmp_path)
    assert code == 2
    assert "another command's" in err


def test_eval_before_the_first_checkpoint(rfdarts, train_args, tmp_path):
    code, _, _ = rfdarts("train", *train_args, "--epochs", "1", "--out", tmp_path / "run")
    assert code == 0
    (tmp_path / "run" / "best.pt").unlink()
    code, _, err = rfdarts("eval", tmp_path / "run")
    assert code == 2
    assert "expected a checkpoint best.pt" in err
    (tmp_path / "run" / "best.pt").write_bytes(b"PK\3\4 and nothing else")
    code, _, err = rfdarts("eval", tmp_path / "run")
    assert code == 2
    assert "best.pt is damaged or no checkpoint" in err
    assert err.count("\n") == 1


def test_unknown_command(rfdarts):
    code, out, err = rfdarts("serach")
    assert code == 2
    assert err.startswith("rfdarts: there is no command 'serach'")
    assert not out
