"""Help, precedence of presets, files and options, and the small commands."""

import dataclasses
import json
import re
from types import SimpleNamespace

import pytest

from rfdarts_fast import cli
from rfdarts_fast.cli import EvalOptions, parse_config
from rfdarts_fast.ops import backend_names, backends, contract
from rfdarts_fast.retrain import PRESETS as TRAIN_PRESETS
from rfdarts_fast.retrain import TrainConfig
from rfdarts_fast.retrain.config import preset_values as train_preset
from rfdarts_fast.runs.config import ConfigError
from rfdarts_fast.search import PRESETS, SearchConfig
from rfdarts_fast.search.config import preset_values


@pytest.fixture
def output(rfdarts):
    """stdout of a command that succeeds."""

    def run(*args):
        code, out, _ = rfdarts(*args)
        assert not code
        return out

    return run


@pytest.mark.parametrize("args", [[], ["-h"], ["--help"]], ids=["nothing", "-h", "--help"])
def test_help_names_every_command(output, args):
    text = output(*args)
    for command in cli.COMMANDS:
        assert re.search(rf"^  {command} ", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("command", "options"), [("search", SearchConfig), ("train", TrainConfig), ("eval", EvalOptions)]
)
def test_help_of_a_command_names_every_option(output, monkeypatch, command, options):
    monkeypatch.setenv("COLUMNS", "200")
    text = output(command, "--help")
    for field in dataclasses.fields(options):
        if field.name != "run":
            assert f"--{field.name.replace('_', '-')}" in text
    assert f"usage: rfdarts {command}" in text


