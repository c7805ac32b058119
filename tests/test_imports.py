"""Imports run one way, lazy ones too, and `import rfdarts_fast` stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "rfdarts_fast"

# who may import whom, besides itself
ALLOWED = {
    "messages": set(),
    "spaces": {"messages"},
    "ops": set(),
    "data": {"messages"},
    "nn": {"ops", "spaces"},
    "tables": {"data", "spaces", "messages"},
    "runs": {"data", "ops", "messages"},
    "cache": {"data", "runs", "messages"},
    "search": {"nn", "data", "runs", "spaces", "ops", "tables"},
    "retrain": {"nn", "data", "runs", "spaces", "ops", "messages"},
    "export": {"nn", "ops", "retrain", "runs", "spaces", "messages"},
    "results": {"runs", "spaces", "messages"},
    "report": {"results", "nn", "runs", "spaces", "tables"},
    "study": {"report", "results", "search", "retrain", "runs", "spaces", "tables", "messages"},
    "drop_in": {"nn", "data", "runs", "spaces", "ops"},
    "bench": {"nn", "data", "runs", "spaces", "ops", "search", "retrain", "drop_in"},
    "cli": {
        "bench",
        "cache",
        "export",
        "search",
        "retrain",
        "drop_in",
        "nn",
        "data",
        "runs",
        "spaces",
        "ops",
        "tables",
    }
    | {"results", "report", "study", "messages"},
    "__main__": {"cli"},
    # the package itself offers `accelerate` and `use_backend`, imported on first use
    "__init__": {"drop_in", "ops"},
}
# not pandas: scikit-learn loads it where it is installed
OPTIONAL = {"torchvision", "triton", "tensorboard", "matplotlib", "nats_bench", "submitit", "webdataset"} | {
    "onnx",
    "onnxruntime",
    "onnxscript",
    "safetensors",
    "timm",
}


def part_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(path):
    """The parts of the package that a module names in any import, wherever in the file it stands."""
    package = ["rfdarts_fast", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # importlib.import_module("rfdarts_fast.x") and tables of such names
            names = [node.value] if node.value.replace(".", "").replace("_", "").isalnum() else []
        for name in names:
            first, _, rest = name.partition(".")
            if first == "rfdarts_fast" and rest:
                yield rest.split(".")[0]


MODULES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    part = part_of(path)
    assert part in ALLOWED, f"say in ALLOWED what {part} may import"
    parts = {
        name
        for name in imported_parts(path)
        if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").exists()
    }
    assert parts - {part} <= ALLOWED[part]


def test_the_rule_has_no_cycle():
    remaining = dict(ALLOWED)
    while remaining:
        leaves = {part for part, allowed in remaining.items() if not allowed & remaining.keys()}
        assert leaves, f"a cycle among {sorted(remaining)}"
        remaining = {part: allowed for part, allowed in remaining.items() if part not in leaves}


def modules_after(statement):
    """All modules that a fresh interpreter has loaded after the statement."""
    code = f"{statement}; import sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=300
    )
    return set(done.stdout.split())


def test_importing_the_package_is_cheap():
    assert not modules_after("import rfdarts_fast") & {"torch", "numpy", *OPTIONAL}


def test_importing_everything_loads_nothing_optional_and_compiles_nothing():
    loaded = modules_after("import rfdarts_fast.cli, rfdarts_fast.search, rfdarts_fast.retrain")
    assert "torch" in loaded
    assert not loaded & {*OPTIONAL, "torch.utils.cpp_extension", "torch.utils.tensorboard"}


def test_the_reader_of_imports_sees_all_kinds(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    module = tmp_path / "spaces" / "space.py"
    module.parent.mkdir()
    module.write_text(
        "import rfdarts_fast.nn.derived\nfrom rfdarts_fast import ops\nfrom ..data import load\n"
        "from .genotype import parse\nfrom .. import cli\n"
        "def f():\n    from rfdarts_fast.runs.run import Run\n    import_module('rfdarts_fast.search')\n"
    )
    assert sorted(imported_parts(module)) == ["cli", "data", "nn", "ops", "runs", "search", "spaces"]
