"""Kernels emulated on any processor: those for CUDA thread by thread, those for AMX tile by tile.

Builds their libraries, the same with a bug, and has their backends.
"""

import importlib.util
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import library
from torch.utils.cpp_extension import TORCH_LIB_PATH, include_paths

from rfdarts_fast.ops.compiled import cpu, cuda, fakes
from tests.kernels.oracles import Kernels
from tests.kernels.problems import NASBENCH201, CellProblem, LayerProblem

CSRC = Path(__file__).resolve().parents[2] / "csrc"
LIBRARY = "emulated.so"
WARNINGS = ["-Wall", "-Wno-unknown-pragmas", "-Wno-psabi"]
FLAGS = ["-O1", "-std=c++20", "-fPIC", "-fvisibility=hidden", *WARNINGS]
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"]


def sources():
    kernels = (CSRC / "sources_cuda.txt").read_text().split()
    return [*kernels, "emulation/cuda.cpp", "bindings/cuda.cpp", "core/cell.cpp"]


def amx_sources():
    others = [source for source in (CSRC / "sources.txt").read_text().split() if "cpu/isa" not in source]
    return [*others, "emulation/amx_bf16.cpp"]


def compiler():
    return shutil.which("g++")


def setup_options():
    """setup.py as a module, anew."""
    spec = importlib.util.spec_from_file_location("setup_options", CSRC.parent / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def find_nvcc():
    """By setup.py's own rules."""
    return setup_options().find_nvcc()


def find_tool(name):
    """cuobjdump or nvdisasm of a CUDA toolkit, or the one that triton brings; None where there is neither."""
    nvcc, triton = find_nvcc(), importlib.util.find_spec("triton")
    found = [Path(path) for path in [shutil.which(name)] if path]
    found += [nvcc.parent / name] if nvcc else []
    found += [Path(triton.origin).parent / "backends/nvidia/bin" / name] if triton else []
    return next((path for path in found if path.is_file()), None)


def resource_usage(library=None):
    """{architecture: {kernel: {REG, STACK, LOCAL, ...}}} of a library's kernels; None without cuobjdump."""
    tool = find_tool("cuobjdump")
    if tool is None:
        return None
    library = library or importlib.util.find_spec("rfdarts_fast.ops._cuda").origin
    command = [str(tool), "-res-usage", str(library)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used, arch = {}, None
    for line in text.splitlines():
        if match := re.match(r"arch = (sm_\d+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            kernel = match[1]
        elif line.strip().startswith("REG:"):
            usage = {name: int(count) for name, count in re.findall(r"([A-Z]+):(\d+)", line)}
            used.setdefault(arch, {})[kernel] = usage
    return used


def compile_one(source, csrc, folder, flags, emulated=True):
    target = folder / (source.replace("/", "_") + ".o")
    includes = [f"-I{csrc}", *(f"-isystem{path}" for path in include_paths())]
    defined = ["-DRFDARTS_EMULATION"] if emulated else []
    command = [compiler(), *FLAGS, *defined, *STABLE_ABI, *flags, *includes, "-x", "c++"]
    subprocess.run([*command, "-c", str(csrc / source), "-o", str(target)], check=True)
    return target


def link(objects, folder, flags=()):
    library = folder / LIBRARY
    command = [compiler(), "-shared", *flags, "-o", str(library), *map(str, objects)]
    subprocess.run([*command, f"-L{TORCH_LIB_PATH}", "-ltorch", "-ltorch_cpu", "-lc10"], check=True)
    return library


def build(folder, flags=(), files=None):
    """The CUDA kernels, unless `files` are other sources."""
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda source: compile_one(source, CSRC, folder, flags), files or sources()))
    return link(objects, folder, flags)


def plant(text, before, after):
    """C++ with `before` replaced, whatever its white space and comments; it must occur exactly once."""
    text = re.sub(r"//.*", "", text)
    tokens = map(re.escape, re.findall(r"\w+|[^\w\s]", before))
    pattern = r"(?<!\w)" + r"\s*".join(tokens) + r"(?!\w)"
    found = len(re.findall(pattern, text))
    assert found == 1, f"expected {before!r} once, found it {found} times"
    return re.sub(pattern, lambda _: after, text)


def mutated(folder, objects, header, before, after, source):
    """The library with one place of a header changed, rebuilt for one source only."""
    csrc = folder / "csrc"
    shutil.copytree(CSRC, csrc)
    (csrc / header).write_text(plant((csrc / header).read_text(), before, after))
    changed = compile_one(source, csrc, folder, ())
    # first, so that the linker takes its copy of what every type has in common
    return link([changed, *(path for path in objects if path.name != changed.name)], folder)


def load(path: Path, name: str):
    """The ops of a library, which has them under this name; once in a process."""
    torch.ops.load_library(str(path))
    for op, fake in fakes.FAKES.items():
        library.register_fake(f"{name}::{op}", fake)
    return getattr(torch.ops, name)


class EmulatedAMXBackend(cpu.CPUBackend):
    """The CPU backend on emulated tiles."""

    name = "emulated AMX"


class EmulatedBackend(cuda.CUDABackend):
    """The CUDA backend for tensors on the CPU."""

    name = "emulated"
    devices = frozenset({"cpu"})

    def unsupported_cell(self, call):
        return self._ops.cuda_missing(0) or cuda.unsupported_anywhere(call) or self.misfit(call, 0)

    def unsupported_layer(self, x, layer):
        return self._ops.cuda_missing(0) or cuda.unsupported_layer_anywhere(x, layer)


class EmulatedKernels(Kernels):
    """The kernels of a library of `build`; a process loads one.

    Attributes:
        orders: of threads, False for that of their numbers and True for a random one.
    """

    def __init__(self, path: Path) -> None:
        self.ops, self.orders = load(path, "rfdarts_emulated"), (False, True)
        super().__init__(EmulatedBackend(self.ops))

    def schedules(self):
        try:
            for shuffled in self.orders:
                self.ops.shuffle(shuffled)
                yield
        finally:
            self.ops.shuffle(False)


def main(path: str, order: str, dtype_name: str) -> None:
    """Measures a library in a process of its own; exits with "too large an error"."""
    from tests.kernels.tolerances import assert_as_good_as_torch

    kernels, dtype = EmulatedKernels(Path(path)), getattr(torch, dtype_name)
    kernels.orders = (order == "shuffled",)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    cells: tuple[dict, ...] = (
        {"channels": 5},
        {"K": 4, "channels": 16, "stride": 2},
        {"channels": 36, "inputs": 1},
    )
    if dtype.itemsize == 2:
        # what tensor cores take: one chunk of channels, two
        cells = {"channels": 16, "inputs": 1}, {"channels": 48, "inputs": 1}
    problems = [(CellProblem, {"nodes": 1, **options}) for options in cells]
    # on tensor cores or not
    problems += [(CellProblem, NASBENCH201 | {"nodes": 2, "channels": 16 if dtype.itemsize == 2 else 5})]
    # several layers, chunks and groups of columns; columns that are no whole group
    for channels in ((80, 96, 32), (7, 6, 4)):
        problems += [(LayerProblem, {"channels": channels, "reduce": reduce}) for reduce in (False, True)]
    for seed, (make, options) in enumerate(problems):
        torch.manual_seed(seed)
        try:
            assert_as_good_as_torch(kernels, make((2, 10, 18), dtype, **options))
        except AssertionError as error:
            sys.exit(f"too large an error with {options}: {error}")


if __name__ == "__main__":
    main(*sys.argv[1:])
