"""Run folders and checkpoints: config.json edited and cut short, checkpoints of other things, pickles."""

import gzip
import io
import json
import pickle
import zipfile

import numpy as np
import torch

from rfdarts_fast.runs.checkpoint import load_checkpoint
from rfdarts_fast.runs.files import JsonLines
from rfdarts_fast.runs.run_folder import read_config, to_plain
from rfdarts_fast.search.config import SearchConfig

from .case import NO_FILES, Case, Payload, damaged

CONFIG = {"command": "search", **to_plain(SearchConfig(out="x"))}


def folder_case(name, content, accepted=False):
    def run(folder):
        (folder / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_config(folder, "search", SearchConfig).check()

    return Case("run folders", name, run, accepted)


def folder_cases():
    good = json.dumps(CONFIG, indent=2).encode()
    yield folder_case("good", good, True)
    yield folder_case("of no options", '{"command": "search"}', True)
    for name, bad in damaged(good, 20, 40):
        yield folder_case(name, bad, None if "flips" in name or name.startswith("without") else False)
    for name, content in {
        "empty": b"", "null": b"null", "list": b"[]", "text": b'"search"', "number": b"1",
        "zeros": bytes(500),
        "not UTF-8": b"\xff\xfe", "deep": b'{"command":' + b"[" * 90_000,
        "another command": '{"command": "train"}',
        "no command": "{}", "command of a list": '{"command": ["search"]}',
        "unknown": '{"command": "search", "evil": 1}',
        "huge int": b'{"command": "search", "seed": ' + b"9" * 5000 + b"}",
    }.items():  # fmt: skip
        yield folder_case(name, content)
    for field in ("epochs", "learning_rate", "method", "affine", "image_size", "device", "space", "backend"):
        for name, value in {
            "list": [1], "mapping": {"a": 1}, "text": "many", "NaN": float("nan"), "inf": float("inf"),
            "huge": 10**400,
            "null byte": "\0", "lines": "a\nb", "fraction": -0.5,
        }.items():  # fmt: skip
            # a device is looked for when the run starts
            either = field == "device" and isinstance(value, str) and "\0" not in value
            yield folder_case(
                f"{field}: {name}", json.dumps({**CONFIG, field: value}), None if either else False
            )
    for name, make in NO_FILES.items():

        def run(folder, make=make):
            make(folder / "config.json")
            return read_config(folder, "search", SearchConfig)

        yield Case("run folders", f"config: {name}", run, False, "config.json")

        def load(folder, make=make):
            make(folder / "checkpoint.pt")
            return load_checkpoint(folder / "checkpoint.pt")

        yield Case("checkpoints", name, load, False, "checkpoint.pt")


def saved(value):
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


def checkpoint_case(name, content, accepted=False):
    def run(folder):
        (folder / "checkpoint.pt").write_bytes(content)
        return load_checkpoint(folder / "checkpoint.pt")

    return Case("checkpoints", name, run, accepted, "" if accepted is None else "checkpoint.pt")


def checkpoint_cases():
    good = saved({"epoch": 1, "step": 0, "network": {"weight": torch.ones(3)}})
    for name, bad in damaged(good, 20, 60):
        yield checkpoint_case(name, bad, None if "flips" in name else False)
    loop = []
    loop.append(loop)
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(Payload()))
        file.writestr("archive/version", "3")
    for name, content in {
        "empty": b"", "text": b"no checkpoint", "zeros": bytes(1000), "zip alone": b"PK\3\4",
        "payload": pickle.dumps(Payload()),
        "a payload in it": saved({"epoch": Payload()}), "a payload in a zip": zipped.getvalue(),
        "an old pickle": b"(dp0\n.",
        "a pickle of text": b"cos\nsystem\n(S'false'\ntR.", "a pickle of names": b"cbuiltins\nexec\n.",
        "gzip": gzip.compress(good),
        "a pickle without end": b"\x80\x02", "a memo that is not there": b"\x80\x02h\x05.",
        "protocol 9": b"\x80\x09N.",
        "deep": b"\x80\x02" + b"]" * 50_000, "a huge text": b"\x80\x02X\xff\xff\xff\x7f",
        "an array": saved(np.zeros(3)),
        "an object array": saved(np.array([Payload()], object)), "a module": saved(torch.nn.Linear(1, 1)),
        "npz": b"PK\5\6" + bytes(18),
    }.items():  # fmt: skip
        yield checkpoint_case(name, content)
    for name, value in {
        "nothing": None, "no keys": {}, "list": [], "number": 1, "text": "a", "tensor": torch.ones(2),
        "loop": loop,
        "NaN": {"network": {"weight": torch.tensor(float("nan"))}}, "other keys": {"a": 1},
        "keys of numbers": {1: 2},
    }.items():  # fmt: skip
        yield checkpoint_case(f"of {name}", saved(value), None)


def lines_cases():
    for name, content in {
        "cut short": b'{"epoch": 0}\n{"epoch"', "empty": b"", "good": b'{"epoch": 0}\n{"epoch": 1}\n',
    }.items():  # fmt: skip

        def run(folder, content=content):
            (folder / "metrics.jsonl").write_bytes(content)
            return JsonLines(folder / "metrics.jsonl").read()

        yield Case("run folders", f"metrics: {name}", run, True)


def cases():
    yield from folder_cases()
    yield from lines_cases()
    yield from checkpoint_cases()
