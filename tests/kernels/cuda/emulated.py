"""Builds the CUDA kernels for the CPU, and compares what they compute with the reference."""

import copy
import importlib.util
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.cpp_extension import TORCH_LIB_PATH, include_paths

from rfdarts_fast.nn import MixedOp
from rfdarts_fast.ops import reference, use_backend
from rfdarts_fast.ops.compiled import cuda
from rfdarts_fast.spaces import get_space

CSRC = Path(__file__).resolve().parents[3] / "csrc"
WARNINGS = ["-Wall", "-Wno-unknown-pragmas"]
FLAGS = ["-O1", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-DRFDARTS_EMULATION", *WARNINGS]
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"]


def sources():
    kernels = (CSRC / "sources_cuda.txt").read_text().split()
    return [*kernels, "emulation/cuda.cpp", "bindings/cuda.cpp", "core/cell.cpp"]


def compiler():
    return shutil.which("g++")


def find_nvcc():
    """By setup.py's own rules."""
    spec = importlib.util.spec_from_file_location("setup_options", CSRC.parent / "setup.py")
    setup_options = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup_options)
    return setup_options.find_nvcc()


def find_cuobjdump():
    """Of a CUDA toolkit, or the one that triton brings; None where there is neither."""
    nvcc, triton = find_nvcc(), importlib.util.find_spec("triton")
    found = [Path(path) for path in [shutil.which("cuobjdump")] if path]
    found += [nvcc.parent / "cuobjdump"] if nvcc else []
    found += [Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"] if triton else []
    return next((path for path in found if path.is_file()), None)


def resource_usage(library=None):
    """{architecture: {kernel: {REG, STACK, LOCAL, ...}}} of a library's kernels; None without cuobjdump."""
    tool = find_cuobjdump()
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


def compile_one(source, csrc, folder, flags):
    target = folder / (source.replace("/", "_") + ".o")
    includes = [f"-I{csrc}", *(f"-isystem{path}" for path in include_paths())]
    command = [compiler(), *FLAGS, *STABLE_ABI, *flags, *includes, "-x", "c++", "-c", str(csrc / source)]
    subprocess.run([*command, "-o", str(target)], check=True)
    return target


def link(objects, folder, flags=()):
    library = folder / "emulated.so"
    command = [compiler(), "-shared", *flags, "-o", str(library), *map(str, objects)]
    subprocess.run([*command, f"-L{TORCH_LIB_PATH}", "-ltorch", "-ltorch_cpu", "-lc10"], check=True)
    return library


def build(folder, flags=()):
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda source: compile_one(source, CSRC, folder, flags), sources()))
    return link(objects, folder, flags)


def plant(text, before, after):
    """C++ with `before` replaced, whatever white space and comments it has there; it must occur exactly once."""
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


class Emulation(TorchDispatchMode):
    """Inside, the compiled ops are those of a library of `build`: CUDA kernels on the CPU."""

    def __init__(self, library):
        super().__init__()
        torch.ops.load_library(str(library))

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.namespace == "rfdarts":
            function = getattr(torch.ops.rfdarts_emulated, function.overloadpacket.__name__)
        return function(*arguments, **(options or {}))


def make_edges(space="darts", channels=4, stride=1, K=1, inputs=2, nodes=2, **options):
    primitives = iter(get_space(space).cells["reduce" if stride == 2 else "normal"])
    edges = torch.nn.ModuleList()
    for node in range(nodes):
        for j in range(inputs + node):
            edges.append(MixedOp(next(primitives), channels, stride if j < inputs else 1, K, **options))
    for norm in edges.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            if norm.affine:
                torch.nn.init.uniform_(norm.weight, 0.5, 2)
                torch.nn.init.normal_(norm.bias, 0, 0.3)
    for conv in edges.modules():
        if isinstance(conv, torch.nn.Conv2d):
            conv.requires_grad_(False)
    return edges


