"""Stores of decoded images: damaged files, headers of other kinds, lists that do not fit."""

import hashlib
import json
import zlib

import numpy as np

from rfdarts_fast.data import load

from .case import NO_FILES, Case, damaged

SETTINGS = {"size": 4, "train_fraction": 0.5, "val_fraction": 0.5}
NAMES = {"names": ["a/0.png", "b/1.png"], "labels": [0, 1], "parts": [0, 1]}
IMAGES = np.random.RandomState(0).bytes(2 * 48)
CHUNK = {"chunk": 0, "crc32": zlib.crc32(IMAGES), "bad": []}


def store(header=(), settings=(), files=(), chunk=()):
    """The files of a sound store, but for the changes."""
    names = json.dumps({**NAMES, **dict(files)}).encode()
    digest = hashlib.sha256(names).hexdigest()
    values = {"settings": {**SETTINGS, **dict(settings)}, "classes": ["a", "b"], "number": 2, "chunk": 2}
    values |= {"files": digest, "version": 1, **dict(header)}
    chunks = json.dumps({**CHUNK, **dict(chunk)}).encode() + b"\n"
    return {
        "store.json": json.dumps(values).encode(),
        "files.json": names,
        "images.u8": IMAGES,
        "chunks.jsonl": chunks,
    }


def case(name, contents, accepted=False, names="store"):
    def run(folder):
        root = folder / "store"
        root.mkdir()
        for file, content in contents.items():
            content(root / file) if callable(content) else (root / file).write_bytes(content)
        return load("cache", root=root)

    return Case("stores", name, run, accepted, "" if accepted is None else names)


def cases():
    good = store()
    yield case("good", good, True)
    for file, content in good.items():
        yield case(f"without {file}", {k: v for k, v in good.items() if k != file}, names="store")
        yield case(f"{file} empty", {**good, file: b""})
        for name, make in NO_FILES.items():
            yield case(f"{file} is a {name}", {**good, file: make})
        for name, bad in damaged(content, 5, 30):
            yield case(f"{file} {name}", {**good, file: bad}, None if file != "images.u8" else False)
    for value in (None, -1, 0, 1.5, "2", [], {}, 2**70, True, float("nan")):
        for name in ("number", "chunk", "version", "classes", "settings", "files"):
            yield case(f"{name} is {value!r}", store(header={name: value}))
        yield case(f"size is {value!r}", store(settings={"size": value}))
        for name in NAMES:
            yield case(f"{name} are {value!r}", store(files={name: value}))
            yield case(f"one of the {name} is {value!r}", store(files={name: [value, NAMES[name][1]]}), None)
        for name in CHUNK:
            yield case(f"{name} of a chunk is {value!r}", store(chunk={name: value}), None)
    yield case("another class", store(files={"labels": [0, 2]}))
    yield case("an unknown part", store(files={"parts": [0, 2]}))
    yield case("no image can be read", store(chunk={"bad": [[0, "x"], [1, "y"]]}))
    yield case("one image can be read", store(chunk={"bad": [[0, "x"]]}), True)
    yield case("an unknown setting", store(header={"more": 1}))
