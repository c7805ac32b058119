import pytest
import torch


@pytest.fixture(autouse=True)
def repeatable():
    """One thread, as the tensors here are tiny, and the same numbers in every run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
