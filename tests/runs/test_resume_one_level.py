"""A one-level search resumes bit by bit, with diagnostics on or off."""

import pytest
from interrupted import interrupted_before
from same_run import assert_same_run

from rfdarts_fast.search import search
from rfdarts_fast.search.run import SearchRun


@pytest.mark.parametrize("changes", [{"levels": 1}, {"levels": 1, "diagnose_every": 1}, {}])
def test_interrupted_and_resumed(tiny_search, tmp_path, changes):
    changes = {"checkpoint_minutes": 1e-9, "learning_rate": 0.1, **changes}
    whole = tiny_search(out=tmp_path / "whole", **changes)
    search(whole)
    config = tiny_search(out=tmp_path / "resumed", **changes)
    with interrupted_before(SearchRun, 1, 2):
        search(config)
    search(config)
    assert_same_run(config.out, whole.out)
