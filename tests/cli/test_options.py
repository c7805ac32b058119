"""Options as they are typed: every value is checked when it is parsed, and named as it was typed."""

import os

import pytest

from rfdarts_fast.retrain.config import TrainConfig
from rfdarts_fast.retrain.config import preset_values as train_preset
from rfdarts_fast.runs.config import ConfigError
from rfdarts_fast.runs.options import parse_config, read_yaml
from rfdarts_fast.search.config import SearchConfig, preset_values


def search_config(*args):
    return parse_config(SearchConfig, preset_values, ["--out", "x", *args], "rfdarts search")


def refused(message, *args):
    with pytest.raises(ConfigError) as error:
        search_config(*args)
    assert str(error.value) == message


def test_a_name_is_that_which_was_typed(tmp_path):
    refused("--learning-rate: expected a positive number, got nan", "--learning-rate", "nan")
    refused("--learning_rate: expected a positive number, got nan", "--learning_rate=nan")
    refused("--no-affine: expected affine BatchNorm with rf-pcdarts, got False", "--no-affine")
    file = tmp_path / "a.yaml"
    file.write_text("# mine\nlearning-rate: .nan\n")
    refused(
        f"config: {file}, line 2: learning-rate: expected a positive number, got nan", "--config", str(file)
    )
    # the command line wins, so it is to blame
    options = ("--config", str(file), "--learning-rate", "inf")
    refused("--learning-rate: expected a positive number, got inf", *options)
    assert search_config(*options[:-1], "0.5").learning_rate == 0.5


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--epochs", "", "a value"),
        ("--out", "", "a value"),
        ("--epochs", "9" * 5000, "int"),
        ("--epochs", "1_000", "int"),
        ("--epochs", "0x10", "int"),
        ("--epochs", "１２", "int"),
        ("--threads", "٣", "int"),
        ("--learning-rate", "1_0.5", "float"),
        ("--learning-rate", "½", "float"),
        ("--learning-rate", "1e9999", "a positive number"),
        ("--learning-rate", "1e10", "at most 1,000,000,000"),
        ("--epochs", "1000001", "at most 1,000,000"),
        ("--channels", "65537", "at most 65,536"),
        ("--layers", "1001", "at most 1,000"),
        ("--image-size", "16385", "at most 16,384"),
        ("--cutout", "16385", "at most 16,384"),
        ("--workers", "1025", "at most 1,024"),
        ("--threads", "4097", "at most 4,096"),
        ("--momentum", "1", "less than 1"),
        ("--checkpoint-minutes", "inf", "a positive number"),
    ],
)
def test_values_out_of_range(option, value, expected):
    for args in ((option, value), (f"{option}={value}",)):
        with pytest.raises(ConfigError) as error:
            search_config(*args)
        assert str(error.value).startswith(f"{option}: expected {expected}, got ")
        assert len(str(error.value)) < 200


def yaml_error(tmp_path, text):
    file = tmp_path / "a.yaml"
    (file.write_bytes if isinstance(text, bytes) else file.write_text)(text)
    with pytest.raises(ConfigError) as error:
        search_config("--config", str(file))
    assert "\n" not in str(error.value)
    return str(error.value).removeprefix(f"config: {file}")


BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nepochs: &a 3", ", line 2: expected no anchors and aliases"),
        ("epochs: *a", ", line 1: expected no anchors and aliases"),
        (BOMB, ", line 1: expected no anchors and aliases"),
        ("epochs: !!int 3", ", line 1: expected no tags, got 'tag:yaml.org,2002:int'"),
        ("epochs: !!python/object/apply:os.abort []", ", line 1: expected no tags, got 'tag:"),
        ("!mine\nepochs: 3", ", line 1: expected no tags, got '!mine'"),
        ("seed: 3\n\nepochs: 3\nepochs: 4", ", line 4: expected epochs once, got it twice"),
        ("weight_decay: 3\nweight-decay: 4", ", line 2: expected weight-decay once, got it twice"),
        ("<<: {epochs: 3}", ", line 1: expected a plain value, got a mapping"),
        ("seed: 3\nepochs: " + "[" * 100_000, ", line 2: expected a plain value, got a list"),
        ("seed: 3\nepochs: " + "{a: " * 100_000, ", line 2: expected a plain value, got a mapping"),
        ("? [a, b]\n: 3", ", line 1: expected names and values, got a list"),
        ("seed: 3\n---\nepochs: 3", ", line 2: expected one document, got another"),
        ("epochs: " + "9" * 5000, ", line 1: epochs: expected int, got '9999"),
        ("epochs: 0x" + "f" * 50, ", line 1: epochs: expected int, got '0xff"),
        ("epochs: 010", ", line 1: epochs: expected int, got '010'"),
        ("epochs: 1:30", ", line 1: epochs: expected int, got '1:30'"),
        ("epochs: 1_000", ", line 1: epochs: expected int, got '1_000'"),
        ("epochs: ３", ", line 1: epochs: expected int, got '３'"),
        ("epochs: 2001-01-01", ", line 1: epochs: expected int, got '2001-01-01'"),
        ("epochs: '3'", ", line 1: epochs: expected int, got '3'"),
        ("learning-rate: " + "9" * 400, ", line 1: learning-rate: expected float, got '9999"),
        ("learning-rate: 1e999", ", line 1: learning-rate: expected a positive number, got inf"),
        ("data_root: ''", ", line 1: data_root: expected Path or NoneType, got ''"),
        ('data_root: "a\\0b"', ", line 1: data_root: expected Path or NoneType, got 'a\\x00b'"),
        ("seed: 2\nepochs: 0", ", line 2: epochs: expected a positive number, got 0"),
        ("3: 4", ", line 1: has no such option: '3'"),
        ("'a\\nb': 4", ", line 1: has no such option: 'a\\\\nb'"),
        ("seed: [", ", line 1: expected a plain value, got a list"),
        ("seed: 'a", ", line 1, cannot be read as YAML: found unexpected end of stream"),
        ("seed: 2\nepochs: a: b", ", line 2, cannot be read as YAML: mapping values are not allowed here"),
        ("%YAML 9.9\n---\nseed: 2", ", line 1, cannot be read as YAML: found incompatible YAML document"),
        ("\tseed: 2", ", line 1, cannot be read as YAML: found character '\\t' that cannot start any token"),
        (b"\xff\xfe\x00", " cannot be read as YAML: 'utf-8' codec can't decode byte 0xff in position 0"),
        (b"seed: \x01", " cannot be read as YAML: unacceptable character #x0001"),
        ("#" * 1_000_001, " has more than 1000000 bytes"),
    ],
)  # fmt: skip
def test_yaml_that_is_refused(tmp_path, text, message):
    assert yaml_error(tmp_path, text).startswith(message)


def test_a_yaml_file_that_is_none(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, there in (("pipe", "a FIFO"), (".", "a folder"), ("/dev/zero", "a device")):
        refused(f"config: expected a file, got {there}: {tmp_path / name}", "--config", str(tmp_path / name))


def test_words_of_yaml(tmp_path):
    file = tmp_path / "a.yaml"
    # to YAML 1.1 off is false, but these options have a choice of that name
    file.write_text("amp: off\ncuda_graph: on\nedge-norm: off\naffine: yes\nflip: ~\nthreads:\nseed: -0\n")
    values = {name: entry.value for name, entry in read_yaml(file, SearchConfig).items()}
    assert values == {
        "amp": "off", "cuda_graph": "on", "edge_norm": False, "affine": True, "flip": None, "threads": None,
        "seed": 0,
    }  # fmt: skip


def test_a_config_of_numbers_beyond_floats():
    with pytest.raises(ConfigError, match=r"^genotype: expected str, got 1$"):
        from rfdarts_fast.runs.config import from_plain

        from_plain({"genotype": 1}, TrainConfig)
    assert from_plain({"momentum": -(10**4000)}, TrainConfig) == {"momentum": float("-inf")}
    with pytest.raises(ConfigError, match="momentum: expected 0 or more, got -inf"):
        TrainConfig(out="x", momentum=float("-inf")).check()
    assert train_preset({}) == {}
