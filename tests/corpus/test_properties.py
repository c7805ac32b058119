"""Whatever Hypothesis thinks of, a parser reads or refuses it in one line."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from .parsers import PARSERS, SEEDS, answer
from .strategies import INPUTS


@pytest.mark.parametrize("parser", SEEDS)
def test_good_inputs_are_read(parser, tmp_path):
    for seed in SEEDS[parser]:
        PARSERS[parser](seed, tmp_path)


@pytest.mark.parametrize(
    "examples", [40, pytest.param(2000, marks=pytest.mark.slow)], ids=["quick", "thorough"]
)
@pytest.mark.parametrize("parser", INPUTS)
def test_every_input_is_read_or_refused(parser, examples):
    with tempfile.TemporaryDirectory() as folder:

        @settings(max_examples=examples)
        @given(st.data())
        def check(data):
            content = data.draw(INPUTS[parser])
            assert answer(parser, content, Path(folder)) is None

        check()