class Case:
    """One cell with its inputs, in float64, rounded so that `dtype` holds every value exactly."""

    def __init__(self, shape=(2, 6, 6), dtype=torch.float64, inputs=2, train=True, **options):
        self.edges = make_edges(inputs=inputs, **options).to(dtype).double().train(train)
        n, h, w = shape
        channels, count = self.edges[0].channels, len(self.edges)
        self.inputs = [torch.randn(n, channels, h, w).to(dtype).double() for _ in range(inputs)]
        self.weights = torch.randn(count, len(self.edges[0].primitives)).softmax(-1).to(dtype).double()
        self.edge_weights = torch.rand(count).to(dtype).double() if self.edges[0].K > 1 else None
        self.dtype = dtype

    def run(self, engine, dtype, parameters=None, device="cpu", **options):
        """{name: node states, gradients, running statistics}, of the engine computing in `dtype`."""
        parameters = parameters or dtype
        edges = copy.deepcopy(self.edges).to(device, parameters)
        inputs = [x.detach().to(device, dtype).requires_grad_() for x in self.inputs]
        weights = self.weights.detach().to(device, parameters).requires_grad_()
        leaves = {"inputs": inputs, "alphas": [weights]}
        edge_weights = None
        if self.edge_weights is not None:
            edge_weights = self.edge_weights.detach().to(device, parameters).requires_grad_()
            leaves["betas"] = [edge_weights]
        trained = [p for p in edges.parameters() if p.requires_grad]
        leaves["norms"] = trained
        nodes = engine(list(edges), inputs, weights, edge_weights, **options)
        assert all(node.dtype == dtype for node in nodes)
        # every node counts, with another weight at every pixel
        loss = sum((node.double() * wave(node).to(device)).sum() for node in nodes)
        flat = [leaf for group in leaves.values() for leaf in group]
        grads = iter(torch.autograd.grad(loss, flat, allow_unused=True))
        found = {"states": [node.detach() for node in nodes]}
        for name, group in leaves.items():
            found[name] = [grad for _, grad in zip(group, grads, strict=False)]
        found["running"] = [b for b in edges.buffers() if b.is_floating_point()]
        return {name: [x if x is None else x.cpu() for x in group] for name, group in found.items()}

    def reference(self, dtype=torch.float64):
        # or FactorizedReduce would look for compiled kernels
        with use_backend("reference"):
            return self.run(reference.mixed_cell, dtype)

    def kernels(self, dtype=None, **options):
        """On the GPU."""
        dtype = dtype or self.dtype
        return self.run(cuda.mixed_cell, dtype, cuda.parameter_dtype(dtype), device="cuda", **options)

    def emulated(self, dtype=None, **options):
        dtype = dtype or self.dtype
        return self.run(cuda.mixed_cell, dtype, cuda.parameter_dtype(dtype), **options)


def wave(x):
    return torch.linspace(-40, 40, x.numel(), dtype=torch.float64).sin().view_as(x)


def errors(found, expected):
    """{name: relative error}, in the norm over all tensors of a name."""
    result = {}
    for name, group in expected.items():
        gap = norm = 0.0
        for a, b in zip(found[name], group, strict=True):
            assert (a is None) == (b is None), name
            if b is None:
                continue
            assert a.shape == b.shape, name
            gap += (a.double() - b.double()).square().sum().item()
            norm += b.double().square().sum().item()
        result[name] = (gap / norm) ** 0.5 if norm else gap**0.5
    return result


if __name__ == "__main__":
    # compares a library in a process of its own: library, thread order, dtype
    import sys

    from tests.kernels.cuda.convs import ConvCase

    emulation = Emulation(sys.argv[1])
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.ops.rfdarts_emulated.shuffle(sys.argv[2] == "shuffled")
    kind = getattr(torch, sys.argv[3])
    limit = 1e-10 if kind == torch.float64 else 30 * torch.finfo(kind).eps
    cells = {"channels": 5}, {"K": 4, "channels": 16, "stride": 2}, {"channels": 36, "inputs": 1}
    if kind.itemsize == 2:
        # what tensor cores take: one chunk of channels, two
        cells = {"channels": 16, "inputs": 1}, {"channels": 48, "inputs": 1}
    checks = [(Case, {"nodes": 1, **options}) for options in cells]
    # several chunks and groups of columns; columns that are no whole group
    for widths in ((80, 96), (7, 6)):
        checks += [(ConvCase, {"channels": widths, "reduce": reduce}) for reduce in (False, True)]
    for seed, (make, options) in enumerate(checks):
        torch.manual_seed(seed)
        case = make((2, 10, 18), kind, **options)
        with emulation:
            found = case.emulated()
        worst = errors(found, case.reference())
        if kind != torch.float64:
            worst = {name: worst[name] for name in ("states", "running", "inputs")}
        # a NaN is an error too
        if not all(error < limit for error in worst.values()):
            sys.exit(f"too large an error with {options}: {worst}")
