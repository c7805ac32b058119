"""`examples/search_in_one_file.py` searches, and does so on the public ops, nn and spaces alone."""

import ast
import importlib
from pathlib import Path

import pytest
import torch

from rfdarts_fast.spaces import parse

PATH = Path(__file__).parents[2] / "examples" / "search_in_one_file.py"
TINY = {"batch": 128, "channels": 4, "kinds": ("normal", "reduce")}


@pytest.fixture
def main(monkeypatch):
    monkeypatch.syspath_prepend(str(PATH.parent))
    return importlib.import_module(PATH.stem).main


def test_searches(main, capsys):
    begin, begin_arch, *_ = main(epochs=0, **TINY)
    capsys.readouterr()
    end, end_arch, accuracy, genotype = main(epochs=2, warmup=1, **TINY)

    lines = capsys.readouterr().out.splitlines()
    assert [line[:9] for line in lines] == ["epoch  0 ", "epoch  1 ", "supernet,", "Genotype("]
    assert "architecture" not in lines[0] and "architecture" in lines[1]
    assert lines[2] == f"supernet, unseen digits: {accuracy:.1%}" and parse(lines[3]) == genotype

    for (name, old), new in zip(begin.named_parameters(), end.parameters(), strict=True):
        norm = isinstance(begin.get_submodule(name.rpartition(".")[0]), torch.nn.BatchNorm2d)
        assert old.requires_grad == norm, name
        assert torch.equal(old, new) != norm, name
    for old, new in zip(begin_arch.parameters(), end_arch.parameters(), strict=True):
        assert not torch.equal(old, new)


@pytest.mark.slow
def test_learns_with_its_default_settings(main):
    *_, accuracy, _ = main()
    assert accuracy > 0.8


def test_needs_only_what_ops_nn_and_spaces_offer():
    tree = ast.parse(PATH.read_text())
    modules = {"rfdarts_fast": {"ops"}}
    for name in ("nn", "spaces"):
        modules[f"rfdarts_fast.{name}"] = set(importlib.import_module(f"rfdarts_fast.{name}").__all__)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("rfdarts_fast"):
            assert {alias.name for alias in node.names} <= modules[node.module]
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("rfdarts_fast") for alias in node.names)
    ops = importlib.import_module("rfdarts_fast.ops")
    used = [
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ops"
    ]
    assert used and set(used) <= set(ops.__all__)
    assert len(PATH.read_text().splitlines()) <= 160
