"""Searches at their first step; oneDNN is left out on processors without AVX-512."""

import pytest
import torch

from rfdarts_fast.runs.run import load_data
from rfdarts_fast.runs.run_folder import RunFolder
from rfdarts_fast.search.run import SearchRun


# trained convolutions corrupt the heap there ("corrupted double-linked list"): torch 2.14.1 on an AVX2 EPYC,
# on the reference as well, gone without oneDNN
@pytest.fixture(autouse=True)
def without_onednn():
    with torch.backends.mkldnn.flags(enabled=torch.backends.cpu.get_cpu_capability() == "AVX512"):
        yield


@pytest.fixture
def start(tiny_search):
    """A search at its first step, its folder written."""

    def start(**changes):
        config = tiny_search(**changes)
        config.check()
        return SearchRun(config, load_data(config), RunFolder(config.out, "search", config))

    return start
