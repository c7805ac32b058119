"""Runs `rfdarts` in several forked processes as torchrun would start them.

A question, see `forked`, is arguments, number of processes, folder of logs, and null or [rank, epoch, step,
signal]: at that position this process sends itself the signal, or for 0 changes a weight. At epoch -1 it is
when it loads its data. RANK in an argument is each process's own number; the argument COMMIT makes each
process say that its package is of a commit of its own, and ALONE is a backend without BatchNorm over several
processes. The answer is the list of exit codes.
"""

import os
import socket
from pathlib import Path

from forked import answer, leave

from rfdarts_fast.ops import backends
from rfdarts_fast.retrain.run import TrainRun
from rfdarts_fast.runs import agreement
from rfdarts_fast.search.run import SearchRun


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def signal_self(run_class, epoch, step, number):
    train_step = run_class.train_step

    def signalling(run, *batch):
        if (run.epoch, run.step) == (epoch, step):
            os.kill(os.getpid(), number)
            if not number:
                run.agreed()[0].data.add_(1)
        train_step(run, *batch)

    run_class.train_step = signalling


def prepare(rank, size, port, arguments, logs, signalled):
    """Makes this process the one of a rank; its arguments."""
    log = os.open(f"{logs}/{rank}.txt", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if size > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if signalled and signalled[0] == rank and signalled[1] < 0:
        from rfdarts_fast.runs import run as run_module

        run_module.load = lambda *_, **__: os.kill(os.getpid(), signalled[3])
    elif signalled and signalled[0] == rank:
        for run_class in (SearchRun, TrainRun):
            signal_self(run_class, *signalled[1:])
    if "COMMIT" in arguments:
        agreement.commit = lambda: f"commit {rank}"
        arguments[arguments.index("COMMIT")] = "contiguous"
    if "ALONE" in arguments:
        backends()["cpu"].synchronises = False
        arguments[arguments.index("ALONE")] = "cpu"
    return [word.replace("RANK", str(rank)) for word in arguments]


def run(arguments, size, logs, signalled=None):
    Path(logs).mkdir(parents=True, exist_ok=True)
    port, children = free_port(), []
    for rank in range(size):
        child = os.fork()
        if not child:
            leave(lambda rank=rank: prepare(rank, size, port, arguments, logs, signalled))
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


if __name__ == "__main__":
    answer(run)
