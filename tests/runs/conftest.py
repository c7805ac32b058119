"""Fixtures of the tests of run folders."""

import pytest
from forked import asking
from interrupted_runs import COMMANDS, Runs
from killed import OPTIONS, arguments


@pytest.fixture(scope="session")
def all_runs(tiny_npz, tmp_path_factory):
    """Runs by command."""
    return {command: Runs(command, tiny_npz, tmp_path_factory.mktemp(command)) for command in COMMANDS}


@pytest.fixture(params=COMMANDS)
def runs(request, all_runs):
    return all_runs[request.param]


@pytest.fixture(scope="session")
def run_all(tmp_path_factory):
    """Runs cases (arguments, when, signal[, stdout]) one by one; returns their exit codes and output."""
    log = tmp_path_factory.mktemp("log") / "log.txt"
    with asking("killed_runs.py") as ask:

        def run_all(cases):
            log.write_text("")
            codes = []
            for arguments, when, number, *stdout in cases:
                code, run_all.calls = ask(arguments, when, number, str(log), *stdout)
                codes.append(code)
            return codes, log.read_text()

        yield run_all


@pytest.fixture(scope="session")
def wholes(run_all, tiny_npz, tmp_path_factory):
    """Runs that were left alone, by command, and how many calls each made."""
    wholes = {}
    for command in OPTIONS:
        folder = tmp_path_factory.mktemp("whole") / command
        codes, log = run_all([[arguments(command, tiny_npz, folder), None, 0]])
        assert codes == [0], log
        wholes[command] = folder, run_all.calls
    return wholes


@pytest.fixture(scope="session")
def whole(wholes):
    return {command: folder for command, (folder, _) in wholes.items()}
