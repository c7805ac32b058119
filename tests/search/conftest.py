"""Searches at their first step; oneDNN is left out on processors without AVX-512."""

import pytest

from rfdarts_fast.runs.run import load_data
from rfdarts_fast.runs.run_folder import RunFolder
from rfdarts_fast.search.run import SearchRun


@pytest.fixture(autouse=True)
def trains_convolutions(without_onednn):
    pass


@pytest.fixture
def start(tiny_search):
    """A search at its first step, its folder written."""

    def start(**changes):
        config = tiny_search(**changes)
        config.check()
        return SearchRun(config, load_data(config), RunFolder(config.out, "search", config))

    return start
