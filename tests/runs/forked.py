"""Programs that run `rfdarts` in forked children, and how tests ask them.

A program of its own, so that a child inherits no threads and no state of pytest, and one that stays, so that
torch is imported once. Each line of stdin is a question, a JSON list; each line of stdout an answer.
"""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from killed import ENVIRONMENT

from rfdarts_fast import cli


@contextlib.contextmanager
def asking(program):
    """A function that asks a program of this folder, which ends with the block."""
    command = [sys.executable, str(Path(__file__).with_name(program))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=ENVIRONMENT, **pipes) as process:

        def ask(*question):
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield ask
        process.stdin.close()


def answer(run):
    """The course of a program: what `run` returns for the values of a question is the answer."""
    torch.set_num_threads(1)
    # see tests/conftest.py
    torch.backends.mkldnn.enabled = torch.backends.cpu.get_cpu_capability() == "AVX512"
    # torch puts off some of its imports to the first optimiser
    torch.optim.SGD([torch.zeros(1)])
    for line in sys.stdin:
        print(json.dumps(run(*json.loads(line))), flush=True)


def leave(prepare, at_end=lambda: None):
    """The end of a child: runs `rfdarts` with the arguments that `prepare` returns, and has its exit code."""
    code = 1
    try:
        sys.argv = ["rfdarts", *prepare()]
        cli.main()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        at_end()
        os._exit(code if isinstance(code, int) else 1)
