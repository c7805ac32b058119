"""Comparison of two runs' folders, bit by bit."""

import json

import torch


def contents(folder):
    """The bytes of each file by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def records(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


def assert_same(a, b, where, ignored=frozenset()):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() - ignored == b.keys() - ignored, where
        # the records have times, too
        for key in a.keys() - {"seconds", "history"} - ignored:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def assert_same_run(folder, expected, ignored=frozenset(), unlike=()):
    """Everything but times, places and what was left half written.

    `ignored` parts of checkpoints and the contents of `unlike` files are left out, too.
    """
    names = {p.name for p in expected.iterdir()}
    assert {p.name for p in folder.iterdir()} == names
    for name in names:
        if name in unlike:
            continue
        if name.endswith(".pt"):
            states = [torch.load(path / name, weights_only=True) for path in (folder, expected)]
            assert_same(*states, name, ignored)
        elif name.endswith(".jsonl"):
            assert records(folder / name) == records(expected / name), name
        elif name not in ("config.json", "environment.json"):
            assert (folder / name).read_bytes() == (expected / name).read_bytes(), name
