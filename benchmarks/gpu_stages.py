"""The stages of gpu_check, in order: what says whether anything runs, figures, sanitizers, the slow ones.

Imports no torch, so that a GPU that hangs cannot keep the check from ending.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from benchmarks.gpu_check import Stage

TRITON_TESTS = ("tests/kernels/triton/test_kernels.py", "-k", "tuned or far_from_zero")
GPU_TESTS = ("tests/kernels/cuda/test_gpu.py",)
QUICK_TESTS = (*GPU_TESTS, "-k", "replayed_steps or every_device or lack_of_memory or without_work")
SMALL, LARGE = ("RF-PCDARTS", "RF-DARTS"), ("RF-PCDARTS ImageNet K=2", "RF-PCDARTS ImageNet K=4")
KERNELS, EAGER = ("kernels", "kernels graph"), ("eager", "eager channels_last")
SANITIZERS = {"memcheck": 60, "racecheck": 60, "synccheck": 40, "initcheck": 40}


def python(*arguments: str) -> tuple[str, ...]:
    return sys.executable, "-u", "-m", *arguments


def measure(*arguments: str) -> tuple[str, ...]:
    return python("benchmarks.gpu_steps", *arguments, "--json", "{json}")


def steps(network: str, variants: tuple[str, ...], batches: tuple[int, ...], device: str) -> tuple[str, ...]:
    small = ("--two-cells",) if device == "cpu" else ()
    chosen = ("--variants", *variants, "--batches", *map(str, batches))
    return measure("steps", network, *chosen, "--device", device, *small)


def sanitizer(tool: str, limit: float) -> Stage:
    """compute-sanitizer over a small case of all kernels. Each allocation is one of the driver's, so that
    accesses beyond a tensor are seen, which torch's cached blocks would hide."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    options = ["--tool", tool, "--error-exitcode", "9"]
    # torch's own kernels would take most of the time, but initcheck has to see what they write
    options += [] if tool == "initcheck" else ["--kernel-name", "kns=rfdarts"]
    options += ["--report-api-errors", "no"] if tool == "memcheck" else []
    command = [program, *options, *python("benchmarks.gpu_steps", "small-case")]
    return Stage(tool, command, limit, least=25, environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def stages(device: str, quick: bool) -> list[Stage]:
    if device == "cpu":
        return [Stage(f"steps {n}", steps(n, (*KERNELS, *EAGER), (2,), device), 120) for n in SMALL]
    found = [Stage("machine", measure("machine"), 120, needed=True)]
    built = any((Path(__file__).parents[1] / "rfdarts_fast/ops").glob("_cuda*.so"))
    # in two minutes only what is not there at all
    if not (quick and built):
        command, limit = python("benchmarks.gpu_steps", "build"), 75 if quick else 150
        found.append(Stage("build", command, limit, needed=not built))
    found.append(Stage("smoke", measure("smoke"), 60, least=15))
    if quick:
        found.append(Stage("tests", python("pytest", "-q", "-x", *QUICK_TESTS), 40))
        found += [
            Stage(f"steps {group} RF-PCDARTS", steps("RF-PCDARTS", variants, (64,), device), 25)
            for group, variants in (("kernels", KERNELS), ("eager", EAGER))
        ]
        return [*found, sanitizer("memcheck", 40)]
    found.append(Stage("tests", python("pytest", "-q", *GPU_TESTS), 90, least=40))
    batches = 256, 64, 1024
    for group, variants in (("kernels", KERNELS), ("eager", EAGER)):
        for name in SMALL:
            command = steps(name, variants, batches, device)
            found.append(Stage(f"steps {group} {name}", command, 45, least=15))
    found.append(Stage("kernels", measure("kernels", "--batches", "1024", "64"), 40, least=20))
    for name in LARGE:
        command = steps(name, (*KERNELS, *EAGER), (256,), device)
        found.append(Stage(f"steps {name}", command, 40, least=20))
    found += [sanitizer(tool, limit) for tool, limit in SANITIZERS.items()]
    for name in SMALL:
        found.append(Stage(f"compile {name}", steps(name, ("compile",), (256,), device), 90, 45))
    found.append(Stage("triton tests", python("pytest", "-q", *TRITON_TESTS), 60, least=40))
    for name in SMALL:
        found.append(Stage(f"triton {name}", steps(name, ("triton graph",), (256,), device), 60, 40))
    for name in (*SMALL, *LARGE):
        found.append(Stage(f"largest {name}", measure("largest", name), 40, least=30))
    return found
