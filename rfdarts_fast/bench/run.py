"""Interleaved timing, PyTorch in one process and the kernels in another, a table and a JSON file."""

from __future__ import annotations

import gc
import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from rfdarts_fast.bench.roofs import machine_roofs, step_counts
from rfdarts_fast.bench.variants import (
    BUDGET,
    PLAIN,
    VARIANTS,
    Method,
    Stem,
    check_method,
    is_nasbench201,
    label,
    resident,
    step_of,
)
from rfdarts_fast.ops import backends
from rfdarts_fast.runs.environment import environment
from rfdarts_fast.runs.files import write_json


@dataclass
class Result:
    """One variant's figures.

    Attributes:
        seconds, best: median and least of a step.
        cpu_seconds: least of a step, over all threads; a busy machine distorts them least.
        memory: bytes above the idle process.
        loss: of the first step.
        first_step: its seconds.
    """

    variant: str
    seconds: float
    best: float
    cpu_seconds: float
    images_per_second: float
    memory: int | None
    loss: float
    first_step: float


def run(
    method: Method = "rf-darts",
    variants: Sequence[str] = ("eager", "eager-cl", "fast", "recompute", "bfloat16", "amp"),
    batch: int = 64,
    size: int = 32,
    channels: int = 16,
    layers: int = 8,
    space: str = "darts",
    rounds: int = 7,
    out: Path | None = None,
    stem: Stem = "cifar",
    K: int | None = None,
    classes: int = 10,
) -> dict:
    """Times one step of a supernet, variants taking turns `rounds` times, so that a busy minute hits all.
    PyTorch and the kernels have a process each: the heap that PyTorch's gigabytes leave slows the kernels.
    Memory is measured in one more process for each variant.

    Args:
        method: "rf-darts" or "rf-pcdarts".
        stem, K, classes: as of `variants.make_network`.
        layers: cells; of NAS-Bench-201 those of each stage.
        variants: keys of `VARIANTS`, "compile" takes minutes before its first step; "budget-100" is "fast"
            with a memory budget of 100 MB.
        out: folder for a JSON file with the results, the machine, its roofs and versions.

    Returns:
        The report, as the JSON file holds it; `table` prints it.

    Raises:
        ValueError: for a variant that does not exist or that this machine cannot run, and for partial
            channels in NAS-Bench-201.
    """
    status = backends()["cpu"].status()
    for variant in variants:
        if variant not in VARIANTS and not variant.startswith(BUDGET):
            raise ValueError(f"variant: expected one of {', '.join(VARIANTS)}, got {variant!r}")
        if variant not in PLAIN and not status["built"]:
            raise ValueError(f"variant: {variant} needs the compiled kernels: {status['reason']}")
    check_method(method, space)
    shape = {"batch": batch, "size": size, "channels": channels, "layers": layers, "space": space}
    shape |= {"stem": stem, "K": K, "classes": classes}
    turns: dict[str, list[tuple[float, float]]] = {variant: [] for variant in variants}
    peaks: dict[str, int | None] = {}
    for variant in variants:
        with own_process() as alone:
            # compiling takes more memory than any step
            skip = variant == "compile"
            peaks[variant] = None if skip else alone.submit(_memory, variant, method, shape).result()
    with own_process() as torch_only, own_process() as kernels:
        workers = {v: torch_only if v in PLAIN else kernels for v in variants}
        started = {v: workers[v].submit(_start, v, method, shape).result() for v in variants}
        for _ in range(rounds):
            for variant in variants:
                turns[variant].append(workers[variant].submit(_timed_step, variant).result())
    results = []
    for variant in variants:
        seconds, cpu_seconds = zip(*turns[variant], strict=True)
        median = statistics.median(seconds)
        times = median, min(seconds), min(cpu_seconds), batch / median
        results.append(asdict(Result(variant, *times, peaks[variant], *started[variant])))
    report = {
        "method": method,
        **shape,
        "dtype": "float32",
        **environment(),
        "kernels": status,
        "rounds": rounds,
        "load": os.getloadavg()[0],
        "roofs": machine_roofs(),
        "counts": step_counts(method, **shape),  # type: ignore[arg-type]
        "results": results,
    }
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        name = f"step-{space}-{method}-{time.strftime('%Y%m%d-%H%M%S')}.json"
        write_json(out / name, report)
    return report


