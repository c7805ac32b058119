"""Compiles the Triton kernels for GPUs that need not be there, and prints what each uses, one JSON a line.

    python -m tests.triton_kernels.ahead [--archs 80 90 100] [--dtypes bfloat16] [--all-tiles | --tile 1024]

In a process without TRITON_INTERPRET. The arguments of a kernel are those that cells launch it with.
"""

import argparse
import json
import re
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rfdarts_fast.ops import triton as engine
from rfdarts_fast.ops.triton import cell, tuning
from tests.cuda.emulated import Case

NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
NAMES |= {torch.int32: "i32", torch.uint8: "u8"}
# the first one has all kernels
CELLS = (
    {"channels": 64, "K": 4, "stride": 2, "inputs": 1, "nodes": 1},
    {"channels": 16, "K": 4, "stride": 2},
    {"channels": 16},
    {"channels": 64, "K": 2, "nodes": 1},
)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def describe(argument):
    """The type of an argument and what Triton assumes of it."""
    if isinstance(argument, torch.Tensor):
        return f"*{NAMES[argument.dtype]}", True
    if argument == 1:
        return "constexpr", False
    return ("i32" if argument < 2**31 else "i64"), argument % 16 == 0


def launches(dtype, cells):
    """(kernel, arguments' types, constants) of all kernels that cells launch, each once for all its
    constants."""
    found = {}

    def record(kernel, grid, *arguments, **constants):
        types = tuple(describe(a) for a in arguments)
        found.setdefault((kernel, tuple(constants.items())), types)

    cell.launch = record
    for options in cells:
        parameters = torch.float64 if dtype == torch.float64 else torch.float32
        Case((2, 8, 8), dtype, **options).run(engine.mixed_cell, dtype, parameters)
    return [(kernel, types, constants) for (kernel, constants), types in found.items()]


def compile_one(function, types, constants, arch, tile, warps):
    """Registers, bytes of stack and of local memory, and shared memory of a kernel."""
    constants = dict(constants) | {"TILE": tile}
    names = [p.name for p in function.params]
    signature, values, attributes = {}, {}, {}
    for i, (name, (kind, divisible)) in enumerate(zip(names, types, strict=False)):
        signature[name] = kind
        if kind == "constexpr":
            values[i,] = 1
        elif divisible:
            attributes[i,] = [["tt.divisibility", 16]]
    for i, name in enumerate(names[len(types) :], len(types)):
        signature[name] = "constexpr"
        values[i,] = constants[name]
    source = ASTSource(fn=function, signature=signature, constexprs=values, attrs=attributes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        target = GPUTarget("cuda", arch, 32)
        compiled = triton.compile(source, target=target, options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = ("REG", "STACK", "LOCAL")
    used = {name.lower(): int(re.search(rf"{name}:(\d+)", usage)[1]) for name in names}
    return used | {"shared": compiled.metadata.shared}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--archs", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--all-tiles", action="store_true")
    parser.add_argument("--tile", type=int, default=tuning.TILE)
    parser.add_argument("--cells", type=int, default=len(CELLS), help="how many of CELLS")
    parser.add_argument("--only", default="", help="part of a kernel's name")
    options = parser.parse_args()
    tiles = tuning.TILES if options.all_tiles else [(options.tile, tuning.WARPS)]
    for dtype in options.dtypes:
        for kernel, types, constants in launches(getattr(torch, dtype), CELLS[: options.cells]):
            if options.only not in kernel.fn.__name__:
                continue
            for arch in options.archs:
                for tile, warps in tiles:
                    used = compile_one(kernel.fn, types, constants, arch, tile, warps)
                    shown = {name: str(value) for name, value in constants}
                    row = {
                        "kernel": kernel.fn.__name__,
                        "dtype": dtype,
                        "arch": arch,
                        "tile": tile,
                        "warps": warps,
                    }
                    print(json.dumps(row | used | {"constants": shown}), flush=True)


if __name__ == "__main__":
    main()