def test_help_shows_the_values_that_would_be_used(output, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    epochs = [
        re.search(r"--epochs INT.*?default: (\d+)", output("search", *args, "--help"), re.DOTALL).group(1)
        for args in ([], ["--preset", "quick"])
    ]
    assert epochs == ["50", str(PRESETS["quick"]["epochs"])]


def search_config(*args):
    return parse_config(SearchConfig, preset_values, [*args, "--out", "x"], "rfdarts search")


def train_config(*args):
    return parse_config(TrainConfig, train_preset, [*args, "--out", "x"], "rfdarts train")


@pytest.mark.parametrize(
    ("parse", "presets", "preset"),
    [
        *((search_config, PRESETS, preset) for preset in PRESETS),
        *((train_config, TRAIN_PRESETS, preset) for preset in TRAIN_PRESETS),
    ],
)
def test_every_preset_is_a_config_that_can_be_used(parse, presets, preset):
    config = parse("--preset", preset)
    config.check()
    assert config.preset == preset
    for name, value in presets[preset].items():
        assert getattr(config, name) == value


PRESET_OF = {
    "rf-pcdarts": (["--method", "rf-pcdarts"], {"partial_channels": 4, "edge_norm": True, "affine": True}),
    "pc-darts": (["--method=pc-darts"], {"partial_channels": 4, "affine": False, "batch_size": 256}),
    "darts": (["--method", "darts"], {"partial_channels": 1, "affine": False, "arch_warmup_epochs": 0}),
    "rf-darts": (["--method", "rf-darts"], {"partial_channels": 1, "affine": True, "edge_norm": False}),
    "nasbench201": (
        ["--method", "rf-darts", "--space", "nasbench201"],
        {"step_order": "weights-first", "nesterov": True, "track_running_stats": False, "affine": True},
    ),
}


@pytest.mark.parametrize(("args", "values"), PRESET_OF.values(), ids=PRESET_OF.keys())
def test_method_and_space_choose_the_preset(args, values):
    config = search_config(*args)
    assert {name: getattr(config, name) for name in values} == values


def test_precedence(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("preset: quick\nepochs: 17\narch-learning-rate: 3e-4\nseed: 5\n")
    config = search_config("--config", str(file), "--seed", "6")
    quick = PRESETS["quick"]
    values = (config.layers, config.epochs, config.arch_learning_rate, config.seed, config.preset)
    assert values == (quick["layers"], 17, 0.0003, 6, "quick")
    # a preset on the command line takes the place of the file's, and the file still wins over it
    other = search_config("--config", str(file), "--preset", "pc-darts")
    assert (other.preset, other.batch_size, other.epochs) == ("pc-darts", 256, 17)


@pytest.mark.parametrize("text", ["3e-4", "3.0e-4", "0.0003", "'3e-4'", "3E-4"])
def test_yaml_numbers(tmp_path, text):
    file = tmp_path / "config.yaml"
    file.write_text(f"weight_decay: {text}\nlearning_rate: 1")
    config = train_config("--config", str(file))
    assert (config.weight_decay, config.learning_rate) == (0.0003, 1.0)
    assert isinstance(config.learning_rate, float)


def test_yaml_values_of_every_type(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(
        "out: runs/a\ndata_root: data\nauxiliary: false\nimage_size: null\nschedule: step\nthreads: 2"
    )
    config = parse_config(TrainConfig, train_preset, ["--config", str(file)], "rfdarts train")
    assert (str(config.out), str(config.data_root)) == ("runs/a", "data")
    assert (config.auxiliary, config.image_size, config.schedule, config.threads) == (False, None, "step", 2)


def test_empty_yaml(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("")
    assert search_config("--config", str(file)).epochs == SearchConfig.epochs


def test_environment(output):
    text = output("env")
    for name in (
        "rfdarts_fast",
        "python",
        "torch",
        "cpu",
        "torchvision",
        "tensorboard",
        "nats_bench",
        "matplotlib",
        "submitit",
        "triton",
        *(f"{backend} kernels" for backend in backends()),
    ):
        assert re.search(rf"^{name} +\S", text, re.MULTILINE)


def test_a_backend_that_outside_code_registered(output, monkeypatch):
    backend = SimpleNamespace(name="mine", status=lambda: {"built": False, "reason": "no time", "fast": True})
    monkeypatch.setattr(contract, "_backends", {**backends(), "mine": backend})
    monkeypatch.setenv("COLUMNS", "200")
    config = search_config("--backend", "mine")
    config.check()
    assert config.backend == "mine"
    assert f"--backend {{{','.join(backend_names())}}}" in output("search", "--help")
    assert re.search(r"^mine kernels +not built, reason: no time, fast$", output("env"), re.MULTILINE)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"backend: expected one of auto, reference, .*, got 'mine'"):
        config.check()


def test_search_train_eval(output, tiny_npz, tmp_path):
    """The three commands in a row; eval repeats what training measured."""
    data = ["--dataset", "npz", "--data-root", tiny_npz, "--device", "cpu", "--epochs", 2, "--batch-size", 4]
    small = ["--channels", 4, "--layers", 3]
    text = output("search", "--method", "rf-darts", "--space", "s2", *data, *small, "--out", tmp_path / "a")
    genotype = tmp_path / "a" / "genotype.json"
    assert str(genotype) in text
    assert json.loads(genotype.read_text())["text"] in text
    options = ["--genotype", genotype, "--no-auxiliary", "--cutout", 0, *data, *small]
    text = output("train", *options, "--out", tmp_path / "b")
    result = json.loads((tmp_path / "b" / "result.json").read_text())
    assert f"test accuracy {result['test_accuracy']:.2f}%" in text
    derived = json.loads(genotype.read_text())
    assert derived.pop("rule") == "published"
    assert json.loads((tmp_path / "b" / "genotype.json").read_text()) == derived
    last = json.loads(output("eval", tmp_path / "b", "--checkpoint", "last"))
    assert last["accuracy"] == result["test_accuracy"]
    assert last["loss"] == pytest.approx(result["test_loss"], rel=1e-6)
    best = json.loads(output("eval", tmp_path / "b"))
    assert best["accuracy"] == result["best_accuracy"]
    moved = tiny_npz.with_name("moved.npz")
    moved.write_bytes(tiny_npz.read_bytes())
    assert json.loads(output("eval", tmp_path / "b", "--data-root", moved)) == best


def test_a_pc_preset_fits_a_method_without_partial_channels():
    values = preset_values({"preset": "quick", "method": "rf-darts"})
    SearchConfig(**{"out": "unused", **values, "method": "rf-darts"}).check()
    assert preset_values({"preset": "quick"})["partial_channels"] == 4