def table(report: dict) -> str:
    """The report as text: one line per variant, ratios against the best eager layout: that of float32, under
    autocast of both."""
    eager = [r for r in report["results"] if r["variant"].startswith("eager")]

    def best(figure: str, amp: bool) -> float | None:
        like = (r[figure] for r in eager if r[figure] and (amp or not r["variant"].endswith("amp")))
        return min(like, default=None)

    roofs, counts = report["roofs"], report["counts"]
    lines = [
        f"{report['method']}, space {report['space']}, batch {report['batch']}, {report['size']}x"
        f"{report['size']}, C={report['channels']}, {report['layers']} cells"
        f"{' a stage' * is_nasbench201(report['space'])}{_unusual(report)}, {report['threads']} threads, "
        f"kernels: {report['kernels'].get('isa', 'none')}, load {report['load']:.1f}",
        f"roofs: {roofs['gflops']:.0f} GFLOP/s, {roofs['gbytes']:.1f} GB/s; mixed ops alone: "
        f"{counts['flops'] / 1e9:.1f} GFLOP = {counts['flops'] / roofs['gflops'] / 1e9:.3f} s, "
        f"{counts['bytes'] / 1e9:.2f} GB branch outputs = {counts['bytes'] / roofs['gbytes'] / 1e9:.3f} s",
        f"{'variant':<48}{'step s':>8}{'best':>8}{'images/s':>10}{'ratio':>7}"
        f"{'CPU s':>8}{'ratio':>7}{'memory MB':>11}{'ratio':>7}{'GFLOP/s':>9}{'GB/s':>7}",
    ]
    for r in report["results"]:
        amp = r["variant"].endswith("amp")
        fastest, least_cpu, smallest = (best(name, amp) for name in ("seconds", "cpu_seconds", "memory"))
        speed = f"{fastest / r['seconds']:.1f}" if fastest else ""
        less_cpu = f"{least_cpu / r['cpu_seconds']:.1f}" if least_cpu else ""
        memory = f"{r['memory'] / 1e6:.0f}" if r["memory"] else ""
        less = f"{smallest / r['memory']:.1f}" if smallest and r["memory"] else ""
        # eager operators move more
        kernels = r["variant"] not in PLAIN
        half = r["variant"] == "bfloat16" or r["variant"].endswith("amp")
        moved = counts["bytes"] * (0.5 if half else 1) / r["seconds"] / 1e9
        lines.append(
            f"{label(r['variant']):<48}{r['seconds']:>8.3f}{r['best']:>8.3f}{r['images_per_second']:>10.1f}"
            f"{speed:>7}{r['cpu_seconds']:>8.2f}{less_cpu:>7}{memory:>11}{less:>7}"
            f"{counts['flops'] / r['seconds'] / 1e9:>9.1f}" + (f"{moved:>7.1f}" if kernels else "")
        )
    return "\n".join(lines)


def _unusual(report: dict) -> str:
    """The network's options that are not as of CIFAR-10, in words."""
    stem, k, classes = (report.get(name) for name in ("stem", "K", "classes"))
    words = [f"{stem} stem"] if stem not in (None, "cifar") else []
    words += [f"K={k}"] if k else []
    words += [f"{classes} classes"] if classes not in (None, 10) else []
    return "".join(f", {word}" for word in words)


def own_process(start: Literal["spawn", "forkserver"] = "spawn") -> ProcessPoolExecutor:
    """A fresh process of as many threads as this one has; it ends with this one, however that is killed."""
    context = multiprocessing.get_context(start)
    return ProcessPoolExecutor(1, context, _begin, (torch.get_num_threads(),))


def _begin(threads: int) -> None:
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    # a pool's process would wait for its next call for ever
    parent.join()
    os._exit(1)


def _memory(variant: str, method: Method, shape: dict) -> int:
    """The most bytes that two steps took."""
    step = step_of(variant, method, **shape)
    gc.collect()
    idle = resident("VmRSS")
    step()
    step()
    return resident("VmHWM") - idle


_steps: dict[str, Callable[[], float]] = {}


def _start(variant: str, method: Method, shape: dict) -> tuple[float, float]:
    """Loss and seconds of a variant's first step."""
    _steps[variant] = step_of(variant, method, **shape)
    start = time.perf_counter()
    loss = _steps[variant]()
    first = time.perf_counter() - start
    # as timeit: a collection would fall on any step
    gc.collect()
    gc.disable()
    return loss, first


def _timed_step(variant: str) -> tuple[float, float]:
    start, start_cpu = time.perf_counter(), time.process_time()
    _steps[variant]()
    return time.perf_counter() - start, time.process_time() - start_cpu
