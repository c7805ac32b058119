"""GitHub's workflows and pre-commit run what the Makefile and the package have, on every supported Python."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = {
    path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github/workflows").glob("*.yml")
}


def commands(workflow):
    return [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]


def test_every_supported_python_is_tested():
    pythons = WORKFLOWS["test"]["jobs"]["test"]["strategy"]["matrix"]["python"]
    oldest = re.search(r'requires-python = ">=(.+)"', (ROOT / "pyproject.toml").read_text())[1]
    first, last = (int(version.split(".")[1]) for version in (oldest, pythons[-1]))
    assert pythons == [f"3.{minor}" for minor in range(first, last + 1)]
    assert WORKFLOWS["wheel"]["jobs"]["install"]["strategy"]["matrix"]["python"] == [pythons[0], pythons[-1]]


@pytest.mark.parametrize("name", sorted(WORKFLOWS))
def test_jobs_run_what_there_is(name):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    build = (ROOT / "setup.py").read_text()
    for job in WORKFLOWS[name]["jobs"].values():
        assert job["runs-on"] == "ubuntu-latest"
        for variable, value in job.get("env", {}).items():
            # YAML reads a bare off as False
            assert f'"{variable}"' in build and value in ("auto", "required", "off")
    for command in commands(WORKFLOWS[name]):
        if command.startswith("make "):
            assert command.split()[1] in targets, command


def test_lint_tests_and_documentation_are_run():
    run = [command.split()[1] for command in commands(WORKFLOWS["test"])]
    assert run == ["lint", "test", "docs"]


def test_pre_commit_runs_the_linter_of_make_lint():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    entries = [hook["entry"] for repo in config["repos"] for hook in repo["hooks"]]
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert [entry.split()[1] for entry in entries] == re.findall(r"ruff (\w+)", lint)
