"""The parsers as functions of bytes, with good inputs to start from: for Hypothesis and for the fuzzer."""

import gzip
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from rfdarts_fast.data import load, read_split_file
from rfdarts_fast.data.photo import read_rgb
from rfdarts_fast.runs.checkpoint import load_checkpoint
from rfdarts_fast.runs.run_folder import read_config
from rfdarts_fast.search.config import SearchConfig
from rfdarts_fast.spaces import PUBLISHED, parse, to_json

from . import archives, images, options, runs, texts
from .case import Case, failure


def _file(name: str, read: Callable[[Path], object]) -> Callable[[bytes, Path], object]:
    def parse_file(data: bytes, folder: Path) -> object:
        (folder / name).write_bytes(data)
        return read(folder / name)

    return parse_file


def _genotype(data: bytes, folder: Path) -> object:
    return parse(os.fsdecode(data))


def _options(data: bytes, folder: Path) -> object:
    # the words of a command line are separated by null bytes; what Python cannot be given stays out
    return options.parse("search", [os.fsdecode(word) for word in data.split(b"\0")])


PARSERS: dict[str, Callable[[bytes, Path], object]] = {
    "genotype": _genotype,
    "options": _options,
    "yaml": _file("a.yaml", lambda path: options.parse("search", ["--config", str(path)])),
    "split": _file("split.txt", lambda path: read_split_file(path, 6)),
    "npz": _file("a.npz", lambda path: load("npz", root=path)),
    "photo": _file("a.png", read_rgb),
    "config": _file("config.json", lambda path: read_config(path.parent, "search", SearchConfig)),
    "checkpoint": _file("checkpoint.pt", load_checkpoint),
}
_SPLIT = json.dumps(texts.INDICES).encode()
SEEDS: dict[str, list[bytes]] = {
    "genotype": [
        texts.literal().encode(),
        texts.CELL.encode(),
        to_json(PUBLISHED["DARTS_V2"]).encode(),
        b"DARTS_V1",
    ],
    "options": [
        b"--epochs\x0020\0--learning-rate=3e-4\0--flip\0False",
        b"--preset\0quick\0--method\0rf-darts",
    ],
    "yaml": [options.GOOD, b"{seed: 3, 'epochs': 20}"],
    "split": [_SPLIT, gzip.compress(_SPLIT)],
    "npz": [archives.archive(), archives.archive(compression=zipfile.ZIP_DEFLATED)],
    "photo": [images.saved(images.photo(), form) for form in images.FORMATS.values()],
    "checkpoint": [runs.saved({"epoch": 1, "network": {"weight": torch.ones(3)}})],
    "config": [b'{"command": "search", "epochs": 3, "affine": true, "method": "rf-darts", "threads": null}'],
}


def answer(parser: str, data: bytes, folder: Path) -> str | None:
    """What is wrong with a parser's answer to these bytes; None if it reads or refuses them rightly."""
    return failure(Case(parser, "bytes", lambda _: PARSERS[parser](data, folder), None), folder)
