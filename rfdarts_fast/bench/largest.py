"""The largest batch of which a step fits into memory: doubling, then bisection, a process for each try."""

from __future__ import annotations

import gc
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import torch

from rfdarts_fast.bench.run import own_process
from rfdarts_fast.bench.variants import Method, label, resident, step_of
from rfdarts_fast.data.memory import available_memory
from rfdarts_fast.runs.config import ConfigError
from rfdarts_fast.runs.run import out_of_memory

# the first batch that is tried, and the last
FIRST, MOST = 2, 65_536
# what a process may take beyond its limit without notice: stacks of threads, heaps that are reserved
_SLACK = 64 << 20


class Tried(NamedTuple):
    """A step that fits.

    Attributes:
        memory: the most bytes that it took, network and images included.
        seconds: median of the timed steps, or of the last one.
    """

    memory: int
    seconds: float


def largest(tries: Callable[[int], Tried | None]) -> tuple[int, Tried] | None:
    """The largest batch that fits, up to 3 %: at least 32 of 33 of what does; None if 2 images do not.

    `tries` gives None for a batch that does not fit.
    """
    best: tuple[int, Tried] | None = None
    batch, low, high = FIRST, 0, MOST + 1
    while batch >= FIRST and high - low > max(1, low // 32):
        tried = tries(batch)
        if tried is None:
            high = batch
        else:
            low, best = batch, (batch, tried)
        batch = (low + high) // 2 if high <= MOST else min(2 * low, MOST)
    return best


def memory_limit(device: torch.device, limit: float | None) -> int:
    """Bytes that a step may take: those given, in MB, or what is free on the device (nine tenths of it on the
    host, which others use, too)."""
    if limit is not None:
        return int(limit * 1e6)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(0.9 * available_memory())


def try_batch(
    batch: int, variant: str, method: Method, shape: dict, limit: int, device: str, rounds: int = 1
) -> Tried | None:
    """Memory and time of a step of this many images, in this process; None if it needs more than `limit`
    bytes. Beyond them the process gets no memory any more, so that the machine's is never used up."""
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(limit / total, 1.0), device)
    else:
        allowed = resident("VmData") + limit + _SLACK * (1 + torch.get_num_threads())
        resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))
    # the code that a step runs is loaded, too
    step_of(variant, method, FIRST, **{**shape, "layers": 1}, device=device)()
    gc.collect()
    idle = resident("VmRSS")
    times = []
    try:
        step = step_of(variant, method, batch, **shape, device=device)
        # the first ones ask for memory, and tell a memory budget what there is to keep
        for _ in range(2 + rounds):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return None
    memory = torch.cuda.max_memory_allocated(device) if on_gpu else resident("VmHWM") - idle
    return Tried(memory, statistics.median(times[2:])) if memory <= limit else None


def _try_alone(*arguments: object) -> Tried | None:
    # forked from a process that has imported torch and done nothing else
    multiprocessing.set_forkserver_preload([__name__])
    with own_process("forkserver") as process:
        try:
            return process.submit(try_batch, *arguments).result()  # type: ignore[arg-type]
        except BrokenProcessPool:
            # killed: a library that gets no memory may end its process
            return None


def largest_batches(
    method: Method, variants: Sequence[str], limit: float | None, device: str, rounds: int, **shape: object
) -> str:
    """A table of each variant's largest batch, with its memory and images a second there.

    Args:
        variants: keys of `VARIANTS` and budgets, as of `run`.
        limit: MB of a step, network and images included; None: what is free on the device.
        rounds: timed steps of the largest batch.
        shape: of the network, as of `run` without its batch.

    Raises:
        ConfigError: if not even two images fit.
    """
    bytes_of_limit = memory_limit(torch.device(device), limit)
    named = ", ".join(f"{name} {value}" for name, value in shape.items() if value is not None)
    threads = f"{torch.get_num_threads()} threads" if device == "cpu" else torch.cuda.get_device_name(device)
    lines = [
        f"{method}, {named}, {device}, {threads}, at most {bytes_of_limit / 1e6:.0f} MB",
        f"{'variant':<48}{'batch':>8}{'memory MB':>11}{'images/s':>10}",
    ]
    for variant in variants:
        arguments = variant, method, shape, bytes_of_limit, device
        best = largest(lambda batch, arguments=arguments: _try_alone(batch, *arguments))  # type: ignore[misc]
        if best is None:
            raise ConfigError(
                f"memory_limit: expected enough for a step of {FIRST} images ({label(variant)}), got "
                f"{bytes_of_limit / 1e6:.0f} MB"
            )
        batch, tried = best
        tried = _try_alone(batch, *arguments, rounds) or tried
        lines.append(
            f"{label(variant):<48}{batch:>8}{tried.memory / 1e6:>11.0f}{batch / tried.seconds:>10.1f}"
        )
    return "\n".join(lines)
