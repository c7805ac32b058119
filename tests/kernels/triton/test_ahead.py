"""Every kernel compiles for GPUs that are not here, and keeps its values in registers."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.triton.device import SWITCH

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def in_a_process(module, *options, **variables):
    """What it prints, in a process whose triton does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != SWITCH} | variables
    command = [sys.executable, "-m", module, *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def compiled(*options):
    return in_a_process("tests.kernels.triton.ahead", *options)


def spilled(rows):
    return [row for row in rows if row["stack"] or row["local"]]


def kernels():
    """The names of all tuned kernels in the sources."""
    found = set()
    for path in (ROOT / "rfdarts_fast/ops/triton").glob("kernels_*.py"):
        found |= {line[4:].split("(")[0] for line in path.read_text().splitlines() if "_kernel(" in line[:40]}
    return {name for name in found if name.endswith("_kernel")}


# what ptxas does spill where it is not told how to use registers, and what uses most of them
CLOSE = "|".join(
    (
        r"input_gradient.* TILE=2048 .*BW=16$",
        r"input_gradient.* BW=4$",
        r"depthwise.* KERNEL=3 .*NORM=True .*BW=16$",
        r"depthwise.* KERNEL=5 DILATION=1 STRIDE=2 ",
        r"node.* TILE=2048 .*K=4 .*BW=4$",
    )
)


def test_kernels_compile_without_spills():
    rows = compiled("--archs", "90", "--cells", "1")
    assert {row["kernel"] for row in rows} == kernels()
    assert spilled(rows) == []


def test_variants_that_fill_the_registers_compile_without_spills():
    rows = compiled("--archs", "80", "90", "100", "--cells", "2", "--all-tiles", "--only", CLOSE)
    assert {row["arch"] for row in rows} == {80, 90, 100}
    assert {row["tile"] for row in rows} == {1024, 2048}
    assert spilled(rows) == []


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_all_variants_compile_without_spills(arch, dtype):
    rows = compiled("--archs", arch, "--dtypes", dtype, "--all-tiles")
    assert {row["kernel"] for row in rows} == kernels()
    assert spilled(rows) == []


@pytest.mark.slow
def test_the_gate_sees_a_spill():
    rows = compiled(
        "--archs", "90", "--cells", "1", "--only", "inner_gradient", "--tile", "2048", "--warps", "1"
    )
    assert rows and len(spilled(rows)) == len(rows)


def launched(folder, *options):
    """{kernel: (tile, warps, whether it was tuned in that process)}, of all launches."""
    rows = in_a_process("tests.kernels.triton.tuner", *options, TRITON_CACHE_DIR=str(folder))
    found = {}
    for name, *how in rows:
        assert found.setdefault(name, how) == how
    return found


def test_tuned_kernels_are_tuned_once(tmp_path):
    first, second = launched(tmp_path), launched(tmp_path)
    assert first.keys() == kernels()
    assert {name for name, how in first.items() if how[2]} == {"node_kernel", "input_gradient_kernel"}
    # found in the cache folder, where this version of Triton has one
    assert {name: how[:2] for name, how in second.items()} == {name: how[:2] for name, how in first.items()}
    assert first["node_kernel"][:2] == [2048, 8] and first["moments_kernel"][:2] == [1024, 4]
    assert not any(how[2] for how in second.values())


@pytest.mark.slow
def test_nothing_is_tuned_where_results_are_to_be_reproducible(tmp_path):
    assert {tuple(how) for how in launched(tmp_path, "deterministic").values()} == {(1024, 4, False)}
