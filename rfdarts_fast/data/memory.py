"""The memory that this process may use."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def available_memory() -> float:
    """Bytes that are free here, or that the process or its container may use if those are fewer.

    Infinite where nothing tells.
    """
    amounts = [math.inf]
    with contextlib.suppress(OSError, ValueError):
        meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        amounts.append(1024 * int(meminfo["MemAvailable"].split()[0]))
    with contextlib.suppress(ImportError):
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        amounts += [limit] if limit != resource.RLIM_INFINITY else []
    for file in _CGROUP_LIMITS:
        # "max" is no number
        with contextlib.suppress(OSError, ValueError):
            amounts.append(int(Path(file).read_text()))
    return min(amounts)


def gigabytes(amount: float) -> str:
    return f"{amount / 1e9:.3g} GB"
