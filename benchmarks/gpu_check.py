"""One command for a machine with a GPU: build, test, sanitize, measure; one JSON. Ends inside nine minutes.

    python -m benchmarks.gpu_check [--out benchmarks/results/gpu_check.json] [--only STAGE ...]

What does not fit in the time is left out and named in the JSON. `--device cpu --quick` tries the script.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_steps import NETWORKS, kernel_times, largest_batch, roofs, time_steps
from rfdarts_fast.runs.environment import environment, version_of

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 8.5 * 60
# a stage is not begun with less time left than this
LEAST = {"tests": 60, "memcheck": 40, "racecheck": 40, "roofs": 10, "kernels": 20, "step": 25, "compile": 60}
LEAST |= {"largest": 45, "triton": 60}
# and none of these takes more
MOST = {"tests": 150, "memcheck": 75, "racecheck": 75, "compile": 150, "triton": 150}
COMPILED = ("RF-PCDARTS", "RF-DARTS")
# of the tests of the Triton backend, those that compile least
TRITON_TESTS = ("tests/kernels/triton/test_cells.py", "-k", "same_dtype or tuned")


def begin(command: list[str], **environment: str) -> subprocess.Popen[str]:
    """In a process group of its own, so that `stop` reaches what it starts."""
    pipe: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **environment}, start_new_session=True, **pipe
    )


def stop(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run(command: list[str], seconds: float, **environment: str) -> dict[str, Any]:
    began = time.monotonic()
    process = begin(command, **environment)
    try:
        output, code = process.communicate(timeout=seconds)[0], process.returncode
    except subprocess.TimeoutExpired:
        stop(process)
        output, code = f"stopped after {seconds:.0f} s", 124
    return {"exit": code, "seconds": round(time.monotonic() - began, 1), "tail": output[-3000:]}


def module(*arguments: str) -> list[str]:
    return [sys.executable, "-m", *arguments]


def versions(device: str) -> dict[str, Any]:
    found = {**environment(), "cuda": torch.version.cuda, "triton": version_of("triton")}
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = run(query, 20)["tail"].strip()
        found["memory_gib"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
    return found


def build(seconds: float) -> dict[str, Any]:
    """Only for the device that is here."""
    major, minor = torch.cuda.get_device_capability()
    options = {"RFDARTS_BUILD_CUDA": "required", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}
    return run([sys.executable, "setup.py", "build_ext", "--inplace"], seconds, **options)


def sanitize(tool: str, seconds: float) -> dict[str, Any] | str:
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).is_file():
        return "compute-sanitizer is not installed"
    # torch's own kernels would take most of the time
    options = ["--tool", tool, "--error-exitcode", "9", "--kernel-name", "kns=rfdarts"]
    options += ["--report-api-errors", "no"] if tool == "memcheck" else []
    return run([sanitizer, *options, *module("benchmarks.gpu_check", "--small-case")], seconds)


def small_case() -> None:
    """For compute-sanitizer: both strides, partial channels, tensor cores, preprocessing; with gradients."""
    from rfdarts_fast.ops import backends
    from tests.kernels.oracles import GPUKernels
    from tests.kernels.problems import CellProblem, LayerProblem

    kernels = GPUKernels(backends()["cuda"], "cuda")
    for dtype in (torch.float32, torch.bfloat16):
        CellProblem((1, 10, 18), dtype, channels=16, nodes=1).run(kernels)
        CellProblem((1, 10, 18), dtype, channels=32, nodes=1, stride=2, K=4).run(kernels)
        for reduce in (False, True):
            LayerProblem((2, 10, 18), dtype, channels=(80, 96), reduce=reduce).run(kernels)


def compiled(name: str, quick: bool, device: str, mode: str, variant: str = "compile") -> list[str]:
    """What times a compiled step, in a process of its own: one that takes too long can be stopped."""
    command = module("benchmarks.gpu_steps", name, "2" if quick else "256", variant)
    return [*command, "--mode", mode, "--device", device, *(["--quick"] if quick else [])]


def compile_times(command: list[str], seconds: float) -> dict[str, Any] | str:
    done = run(command, seconds)
    return (
        done if done["exit"] else {"command": command[2:], "step": json.loads(done["tail"].splitlines()[-1])}
    )


def cases(quick: bool) -> list[tuple[str, int]]:
    """Steps to time, the most telling first."""
    if quick:
        return [(name, 2) for name in NETWORKS]
    small = [(name, batch) for batch in (256, 64, 1024) for name in ("RF-DARTS", "RF-PCDARTS")]
    large = [(name, 256) for name in NETWORKS if "ImageNet" in name]
    return [*small[:4], *large, *small[4:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/gpu_check.json")
    parser.add_argument("--only", nargs="+", help="stages whose names begin so")
    parser.add_argument("--compile-mode", default="default", help="of torch.compile")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="two cells, batch 2")
    parser.add_argument("--small-case", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--built", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    # the seconds that building took, in the process before this one
    device, quick, began = options.device, options.quick, time.monotonic() - (options.built or 0)

    def left() -> float:
        return max(options.seconds - (time.monotonic() - began), 1.0)

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
        again = module("benchmarks.gpu_check", *sys.argv[1:], "--built", str(result["seconds"]))
        os.execv(sys.executable, again)
    report: dict[str, Any] = {**versions(device), "build_s": options.built, "left_out": []}

    def stage(name: str, work: Callable[[float], Any]) -> None:
        """Runs a part if there is time; writes the report after each, so that none is lost."""
        if options.only and not name.startswith(tuple(options.only)):
            return
        kind = name.split()[0]
        if left() < LEAST[kind]:
            report["left_out"].append(name)
        else:
            try:
                report[name] = work(min(left(), MOST.get(kind, left())))
            except Exception as error:  # a stage that breaks must not take the others with it
                report[name] = f"failed: {type(error).__name__}: {error}"
        report["seconds"] = round(time.monotonic() - began, 1)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")
        print(f"{name}: {json.dumps(report.get(name, 'left out'))[-300:]}", flush=True)

    steps = {name: compiled(name, quick, device, options.compile_mode) for name in COMPILED}
    if device == "cuda":
        # compiling takes minutes: it fills its cache while nothing is timed
        warming = [] if options.only else [begin(command) for command in steps.values()]
        stage("tests", lambda most: run(module("pytest", "-q", "tests/kernels/cuda/test_gpu.py"), most))
        for tool in ("memcheck", "racecheck"):
            stage(tool, lambda most, tool=tool: sanitize(tool, most))
        for process in warming:
            stop(process)
    roof = roofs(device, quick)
    stage("roofs", lambda _: roof)
    if device == "cuda":
        for batch in (1024, 64):
            stage(f"kernels batch {batch}", lambda _, batch=batch: kernel_times(batch, device, roof))
    for name, batch in cases(quick):
        work = lambda _, name=name, batch=batch: time_steps(name, batch, device, quick)  # noqa: E731
        stage(f"step {name}, batch {batch}", work)
    for name, command in steps.items():
        stage(f"compile {name}", lambda most, command=command: compile_times(command, most))
    if device == "cuda":
        stage("triton tests", lambda most: run(module("pytest", "-q", *TRITON_TESTS), most))
        for name in COMPILED:
            command = compiled(name, quick, device, options.compile_mode, "triton graph")
            stage(f"triton {name}", lambda most, command=command: compile_times(command, most))
        for name in NETWORKS:
            stage(f"largest {name}", lambda _, name=name: largest_batch(name, device))


if __name__ == "__main__":
    main()
