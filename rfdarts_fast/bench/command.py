"""`rfdarts bench`: its options and what it prints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch

from rfdarts_fast.bench.largest import largest_batches
from rfdarts_fast.bench.run import run, table
from rfdarts_fast.bench.variants import BUDGET, Method, is_nasbench201
from rfdarts_fast.ops import backends
from rfdarts_fast.runs.config import one_of, require, require_positive
from rfdarts_fast.runs.run import choose_device
from rfdarts_fast.spaces import SPACES


@dataclass(frozen=True)
class BenchOptions:
    """Time one search step of a supernet on this machine, variants taking turns, and measure their memory.

    With --largest-batch instead: how large a batch may be in each memory mode.
    """

    method: Literal["rf-darts", "rf-pcdarts"] | None = None
    """Default: rf-pcdarts; for nasbench201 rf-darts, the only one."""
    space: Annotated[str, one_of(SPACES)] = "darts"
    """Search space; nasbench201 goes with rf-darts."""
    batch: int = 64
    """Images in a step."""
    size: int = 32
    """Side of the images in pixels."""
    channels: int = 16
    """Channels of the first cells."""
    layers: int = 8
    """Cells of the supernet; for nasbench201 cells of each of its three stages."""
    stem: Literal["cifar", "imagenet"] = "cifar"
    """First layers; imagenet, with --size 224 and --classes 1000, is the supernet of rf-pcdarts-imagenet."""
    partial_channels: int | None = None
    """K of rf-pcdarts (default: 4)."""
    classes: int = 10
    """Classes of the classifier."""
    rounds: int = 7
    """Turns of every variant; the median is reported."""
    threads: int | None = None
    """CPU threads (default: PyTorch's choice)."""
    compile: bool = False
    """Also torch.compile of each mixed op; its first step takes minutes."""
    memory_budgets: tuple[float, ...] = ()
    """Also these memory budgets in MB, see `rfdarts search --memory-budget`."""
    out: Path | None = None
    """Folder for a JSON file with the figures, the machine and its measured roofs."""
    largest_batch: bool = False
    """Instead: the largest batch that fits into memory, within 3 %, and its images a second: found by
    doubling, then bisection, each batch in a process of its own."""
    memory_limit: float | None = None
    """--largest-batch: MB that a step may take, network and images included (default: what is free)."""
    device: str = "cpu"
    """--largest-batch: cpu, cuda, cuda:1, ...; auto takes a GPU where there is one."""


def benchmark(options: BenchOptions) -> str:
    """Runs a benchmark; its table as text. Raises ConfigError for options that do not fit."""
    require_positive(options, "batch", "size", "channels", "layers", "rounds", "classes", most=65_536)
    for name, most in (("partial_channels", 65_536), ("threads", 4096), ("memory_limit", 10**9)):
        if getattr(options, name) is not None:
            require_positive(options, name, most=most)
    require(
        all(0 <= budget < 10**9 for budget in options.memory_budgets), options, "memory_budgets", "0 or more"
    )
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    partial = not is_nasbench201(options.space)
    method: Method = options.method or ("rf-pcdarts" if partial else "rf-darts")
    require(partial or method == "rf-darts", options, "method", f"rf-darts for {options.space}")
    k = options.partial_channels
    divides = k is None or (method == "rf-pcdarts" and options.channels % k == 0)
    require(
        divides, options, "partial_channels", f"a divisor of {options.channels} channels, with rf-pcdarts"
    )
    require(partial or options.stem == "cifar", options, "stem", f"cifar for {options.space}")
    names = ("space", "size", "channels", "layers", "stem", "classes")
    shape = {**{name: getattr(options, name) for name in names}, "K": k}
    if options.largest_batch:
        return _largest(options, method, shape)
    for name, value in (("memory_limit", None), ("device", "cpu")):
        require(getattr(options, name) == value, options, name, f"{value} without --largest-batch")
    variants = ["eager", "eager-cl", "eager-amp", "eager-cl-amp"]
    if options.compile:
        variants.append("compile")
    if backends()["cpu"].status()["built"]:
        variants += ["fast", "recompute", "bfloat16", "amp", *_budgets(options)]
    return table(run(method, variants, options.batch, rounds=options.rounds, out=options.out, **shape))


def _largest(options: BenchOptions, method: Method, shape: dict) -> str:
    for name, value in (("compile", False), ("out", None)):
        require(getattr(options, name) == value, options, name, f"{value} with --largest-batch")
    device = choose_device(options.device)
    variants = ["eager-cl"]
    if backends()[device.type].status()["built"]:
        variants = ["fast", "recompute", "amp", "recompute-amp", *_budgets(options)]
    return largest_batches(method, variants, options.memory_limit, str(device), options.rounds, **shape)


def _budgets(options: BenchOptions) -> list[str]:
    return [f"{BUDGET}{budget:g}" for budget in options.memory_budgets]
