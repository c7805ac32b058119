"""oneDNN is left out of searches on processors without AVX-512."""

import pytest
import torch


# trained convolutions corrupt the heap there ("corrupted double-linked list"): torch 2.14.1 on an AVX2 EPYC,
# on the reference as well, gone without oneDNN
@pytest.fixture(autouse=True)
def without_onednn():
    with torch.backends.mkldnn.flags(enabled=torch.backends.cpu.get_cpu_capability() == "AVX512"):
        yield
