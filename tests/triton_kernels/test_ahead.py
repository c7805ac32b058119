"""Every kernel compiles for GPUs that are not here, and keeps its values in registers."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.triton_kernels.device import SWITCH

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def compiled(*options):
    """In a process whose triton does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != SWITCH}
    command = [sys.executable, "-m", "tests.triton_kernels.ahead", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def spilled(rows):
    return [row for row in rows if row["stack"] or row["local"]]


def kernels():
    """The names of all tuned kernels in the sources."""
    found = set()
    for path in (ROOT / "rfdarts_fast/ops/triton").glob("kernels_*.py"):
        found |= {line[4:].split("(")[0] for line in path.read_text().splitlines() if "_kernel(" in line[:40]}
    return {name for name in found if name.endswith("_kernel")}


def test_kernels_compile_without_spills():
    rows = compiled("--archs", "90", "--cells", "1")
    assert {row["kernel"] for row in rows} == kernels()
    assert spilled(rows) == []


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_all_variants_compile_without_spills(arch):
    rows = compiled("--archs", arch, "--all-tiles")
    rows += compiled("--archs", arch, "--dtypes", "float32", "float16")
    assert {row["kernel"] for row in rows} == kernels()
    assert spilled(rows) == []


def test_the_gate_sees_a_spill():
    rows = compiled(
        "--archs", "90", "--cells", "1", "--only", "inner_gradient", "--tile", "2048", "--warps", "1"
    )
    assert rows and len(spilled(rows)) == len(rows)
