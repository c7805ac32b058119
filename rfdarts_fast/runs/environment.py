"""The machine that a run runs on: versions, hardware, kernels."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import rfdarts_fast
from rfdarts_fast.ops import backends

_OPTIONAL = {
    "torchvision": "data sets cifar10, cifar100, svhn (pip install 'rfdarts_fast[vision]')",
    "tensorboard": "event files of a run (pip install 'rfdarts_fast[log]')",
    "nats_bench": "official tables of NAS-Bench-201 (pip install 'rfdarts_fast[nasbench]')",
    "matplotlib": "figures of `rfdarts show` and `study` (pip install 'rfdarts_fast[report]')",
    "submitit": "`rfdarts study` (pip install 'rfdarts_fast[cluster]')",
    "webdataset": "tar shards of `rfdarts cache` (pip install 'rfdarts_fast[webdataset]')",
    "onnxruntime": "`rfdarts export --onnx` (pip install 'rfdarts_fast[export]')",
    "safetensors": "`rfdarts export --safetensors` (pip install 'rfdarts_fast[export]')",
    "timm": "rfdarts_fast.export.timm (pip install 'rfdarts_fast[timm]')",
    "triton": "GPU kernels in Triton (pip install 'rfdarts_fast[triton]')",
}


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of a source checkout, `-dirty` if it was changed; None in an installed package."""
    root = Path(rfdarts_fast.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def version_of(package: str) -> str | None:
    """Installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment() -> dict[str, Any]:
    """The machine, the versions and the command as JSON values."""
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "rfdarts_fast": rfdarts_fast.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def backend_status() -> dict[str, str]:
    """The facts about each registered backend, as text."""

    def text(fact: str, value: str | bool) -> str:
        return f"{fact}: {value}" if isinstance(value, str) else f"{'' if value else 'not '}{fact}"

    return {
        f"{name} kernels": ", ".join(text(*fact) for fact in backend.status().items())
        for name, backend in backends().items()
    }


def optional_packages() -> dict[str, str]:
    """Optional package -> its version, or what is missing without it."""
    return {name: version_of(name) or f"not installed; needed for {use}" for name, use in _OPTIONAL.items()}
