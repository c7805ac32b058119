import pytest
import torch

from tests.kernels.cuda import emulated


@pytest.fixture(scope="session")
def emulated_library(tmp_path_factory):
    if emulated.compiler() is None:
        pytest.skip("needs g++ to build the CUDA kernels for the CPU")
    return emulated.build(tmp_path_factory.mktemp("emulated"))


@pytest.fixture
def emulation(emulated_library):
    """The ops of cells are the CUDA kernels on the CPU; fresh memory is full of NaNs."""
    torch.use_deterministic_algorithms(True)
    with emulated.Emulation(emulated_library):
        yield torch.ops.rfdarts_emulated
    torch.use_deterministic_algorithms(False)
    torch.ops.rfdarts_emulated.shuffle(False)
