"""Every hostile input gets an answer: a value, or one line of an error that the package defines."""

from collections import Counter

import pytest

from rfdarts_fast.data import DataError
from rfdarts_fast.runs.checkpoint import CheckpointError

from . import case as judge
from .case import Case, failure
from .table import all_cases, failures, table

CASES = all_cases()


@pytest.mark.parametrize("family", dict.fromkeys(case.family for case in CASES))
def test_hostile_inputs(family):
    # a test for each case would take as long as the cases
    results = list(failures(case for case in CASES if case.family == family))
    assert not [case.id for case, wrong in results if wrong], table(results)


def test_the_corpus_is_large_and_its_cases_are_different():
    assert len(CASES) >= 500
    assert not [name for name, n in Counter(case.id for case in CASES).items() if n > 1]


def answer(error=None):
    def run(_):
        if error:
            raise error

    return run


@pytest.mark.parametrize(
    ("run", "accepted", "wrong"),
    [
        (answer(), True, None),
        (answer(), False, "accepted"),
        (answer(DataError("a: no")), False, None),
        (answer(DataError("a: no")), None, None),
        (answer(DataError("a: no")), True, "refused: a: no"),
        (answer(DataError("b: no")), False, "a message without 'a': b: no"),
        (answer(CheckpointError("a" * 2000)), False, "a message of 2000 characters"),
        (answer(ValueError("a: no")), None, "ValueError: a: no"),
        (answer(SystemExit("a")), None, "SystemExit(a)"),
    ],
)
def test_the_judge_of_answers(tmp_path, run, accepted, wrong):
    case = Case("family", "name", run, accepted, "a")
    got = failure(case, tmp_path)
    assert got == wrong if wrong is None else got.startswith(wrong)
    assert table([(case, got)]).splitlines()[1].split() == ["family", "1", *("10" if wrong is None else "01")]


def test_a_parser_that_does_not_end(tmp_path, monkeypatch):
    import time

    monkeypatch.setattr(judge, "SECONDS", 1)
    case = Case("family", "name", lambda _: time.sleep(10), None)
    assert failure(case, tmp_path) == "no answer in 1 s"
