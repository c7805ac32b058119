"""A one-level search resumes bit by bit, with diagnostics on or off."""

import pytest
from same_run import assert_same_run

from rfdarts_fast.search import search
from rfdarts_fast.search.run import SearchRun


class Interrupt(Exception):
    pass


@pytest.mark.parametrize("changes", [{"levels": 1}, {"levels": 1, "diagnose_every": 1}, {}])
def test_interrupted_and_resumed(tiny_search, tmp_path, monkeypatch, changes):
    changes = {"checkpoint_minutes": 1e-9, "learning_rate": 0.1, **changes}
    whole = tiny_search(out=tmp_path / "whole", **changes)
    search(whole)
    step = SearchRun.train_step

    def interrupted(run, *batch):
        if (run.epoch, run.step) == (1, 2):
            raise Interrupt
        step(run, *batch)

    config = tiny_search(out=tmp_path / "resumed", **changes)
    with monkeypatch.context() as patch, pytest.raises(Interrupt):
        patch.setattr(SearchRun, "train_step", interrupted)
        search(config)
    search(config)
    assert_same_run(config.out, whole.out)
