"""Two processes with synchronised BatchNorm compute what one computes of the whole batch."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rfdarts_fast.ops import backends
from tests.kernels.processes import LIBRARY, MISSING, cases

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(
    not backends()["cpu"].status()["built"], reason="the CPU kernels are not built"
)


@pytest.fixture(scope="module")
def errors(emulated_library):
    """{case: the error of each process, or ""}"""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    shared = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared[LIBRARY] = str(emulated_library)
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.kernels.processes"],
            cwd=ROOT,
            env=shared | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        lines = running[0].communicate(timeout=300)[0].splitlines()
        assert [process.wait(60) for process in running] == [0, 0]
    finally:
        for process in running:
            process.kill()
    return {name: errors for name, *errors in map(json.loads, lines)}


@pytest.mark.parametrize("name", [name for name, _ in cases()])
def test_two_processes_compute_what_one_does(errors, name):
    if errors[name][0].startswith(MISSING):
        pytest.skip(errors[name][0].removeprefix(MISSING))
    assert errors[name] == ["", ""], "\n".join(errors[name])
