"""The coverage-guided fuzzer finds no wrong answer, and finds one where there is one."""

import subprocess
import sys
from pathlib import Path

import pytest

from .parsers import SEEDS

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


def fuzz(parser, *options, code=""):
    pytest.importorskip("atheris", reason="needs the extra `fuzz`")
    program = f"import sys; sys.argv = ['fuzz', *{[parser, *options]!r}]\n{code}\n"
    program += "from tests.corpus.fuzz import main; main()"
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("parser", SEEDS)
def test_no_input_has_a_wrong_answer(parser, tmp_path):
    done = fuzz(parser, "-max_total_time=15", f"-artifact_prefix={tmp_path}/")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Done" in done.stderr


def test_a_wrong_answer_is_found(tmp_path):
    # a reader of split files that lets one error of another class through
    spoil = "import json; import rfdarts_fast.data.splits as s; s._indices = lambda *_: {}[0]"
    done = fuzz("split", "-max_total_time=60", f"-artifact_prefix={tmp_path}/", code=spoil)
    assert done.returncode != 0
    assert "WrongAnswer" in done.stdout + done.stderr
    assert list(tmp_path.glob("crash-*"))
