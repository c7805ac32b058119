"""The backends that kernel tests run on."""

import os
import platform

import pytest
import torch
from filelock import FileLock

from rfdarts_fast.ops import backends
from tests.kernels import emulation
from tests.kernels.oracles import CPUKernels, GPUKernels, Kernels

# before anything else can load triton without its interpreter
from tests.kernels.triton import device as triton_device


def built(tmp_path_factory, name, files=None):
    """The library of `emulation.build`, once for all of pytest-xdist's processes."""
    if emulation.compiler() is None:
        pytest.skip("needs g++ to build emulated kernels")
    # each process has a folder inside that of all
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / name
    with FileLock(f"{folder}.lock"):
        if folder.exists():
            return folder / emulation.LIBRARY
        folder.mkdir()
        return emulation.build(folder, files=files)


@pytest.fixture(scope="session")
def emulated_library(tmp_path_factory):
    return built(tmp_path_factory, "emulated")


@pytest.fixture(scope="session")
def emulated_amx(tmp_path_factory):
    status = backends()["cpu"].status()
    if not status["built"]:
        pytest.skip(str(status["reason"]))
    if platform.machine() == "x86_64" and status["isa_best"] == "baseline":
        pytest.skip("needs AVX2")
    library = built(tmp_path_factory, "emulated_amx", emulation.amx_sources())
    return emulation.EmulatedAMXBackend(emulation.load(library, "rfdarts_emulated_cpu"))


@pytest.fixture(scope="session")
def emulated_kernels(emulated_library):
    return emulation.EmulatedKernels(emulated_library)


def kernels(request):
    """The kernels that a test's parameter `backend` names."""
    name = request.param
    if name == "emulated":
        return request.getfixturevalue("emulated_kernels")
    if name == "triton":
        if triton_device.MISSING is not None:
            pytest.skip(triton_device.MISSING)
        if triton_device.DEVICE == "cpu":
            request.getfixturevalue("monkeypatch").setenv(triton_device.SWITCH, "1")
        return Kernels(backends()["triton"], triton_device.DEVICE)
    backend = backends()["cuda" if name == "gpu" else name]
    if reason := backend.status().get("reason"):
        pytest.skip(f"needs {name}: {reason}")
    return GPUKernels(backend, "cuda") if name == "gpu" else CPUKernels(backend)


@pytest.fixture
def backend(request, monkeypatch):
    """The kernels of the test's parameter; fresh memory on the CPU is full of NaNs."""
    found = kernels(request)
    if found.device == "cuda":
        # plain PyTorch without TF32, and with the same algorithm in every run
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    with found.poison(found.device == "cpu"):
        yield found
