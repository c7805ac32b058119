"""Fixtures of the tests of run folders."""

import pytest
from interrupted_runs import COMMANDS, Runs


@pytest.fixture(scope="session")
def all_runs(tiny_npz, tmp_path_factory):
    """Runs by command."""
    return {command: Runs(command, tiny_npz, tmp_path_factory.mktemp(command)) for command in COMMANDS}


@pytest.fixture(params=COMMANDS)
def runs(request, all_runs):
    return all_runs[request.param]
