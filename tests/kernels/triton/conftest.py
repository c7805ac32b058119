import pytest
import torch

from tests.kernels.triton.device import DEVICE, MISSING, SWITCH


@pytest.fixture
def kernels(monkeypatch):
    """Lets the kernels run here, with NaN in all fresh memory and nothing tuned."""
    if MISSING is not None:
        pytest.skip(MISSING)
    if DEVICE == "cpu":
        monkeypatch.setenv(SWITCH, "1")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
