"""One command for a machine with a GPU: build, test, sanitize, measure; one JSON. Ends inside nine minutes.

    python -m benchmarks.gpu_check [--out benchmarks/results/gpu_check.json] [--device cuda] [--quick]

What does not fit in the time is left out and named in the JSON. `--device cpu --quick` tries the script.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rfdarts_fast.engine.graph import GraphedStep, Recorder
from rfdarts_fast.nn import SearchNetwork, freeze_random_features
from rfdarts_fast.ops import use_backend
from rfdarts_fast.search.architect import descend, gradients
from rfdarts_fast.spaces import get_space

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 8.5 * 60
# method, K, stem, image side
NETWORKS = {
    "RF-DARTS": (1, "cifar", 32),
    "RF-PCDARTS": (4, "cifar", 32),
    "RF-PCDARTS ImageNet K=2": (2, "imagenet", 224),
    "RF-PCDARTS ImageNet K=4": (4, "imagenet", 224),
}


def run(command: list[str], seconds: float, **environment: str) -> dict[str, Any]:
    began = time.monotonic()
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=seconds,
        )
        code, output = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        code, output = 124, str(error)
    return {"exit": code, "seconds": round(time.monotonic() - began, 1), "tail": output[-3000:]}


def build(seconds: float) -> dict[str, Any]:
    major, minor = torch.cuda.get_device_capability()
    options = {"RFDARTS_BUILD_CUDA": "required", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}
    return run([sys.executable, "setup.py", "build_ext", "--inplace"], seconds, **options)


def sanitize(tool: str, seconds: float) -> dict[str, Any] | str:
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).is_file():
        return "compute-sanitizer is not installed"
    command = [
        sanitizer,
        "--tool",
        tool,
        "--error-exitcode",
        "9",
        sys.executable,
        "-m",
        "benchmarks.gpu_check",
    ]
    return run([*command, "--small-case"], seconds)


def small_case() -> None:
    """For compute-sanitizer: both strides, partial channels, forward and backward."""
    from tests.cuda.emulated import Case

    for options in ({"channels": 16, "nodes": 1}, {"channels": 16, "nodes": 1, "stride": 2, "K": 4}):
        Case((1, 10, 18), torch.float32, **options).kernels()
        Case((1, 10, 18), torch.bfloat16, **options).kernels()


def seconds_of(work: Callable[[], object], device: str, least: float = 0.3) -> float:
    """The median of repeated calls, at least three."""
    work()
    times: list[float] = []
    while len(times) < 3 or sum(times) < least:
        wait(device)
        began = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def roofs(device: str, quick: bool) -> dict[str, float]:
    size = 1 << (22 if quick else 28)
    a, b = (torch.empty(size, device=device) for _ in range(2))
    n = 256 if quick else 8192
    found = {"copy_gb_s": 8 * size / seconds_of(lambda: b.copy_(a), device) / 1e9}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        x = torch.randn(n, n, device=device, dtype=dtype)
        found[f"matmul_{name}_tflop_s"] = 2 * n**3 / seconds_of(lambda x=x: x @ x, device) / 1e12
    return {name: round(value, 3) for name, value in found.items()}


def search_step(name: str, device: str, quick: bool) -> Callable[[Tensor, Tensor], None]:
    K, stem, _ = NETWORKS[name]
    torch.manual_seed(0)
    layers = 2 if quick else 8
    network = SearchNetwork(get_space("darts"), 16, 10, layers, stem, K, edge_norm=K > 1)  # type: ignore[arg-type]
    freeze_random_features(network)
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    parameters = [*network.arch_parameters(), *(p for p in network.parameters() if p.requires_grad)]
    optimizer = torch.optim.SGD(parameters, lr=torch.tensor(0.025, device=device), momentum=0.9, fused=True)

    def step(images: Tensor, labels: Tensor) -> None:
        with torch.autocast(device, torch.bfloat16, cache_enabled=False):
            logits = network(images).float()
        loss = torch.nn.functional.cross_entropy(logits, labels)
        descend(optimizer, parameters, gradients(loss, parameters), 5.0)

    return step


def time_steps(name: str, batch: int, device: str, quick: bool) -> dict[str, Any]:
    """One gradient to all BatchNorm and architecture parameters, bfloat16; milliseconds and GiB."""
    side = 32 if quick else NETWORKS[name][2]
    images = torch.randn(batch, 3, side, side, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch,), device=device)
    found: dict[str, Any] = {}
    for engine in ("reference", "native", "graph"):
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            with use_backend("reference" if engine == "reference" else "auto"):
                step = search_step(name, device, quick)
                call: Callable[[], None] = lambda step=step: step(images, labels)  # noqa: E731
                if engine == "graph":
                    record = Recorder() if device == "cuda" else lambda work: work
                    graphed = GraphedStep(lambda kind, *x, step=step: step(*x), record, required=True)
                    call = lambda graphed=graphed: graphed("step", images, labels)  # noqa: E731
                    for _ in range(4):
                        call()
                found[engine] = {"ms": round(1e3 * seconds_of(call, device), 3)}
        except torch.cuda.OutOfMemoryError:
            found[engine] = "out of memory"
            continue
        if device == "cuda":
            found[engine]["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
    return found


def kernels(batch: int, device: str) -> dict[str, Any]:
    """Milliseconds of each kernel in one RF-DARTS step, and the bandwidth over the bytes it needs."""
    from benchmarks import cuda_predicted
    from rfdarts_fast.ops import cuda
    from tests.cuda import emulated

    found: dict[str, Any] = {}
    for name, K in (("RF-DARTS", 1), ("RF-PCDARTS", 4)):
        edges = list(emulated.make_edges("darts", 16, 1, K, nodes=4).to(device))
        shape = batch, 16, 32, 32
        inputs = [torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2)]
        inputs = [x.contiguous(memory_format=torch.channels_last).requires_grad_() for x in inputs]
        weights = torch.rand(len(edges), 8, device=device, requires_grad=True)
        edge_weights = torch.rand(len(edges), device=device, requires_grad=True) if K > 1 else None

        def step(edges=edges, inputs=inputs, weights=weights, edge_weights=edge_weights) -> None:
            nodes = cuda.mixed_cell(edges, inputs, weights, edge_weights)
            torch.autograd.backward(nodes, [torch.ones_like(node) for node in nodes])

        step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step()
            torch.cuda.synchronize()
        needed: dict[str, float] = {}
        for kernel, size, _ in cuda_predicted.work(K, 16, 32, 1, batch):
            needed[kernel] = needed.get(kernel, 0) + size
        for event in profile.key_averages():
            for kernel in needed:
                if kernel in event.key:
                    row = found.setdefault(f"{name}, batch {batch}", {}).setdefault(kernel, {"ms": 0.0})
                    row["ms"] = round(row["ms"] + event.device_time_total / 1e3, 4)
        for kernel, row in found.get(f"{name}, batch {batch}", {}).items():
            if row["ms"]:
                row["gb_s"] = round(needed[kernel] / row["ms"] / 1e6, 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/gpu_check.json")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--small-case", action="store_true")
    parser.add_argument("--built", type=float, help="the seconds that building for this device took")
    options = parser.parse_args()
    device, began = options.device, time.monotonic() - (options.built or 0)

    def left() -> float:
        return max(BUDGET - (time.monotonic() - began), 1.0)

    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu-check: there is no CUDA device")
    if options.small_case:
        return small_case()
    if device == "cuda" and options.built is None:
        result = build(left())
        print(f"build: exit {result['exit']}, {result['seconds']} s", flush=True)
        if result["exit"]:
            sys.exit(result["tail"])
        # this process has not loaded what was just built
        again = [
            sys.executable,
            "-m",
            "benchmarks.gpu_check",
            *sys.argv[1:],
            "--built",
            str(result["seconds"]),
        ]
        os.execv(sys.executable, again)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": run(["git", "rev-parse", "HEAD"], 10)["tail"].strip(),
        "left_out": [],
    }

    def stage(name: str, needs: float, work: Callable[[], Any]) -> None:
        """Runs a part if `needs` seconds are left; writes the report after each, so that none is lost."""
        if left() < needs:
            report["left_out"].append(name)
        else:
            try:
                report[name] = work()
            except RuntimeError as error:
                report[name] = f"failed: {error}"
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")
        print(f"{name}: {json.dumps(report.get(name, 'left out'))[-300:]}", flush=True)

    if device == "cuda":
        tests = [sys.executable, "-m", "pytest", "-q", "-x", "tests/cuda/test_gpu.py"]
        stage("tests", 60, lambda: run(tests, min(150, left())))
        for tool in ("memcheck", "racecheck"):
            stage(tool, 60, lambda tool=tool: sanitize(tool, min(60, left())))
    stage("roofs", 10, lambda: roofs(device, options.quick))
    if device == "cuda":
        stage("kernels", 20, lambda: {**kernels(64, device), **kernels(1024, device)})
    cases = [(name, batch) for batch in (64, 256, 1024) for name in ("RF-DARTS", "RF-PCDARTS")]
    cases += [(name, 256) for name in NETWORKS if "ImageNet" in name]
    for name, batch in [(name, 2) for name in NETWORKS] if options.quick else cases:
        work = lambda name=name, batch=batch: time_steps(name, batch, device, options.quick)  # noqa: E731
        stage(f"step {name}, batch {batch}", 25, work)


if __name__ == "__main__":
    main()
