"""What gpu_check runs on a GPU, on the emulated kernels."""

import re
import struct

import pytest
import torch

from benchmarks import gpu_steps, sass
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


def test_recorded_launches_name_their_kernels(gpu, emulated_library):
    """With the parameters' bytes: each struct begins with what its first field says."""
    headers = "".join(path.read_text() for path in (emulation.CSRC / "cuda").iterdir())
    gpu.ops.record(True)
    gpu_steps.small_case()
    text = gpu.ops.recorded()
    launches = sass.launches(text, sass.symbols(emulated_library))
    assert {one.name for one in launches} == set(
        re.findall(r"(\w+_kernel)\(const __grid_constant__", headers)
    )
    for line, one in zip(text.splitlines(), launches, strict=True):
        assert [one.blocks, one.shared] == [int(number) for number in line.split(" | ")[1:3]]
        assert one.threads == (256, 1, 1)
    tilings = {one.params[:24] for one in launches if one.name == "conv_forward_kernel"}
    # th, tw, ck, down, across, count
    for th, tw, _, down, across, count in (struct.unpack("<6i", tiling) for tiling in tilings):
        assert th * tw in (256, 128, 64, 32, 16) and count % (down * across) == 0
