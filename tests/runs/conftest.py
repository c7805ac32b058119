"""Fixtures of the tests of run folders."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from interrupted_runs import COMMANDS, Runs
from killed import ENVIRONMENT, OPTIONS, arguments


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
    program = [sys.executable, str(Path(__file__).with_name("killed_runs.py"))]
    log = tmp_path_factory.mktemp("log") / "log.txt"
    with subprocess.Popen(
        program, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:

        def run_all(cases):
            log.write_text("")
            codes = []
            for case in cases:
                arguments, when, number, *stdout = case
                server.stdin.write(json.dumps([arguments, when, number, str(log), *stdout]) + "\n")
                server.stdin.flush()
                code, run_all.calls = map(int, server.stdout.readline().split())
                codes.append(code)
            return codes, log.read_text()

        yield run_all
        server.stdin.close()


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
