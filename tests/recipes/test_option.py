"""CONTRIBUTING's recipe for an option, followed to the letter in a copy of the package."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from rfdarts_fast.runs.run_folder import to_plain
from rfdarts_fast.search import search

ROOT = Path(__file__).parents[2]


def apply(diff, folder):
    """Replaces the lines of each hunk, which must occur once, in the file named above it."""
    for file in re.split(r"^--- ", diff, flags=re.MULTILINE)[1:]:
        name, *hunks = re.split(r"\n@@\n", file.removesuffix("\n"))
        text = (folder / name).read_text()
        for hunk in hunks:
            lines = hunk.splitlines()
            before, after = (
                "\n".join(line[1:] for line in lines if not line.startswith(mark)) + "\n" for mark in "+-"
            )
            assert text.count(before) == 1, f"{name} has changed: the recipe's lines are not there\n{before}"
            text = text.replace(before, after)
        (folder / name).write_text(text)


# the tests of the recipe; a folder from before; the same with another value of the option
FOLLOW = """
import sys, pytest
from rfdarts_fast import cli
files = "tests/search/test_search_options.py", "tests/cli/test_errors.py"
assert pytest.main(["-q", *files, "-k", "arch_beta or arch-beta"]) == 0
sys.argv[0] = "rfdarts"
cli.main()
sys.argv += ["--arch-beta", "0.9"]
cli.main()
"""


def test_an_option(tiny_search, tmp_path):
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("rfdarts_fast", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    section = (ROOT / "CONTRIBUTING.md").read_text().partition("\n## Add an option\n")[2]
    apply(re.search(r"```diff\n(.*?)```", section, re.DOTALL).group(1), tmp_path)

    config = tiny_search(out=tmp_path / "run", space="s2", layers=1, epochs=1, backend="reference")
    search(config)
    files = {path.name: path.read_bytes() for path in config.out.iterdir() if path.name != "environment.json"}
    options = tmp_path / "options.yaml"
    options.write_text(json.dumps(to_plain(config)))
    command = [sys.executable, "-c", FOLLOW, "search", "--config", options]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert re.search(r"^2 passed", run.stdout, re.MULTILINE), run.stdout
    assert str(config.out / "genotype.json") in run.stdout, run.stderr
    assert "belongs to another run: arch_beta is 0.5 there and 0.9 here" in run.stderr
    assert run.returncode == 2
    for name, content in files.items():
        assert (config.out / name).read_bytes() == content
