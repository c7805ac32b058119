"""The largest batch that fits: what is tried, what counts as too large, and that the limit holds."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rfdarts_fast.bench import largest as module
from rfdarts_fast.bench.largest import FIRST, MOST, Tried, largest, largest_batches, try_batch

ROOT = Path(__file__).resolve().parents[2]
SHAPE = {"space": "darts", "size": 8, "channels": 4, "layers": 3, "stem": "cifar", "K": 2, "classes": 4}
NETWORK = "--size 8 --channels 4 --layers 3 --partial-channels 2 --classes 4 --rounds 1 --threads 1"


@pytest.mark.parametrize("fits", [*range(2, 200), 1000, 4095, 4096, 4097, MOST - 1, MOST])
def test_doubling_then_bisection(fits):
    tried = []

    def tries(batch):
        tried.append(batch)
        return Tried(batch, 1.0) if batch <= fits else None

    batch, of_it = largest(tries)
    assert of_it.memory == batch <= fits
    assert fits - batch < max(1, fits / 32)
    assert len(set(tried)) == len(tried) <= 23
    assert max(tried) <= MOST
    doubled = [b for b in tried if b <= fits]
    assert tried[0] == FIRST and all(b <= 2 * max(a, FIRST) for a, b in zip(doubled, tried[1:], strict=False))


@pytest.mark.parametrize("fits", [0, 1])
def test_nothing_fits(fits):
    assert largest(lambda batch: Tried(batch, 1.0) if batch <= fits else None) is None


@pytest.fixture
def step_fails(monkeypatch):
    """Steps of more than 20 images raise this error; the process keeps its own limits."""

    def failing(error):
        def step_of(variant, method, batch, size, **shape):
            def step():
                if batch > 20:
                    raise error
                return 0.0

            return step

        monkeypatch.setattr(module, "step_of", step_of)
        monkeypatch.setattr(module.resource, "setrlimit", lambda *_: None)
        monkeypatch.setattr(module, "_try_alone", try_batch)

    return failing


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        MemoryError("std::bad_alloc"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_lack_of_memory_is_a_batch_that_does_not_fit(step_fails, error):
    step_fails(error)
    table = largest_batches("rf-pcdarts", ["fast"], 10_000.0, "cpu", 1, **SHAPE)
    assert re.search(r"^kernels, fast +20 ", table, re.MULTILINE)


def test_other_errors_end_it(step_fails):
    step_fails(RuntimeError("a kernel's own"))
    with pytest.raises(RuntimeError, match="a kernel's own"):
        largest_batches("rf-pcdarts", ["fast"], 10_000.0, "cpu", 1, **SHAPE)


def test_a_process_that_is_killed_is_a_batch_that_does_not_fit(monkeypatch):
    monkeypatch.setattr(module, "try_batch", os._exit)
    assert module._try_alone(9) is None


BENCHMARK = """
import os, time
from rfdarts_fast.bench.run import own_process
if __name__ == "__main__":
    with own_process({start!r}) as process:
        print(process.submit(os.getpid).result(), flush=True)
        process.submit(time.sleep, 600).result()
"""


@pytest.mark.parametrize("start", ["spawn", "forkserver"])
def test_a_killed_benchmark_leaves_no_process(tmp_path, start):
    program = tmp_path / "benchmark.py"
    program.write_text(BENCHMARK.format(start=start))
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        [sys.executable, program], env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True
    ) as benchmark:
        child = int(benchmark.stdout.readline())
        os.kill(child, 0)
        benchmark.kill()
    until = time.monotonic() + 60
    # a process that nobody waits for yet has ended, too
    while Path(f"/proc/{child}").exists() and "(zombie)" not in Path(f"/proc/{child}/status").read_text():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_limit_of_bytes_on_the_cpu():
    """A step takes no more; one that would is refused memory, in its process."""
    arguments = "eager-cl", "rf-pcdarts", SHAPE, 60_000_000, "cpu"
    small, large = (module._try_alone(batch, *arguments) for batch in (2, 24))
    assert small is not None and large is not None
    assert small.memory < large.memory <= 60_000_000
    assert module._try_alone(60_000, *arguments) is None


def test_the_command(rfdarts, monkeypatch):
    """Every memory mode has a row; the timed process comes last."""
    asked = []

    def alone(batch, variant, *rest):
        asked.append((variant, batch, rest[4:]))
        return Tried(1_000_000 * batch, 0.5) if batch <= (5 if variant == "fast" else 9) else None

    monkeypatch.setattr(module, "_try_alone", alone)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    words = f"bench --largest-batch --memory-limit 30 {NETWORK} --rounds 3 --memory-budgets 0.5".split()
    code, out, err = rfdarts(*words)
    assert code == 0, err
    rows = dict(re.findall(r"^(kernels.*?|reference.*?)  +(\d+ +\d+ +[\d.]+)$", out, re.MULTILINE))
    assert "at most 30 MB" in out
    if "kernels, fast" in rows:
        assert rows["kernels, fast"].split() == ["5", "5", "10.0"]
        assert rows["kernels, recompute"].split() == ["9", "9", "18.0"]
        assert rows["kernels, fast, at most 0.5 MB kept"].split() == ["9", "9", "18.0"]
    assert [rest for _, _, rest in asked].count((3,)) == len(rows) > 0


REFUSED = {
    "limit-alone": ("--memory-limit 5", "--memory-limit: expected None without --largest-batch"),
    "device-alone": ("--device auto", "--device: expected cpu without --largest-batch"),
    "compile": ("--largest-batch --compile", "--compile: expected False with --largest-batch"),
    "limit-zero": ("--largest-batch --memory-limit 0", "--memory-limit: expected a positive number"),
    "device": ("--largest-batch --device cuda:99", "--device: 'cuda:99' cannot be used"),
    "limit-small": ("--largest-batch --memory-limit 1", "--memory-limit: expected enough for a step of 2"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_options_that_do_not_fit(rfdarts, monkeypatch, options, message):
    monkeypatch.setattr(module, "_try_alone", lambda *_: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    code, out, err = rfdarts("bench", *NETWORK.split(), *options.split())
    assert (code, out) == (2, "")
    assert err.startswith(f"rfdarts bench: {message}")
    assert err.count("\n") == 1
