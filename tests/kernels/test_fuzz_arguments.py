"""Whatever arguments an op is called with, it touches no memory but theirs; under AddressSanitizer."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from torch.utils.cpp_extension import TORCH_LIB_PATH

from tests.kernels import emulation

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 60
FLAGS = ("-fsanitize=address", "-g1", "-w", f"-isystem{sysconfig.get_path('include')}")

pytestmark = pytest.mark.slow


def build(folder, csrc):
    """The CPU library with the sanitizer, in a copy of the package in `folder`."""
    shutil.copytree(
        ROOT / "rfdarts_fast", folder / "rfdarts_fast", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    shutil.copytree(ROOT / "tests" / "kernels", folder / "tests" / "kernels")
    sources = (csrc / "sources.txt").read_text().split()
    with ThreadPoolExecutor(2) as pool:
        how = dict(csrc=csrc, folder=folder, flags=FLAGS, emulated=False)
        objects = list(pool.map(partial(emulation.compile_one, **how), sources))
    library = folder / "rfdarts_fast" / "ops" / "_C.abi3.so"
    command = [emulation.compiler(), "-shared", *FLAGS, "-o", str(library), *map(str, objects)]
    subprocess.run([*command, f"-L{TORCH_LIB_PATH}", "-ltorch", "-ltorch_cpu", "-lc10"], check=True)


def fuzz(folder, seed, seconds=SECONDS):
    # it looks for what throws as it is loaded, and Python has no libstdc++
    libraries = [
        subprocess.check_output([emulation.compiler(), f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder),
        "LD_PRELOAD": " ".join(libraries),
        # torch keeps what it has; the allocator may say that there is no memory
        "ASAN_OPTIONS": "detect_leaks=0,allocator_may_return_null=1",
        "OMP_NUM_THREADS": "1",
    }
    program = str(folder / "tests" / "kernels" / "fuzz_arguments.py")
    return subprocess.run(
        [sys.executable, program, str(seconds), str(seed)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_random_arguments_touch_no_memory_but_theirs(tmp_path):
    build(tmp_path, ROOT / "csrc")
    for seed in range(2):
        done = fuzz(tmp_path, seed)
        assert done.returncode == 0, done.stderr[-4000:]
        returned, raised = map(
            int, re.fullmatch(r"(\d+) calls returned, (\d+) raised\s*", done.stdout).groups()
        )
        assert returned > 20
        assert raised > 100
