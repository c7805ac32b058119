"""Compiles the Triton kernels for GPUs that need not be there; prints registers and memory of each, as lines
of JSON.

    python -m tests.kernels.triton.ahead [--archs 80 90 100] [--dtypes bfloat16] [--all-tiles]

In a process without TRITON_INTERPRET. The arguments of a kernel are those that cells launch it with.
"""

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from rfdarts_fast.ops import backends
from rfdarts_fast.ops.triton import tuning
from tests.kernels.oracles import Kernels
from tests.kernels.problems import NASBENCH201, CellProblem

# the first two have all kernels, the fourth the branches of a whole cell
CELLS = (
    {"channels": 64, "K": 4, "stride": 2, "inputs": 1, "nodes": 1},
    {"channels": 16, **NASBENCH201},
    {"channels": 16, "K": 4, "stride": 2},
    {"channels": 16, "nodes": 4},
    {"channels": 64, "K": 2, "nodes": 1},
    {"channels": 32, **NASBENCH201},
    {"channels": 64, **NASBENCH201},
    {"channels": 5, **NASBENCH201},
)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class AbsentGPU:
    """A driver of a GPU that is not there: enough of one to compile for it."""

    def __init__(self, arch):
        self.arch = arch

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

    def get_current_stream(self, device=None):
        return 0

    def get_current_device(self):
        # Triton keeps compiled kernels by device
        return self.arch


class AbsentKernels(Kernels):
    """The backend with tensors on the CPU: no kernel is to run."""

    def cell(self, *arguments, **options):
        return self.backend.mixed_cell(self.call(*arguments, **options))


def launches(dtype, cells):
    """{(kernel, constants): all arguments} of all kernels that cells launch."""
    recorded = {}

    def record(kernel, grid, **arguments):
        names = {parameter.name for parameter in kernel.fn.params if parameter.is_constexpr}
        constants = tuple((name, value) for name, value in arguments.items() if name in names)
        recorded.setdefault((kernel, constants), arguments)

    tuning.launch = record
    for options in cells:
        CellProblem((2, 8, 8), dtype, **options).run(AbsentKernels(backends()["triton"]), poison=False)
    return recorded


def compiled(kernel, arguments, tile, warps):
    """Registers, bytes of stack (where spilled registers go) and of shared memory, as cuobjdump tells."""
    options = {"num_warps": warps, "enable_fp_fusion": True} | tuning.registers(kernel, arguments)
    made = kernel.fn.warmup(**arguments, TILE=tile, **options, grid=(1,))
    assert made.metadata.target == driver.active.get_current_target()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {name.lower(): int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")}
    return used | {"shared": made.metadata.shared}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--archs", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--all-tiles", action="store_true")
    parser.add_argument("--tile", type=int, default=tuning.TILE)
    parser.add_argument("--warps", type=int, default=tuning.WARPS)
    parser.add_argument("--cells", type=int, default=len(CELLS), help="how many of CELLS")
    parser.add_argument("--only", default="", help="pattern of a kernel's name and constants")
    options = parser.parse_args()
    for dtype in options.dtypes:
        recorded = launches(getattr(torch, dtype), CELLS[: options.cells])
        for arch in options.archs:
            driver.set_active(AbsentGPU(arch))
            for (kernel, constants), arguments in recorded.items():
                tiles = [(config.kwargs["TILE"], config.num_warps) for config in kernel.configs]
                if not options.all_tiles:
                    tiles = [(options.tile, options.warps)]
                for tile, warps in tiles:
                    values = [f"TILE={tile}", *(f"{name}={value}" for name, value in constants)]
                    variant = " ".join([kernel.fn.__name__, *values])
                    if not re.search(options.only, variant):
                        continue
                    row = {"kernel": kernel.fn.__name__, "dtype": dtype, "arch": arch, "tile": tile}
                    row |= {"warps": warps} | compiled(kernel, arguments, tile, warps)
                    print(json.dumps(row | {"variant": variant}), flush=True)


if __name__ == "__main__":
    main()
