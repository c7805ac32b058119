"""Every kernel compiles for GPUs that are not here, and keeps its values in registers."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.triton.device import SWITCH

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def in_a_process(module, *options, **variables):
    """The JSON lines that a module prints, in a process whose triton does not interpret."""
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
    paths = (ROOT / "rfdarts_fast/ops/triton").glob("kernels_*.py")
    return {name for path in paths for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.M)}


# variants that ptxas does spill where it is not told how to use registers, and those that use most of them
CLOSE = (
    r"input_gradient.* TILE=2048 .*BC=16$",
    r"input_gradient.* BC=4$",
    r"depthwise.* KERNEL=3 .*NORM=True .*BC=16$",
    r"depthwise.* KERNEL=5 DILATION=1 STRIDE=2 ",
    r"node.* TILE=2048 .*K=4 .*BC=4$",
)


def test_kernels_compile_without_spills():
    rows = compiled("--archs", "90", "--cells", "2")
    assert {row["kernel"] for row in rows} == kernels()
    assert spilled(rows) == []


@pytest.mark.parametrize(
    "arch", ["90", pytest.param("80", marks=pytest.mark.slow), pytest.param("100", marks=pytest.mark.slow)]
)
def test_variants_that_fill_the_registers_compile_without_spills(arch):
    rows = compiled("--archs", arch, "--cells", "3", "--all-tiles", "--only", "|".join(CLOSE))
    assert all(any(re.search(pattern, row["variant"]) for row in rows) for pattern in CLOSE)
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


TUNED = {"node_kernel", "input_gradient_kernel", "nor_conv_kernel", "nor_conv_backward_kernel"}


def launched(folder, *options):
    """{kernel: (tile, warps, whether it was tuned in that process)}, of all launches."""
    rows = in_a_process("tests.kernels.triton.tuner", *options, TRITON_CACHE_DIR=str(folder))
    choices = {}
    for name, *choice in rows:
        assert choices.setdefault(name, choice) == choice
    return choices


def test_tuned_kernels_are_tuned_once(tmp_path):
    first, second = launched(tmp_path), launched(tmp_path)
    assert first.keys() == kernels()
    assert {name for name, choice in first.items() if choice[2]} == TUNED
    assert first["node_kernel"][:2] == [2048, 8] and first["moments_kernel"][:2] == [1024, 4]
    # the second process reads the choices from the cache folder
    assert second == {name: [tile, warps, False] for name, (tile, warps, _) in first.items()}


@pytest.mark.slow
def test_nothing_is_tuned_where_results_are_to_be_reproducible(tmp_path):
    assert {tuple(choice) for choice in launched(tmp_path, "deterministic").values()} == {(1024, 4, False)}
