"""Options, on the command line and in YAML files: numbers out of their range, texts that are no numbers."""

import dataclasses
from typing import Literal, get_args, get_origin

from rfdarts_fast.retrain.config import TrainConfig
from rfdarts_fast.retrain.config import preset_values as train_preset
from rfdarts_fast.runs.config import type_hints
from rfdarts_fast.runs.options import parse_config, read_yaml
from rfdarts_fast.search.config import SearchConfig
from rfdarts_fast.search.config import preset_values as search_preset

from .case import NO_FILES, Case, damaged

COMMANDS = {"search": (SearchConfig, search_preset), "train": (TrainConfig, train_preset)}
# no number and no range has them
NEVER = {
    "nan": "nan", "inf": "inf", "-inf": "-inf", "far below": "-99999999999", "huge": "9" * 30,
    "endless": "9" * 5000,
    "empty": "", "text": "many", "unicode": "１２", "underscore": "1_0", "hexadecimal": "0x10", "null": "\0",
    "blank": " ", "line": "1\n2",
}  # fmt: skip


def parse(command, args):
    config_class, presets = COMMANDS[command]
    return parse_config(config_class, presets, ["--out", "x", *args], f"rfdarts {command}")


def option_case(command, name, args, accepted=False, names=""):
    return Case("options", f"{command} {name}", lambda _: parse(command, args), accepted, names)


def option_cases():
    for command, (config_class, _) in COMMANDS.items():
        yield option_case(command, "nothing", [], True)
        hints = type_hints(config_class)
        for field in dataclasses.fields(config_class):
            option = f"--{field.name.replace('_', '-')}"
            types = get_args(hints[field.name]) or (hints[field.name],)
            if {int, float} & set(types):
                # usage, then range
                for i, (name, value) in enumerate(NEVER.items()):
                    args = [option, value] if i % 2 else [f"{option}={value}"]
                    yield option_case(command, f"{option} {name}", args, names=option)
            elif bool in types:
                yield option_case(command, f"{option} with a value", [option, "maybe"], None)
            elif any(get_origin(part) is Literal for part in (hints[field.name], *types)):
                for value in ("", "évil", "x" * 5000):
                    yield option_case(command, f"{option} {value[:5]!r}", [option, value], names=option)
            yield option_case(command, f"{option} without a value", [option], None)
        for name, args in {
            "unknown": ["--latyers", "3"], "no option": ["x"], "half": ["--learning", "1"],
            "three dashes": ["---epochs", "1"], "an option of bytes": ["--\udcff", "1"],
            "a line": ["--a\nb"],
            "a long one": ["--" + "x" * 5000],
        }.items():  # fmt: skip
            yield option_case(command, name, args)


def yaml_case(name, text, accepted=False):
    def run(folder):
        path = folder / "a.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return parse("search", ["--config", str(path)])

    return Case("YAML", name, run, accepted, "" if accepted else "a.yaml")


GOOD = (
    b"# a comment\npreset: quick\nepochs: 12\nlearning-rate: 3e-4\naffine: true\nthreads: null\n'seed': 3\n"
)


def yaml_cases():
    yield yaml_case("good", GOOD, True)
    yield yaml_case("empty", "", True)
    yield yaml_case("comments", "# nothing\n---\n...\n", True)
    yield yaml_case("windows", GOOD.replace(b"\n", b"\r\n"), True)
    yield yaml_case("a byte order mark", b"\xef\xbb\xbf" + GOOD, None)
    for name, bad in damaged(GOOD, 20, 60):
        yield yaml_case(name, bad, None)
    bomb = "a: &a [x, x]\n" + "".join(f"a{i}: &a{i} [*a, *a]\n" for i in range(50))
    for name, text in {
        "anchor": "epochs: &a 3", "alias": "epochs: *a", "billion laughs": bomb,
        "anchored mapping": "&a {epochs: 3}",
        "merge": "<<: {epochs: 3}", "merge of an alias": "<<: *a", "recursive": "&a [*a]",
        "tag": "epochs: !!int 3", "object": "seed: !!python/object/apply:os.abort []", "own tag": "!a {}",
        "module": "seed: !!python/module:os", "name": "seed: !!python/name:os.abort",
        "binary": "seed: !!binary aGk=",
        "set": "!!set {epochs}", "lists": "epochs: [3]", "mappings": "epochs: {a: 3}",
        "list": "- epochs: 3",
        "text": "epochs", "number": "3", "deep list": "epochs: " + "[" * 50_000,
        "deep mapping": "a: {" * 20_000,
        "deep blocks": "".join(" " * i + "a:\n" for i in range(1000)), "deep dashes": "- " * 20_000,
        "twice": "seed: 1\nseed: 1", "twice, two spellings": "batch-size: 1\nbatch_size: 2",
        "two documents": GOOD.decode() + "---\nseed: 1",
        "key of a list": "? [a]\n: 3", "key of a mapping": "? {a: b}\n: 3", "empty key": ": 3",
        "null key": "~: 3", "number key": "3: 3",
        "unknown": "latyers: 3", "a key of lines": "'a\n\n b': 3", "long key": "x" * 2000 + ": 3",
        "dunder": "__class__: 3",
        "tab": "\tseed: 1", "not closed": "seed: 'a", "not closed list": "seed: [",
        "directive": "%YAML 3.0\n---\nseed: 1",
        "control": b"seed: \x01", "null byte": b"seed: \0", "not UTF-8": b"seed: \xff",
        "UTF-16": GOOD.decode().encode("utf-16"),
        "large": b"#" * 1_000_001, "colon": "seed: a: b", "percent": "%", "at": "seed: @1",
        "backtick": "`seed`: 1",
        "out of a text": "out: ''", "path of null": 'out: "a\\0"', "device": "device: 3",
        "download": "download: maybe",
    }.items():  # fmt: skip
        yield yaml_case(name, text)
    for name in ("epochs", "learning_rate", "image_size", "threads", "seed"):
        for what, value in {
            **NEVER, "octal": "010", "sexagesimal": "1:30", "date": "2001-01-01", "truth": "true",
            "quoted": "'a'",
            "block": "|\n  3", "folded": ">\n  3", "YAML nan": ".nan", "YAML inf": "-.inf",
            "exponent": "1e400",
        }.items():  # fmt: skip
            # nothing is null, and two lines are another document; text may be a float
            either = value in ("", " ", "1\n2") or (name == "learning_rate" and what in ("block", "folded"))
            yield yaml_case(f"{name}: {what}", f"{name}: {value}", None if either else False)
    for name, make in NO_FILES.items():

        def run(folder, make=make):
            make(folder / "a.yaml")
            return read_yaml(folder / "a.yaml", SearchConfig)

        yield Case("YAML", name, run, False, "a.yaml")


def cases():
    yield from option_cases()
    yield from yaml_cases()
