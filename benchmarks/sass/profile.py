"""What the warps of a launch issue, scaled from a sample of its blocks; and where in the source."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np

from benchmarks.sass.code import Kernel
from benchmarks.sass.lanes import Size
from benchmarks.sass.machine import Machine
from benchmarks.sass.pipes import (
    MULTIPROCESSORS,
    WAVEFRONT,
    Work,
    classes,
    cycles_of,
)

# of a launch; all 512 of the first cell's convolutions differ by 0.1% at most
BLOCKS = 8


class Launch(NamedTuple):
    """As csrc/emulation writes it down. kernel: its mangled name, anonymous namespaces as g++ has them."""

    kernel: str
    grid: Size
    threads: Size
    shared: int
    params: bytes

    @property
    def name(self) -> str:
        return function_name(self.kernel)

    @property
    def blocks(self) -> int:
        x, y, z = self.grid
        return x * y * z


def function_name(mangled: str) -> str:
    """The last part of _ZN, length, part, length, part, ...: x_kernel of a kernel."""
    rest, name = mangled.removeprefix("_ZN"), mangled
    while match := re.match(r"\d+", rest):
        end = match.end() + int(match[0])
        name, rest = rest[match.end() : end], rest[end:]
    return name


def same_name(mangled: str) -> str:
    """With every anonymous namespace as g++ names it: nvcc names it after the file."""
    match = re.search(r"(\d+)(_GLOBAL__N_)", mangled)
    if not match:
        return mangled
    return mangled[: match.start()] + "12_GLOBAL__N_1" + mangled[match.start(2) + int(match[1]) :]


def sample(grid: Size, most: int) -> list[Size]:
    """Blocks [x, y, z] of a grid, spread over z, then x, and every y; all of them where they are few.

    The first and last of each are among them: borders and what is left over lie there."""
    x, y, z = grid

    def spread(size: int, others: int) -> list[int]:
        few = min(size, max(3, -(-most // others)))
        return [int(i) for i in np.unique(np.linspace(0, size - 1, few).round().astype(int))]

    if x * y * z <= most:
        return [(i, j, k) for k in range(z) for j in range(y) for i in range(x)]
    chosen_z = spread(z, x * y)
    chosen_x = spread(x, y * len(chosen_z))
    return [(i, j, k) for k in chosen_z for j in range(y) for i in chosen_x]


class Profile(NamedTuple):
    """Of one launch, per instruction of its kernel and scaled to all blocks.

    Attributes:
        classes: of instructions, as in `pipes`.
        issued: warp instructions; lanes: active lanes of each on average.
        wavefronts: of shared memory, or lines of global memory; ideal: the former without bank conflicts.
        shared: which instructions access shared memory.
        unknown: share of the accesses whose addresses are data; assumed: as `Machine.assumed`.
        sampled: blocks that were interpreted.
    """

    kernel: Kernel
    launch: Launch
    classes: list[str]
    issued: Any
    lanes: Any
    wavefronts: Any
    ideal: Any
    shared: Any
    sectors: Any
    unknown: float
    assumed: dict[int, int]
    sampled: int

    @property
    def work(self) -> Work:
        issued: dict[str, float] = defaultdict(float)
        cycles: dict[str, float] = defaultdict(float)
        each = zip(self.kernel.instructions, self.classes, self.issued, self.wavefronts, strict=True)
        for one, name, count, wavefronts in each:
            if not count:
                continue
            issued[name] += count
            cycles["issue"] += count
            if name == "shuffle":
                cycles["lsu"] += count * WAVEFRONT
            elif name in ("shared", "global"):
                cycles["lsu"] += wavefronts * WAVEFRONT
            elif cycles_of(one):
                cycles[name] += count * cycles_of(one)
        return Work(dict(issued), dict(cycles), min(MULTIPROCESSORS, self.launch.blocks))


def profiled(kernel: Kernel, launch: Launch, most: int = BLOCKS) -> Profile:
    """Raises SassError for an instruction that control flow depends on and that is not interpreted."""
    blocks = sample(launch.grid, most)
    machine = Machine(kernel, launch.grid, launch.threads, launch.params, blocks)
    machine.run()
    scale = launch.blocks / len(blocks)
    kinds = classes(kernel)
    accesses = machine.issued[np.isin(kinds, ("shared", "global"))].sum()
    unknown = machine.unknown_accesses.sum() / max(accesses, 1)
    return Profile(
        kernel,
        launch,
        kinds,
        machine.issued * scale,
        machine.active / np.maximum(machine.issued, 1),
        machine.wavefronts * scale,
        machine.ideal * scale,
        np.array(kinds) == "shared",
        machine.sectors * scale,
        float(unknown),
        machine.assumed,
        len(blocks),
    )
