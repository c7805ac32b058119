"""What gpu_check runs on a GPU, on the emulated kernels."""

import re

import pytest
import torch

from benchmarks import gpu_steps
from tests.kernels import emulation, oracles


@pytest.fixture
def gpu(emulated_kernels, monkeypatch):
    monkeypatch.setattr(gpu_steps, "backends", lambda: {"cuda": emulated_kernels.backend})
    monkeypatch.setattr(oracles, "GPUKernels", lambda backend, device: emulated_kernels)
    yield emulated_kernels
    emulated_kernels.ops.record(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_smoke(gpu, dtype):
    assert gpu_steps.smoke(dtype) == {"passed": True}


def test_the_sanitizers_see_every_kernel(gpu):
    headers = "".join(path.read_text() for path in (emulation.CSRC / "cuda").iterdir())
    kernels = set(re.findall(r"_kernel\(const __grid_constant__ (\w+)", headers))
    gpu.ops.record(True)
    gpu_steps.small_case()
    launched = set(re.findall(r"^Params = [^|<]*\b(\w+)(?:<| \|)", gpu.ops.recorded(), re.MULTILINE))
    assert launched == kernels and len(kernels) > 10
