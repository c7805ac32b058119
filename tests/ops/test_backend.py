"""Choosing an engine."""

import pytest

from rfdarts_fast.ops import BackendError, use_backend
from rfdarts_fast.ops.backend import backend_name, fall_back


def test_an_unknown_backend_in_the_environment_is_named(monkeypatch):
    monkeypatch.setattr(use_backend, "name", "cudnn")
    with pytest.raises(BackendError, match=r"RFDARTS_BACKEND: expected one of .*, got 'cudnn'"):
        backend_name()


@pytest.mark.parametrize(("arguments", "named"), [(("cudnn",), "backend"), (("auto", "small"), "memory")])
def test_unknown_names_are_refused(arguments, named):
    with pytest.raises(ValueError, match=f"{named}: expected one of"):
        use_backend(*arguments)


def test_a_block_puts_the_choice_back():
    before = use_backend.name, use_backend.memory
    with use_backend("reference", "recompute"):
        assert (use_backend.name, use_backend.memory) == ("reference", "recompute")
    assert (use_backend.name, use_backend.memory) == before


def test_falling_back_is_told_once_and_raises_where_the_engine_was_named():
    with use_backend("auto"), pytest.warns(RuntimeWarning, match="a reason of its own") as told:
        fall_back("a reason of its own")
        fall_back("a reason of its own")
    assert len(told) == 1
    with use_backend("native"), pytest.raises(BackendError, match="native cannot run: a reason"):
        fall_back("a reason of its own")
