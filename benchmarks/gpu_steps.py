"""What the stages of gpu_check do in processes of their own; by hand, steps of one network, say:

python -m benchmarks.gpu_steps steps RF-PCDARTS --variants kernels compile --batches 256 64 [--json FILE]

Figures go to the file as they come, so that one that fails takes none of the others with it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor, distributed

from rfdarts_fast import ops
from rfdarts_fast.bench.variants import compile_mixed_ops
from rfdarts_fast.nn import SearchNetwork, freeze_random_features
from rfdarts_fast.ops import backends, synchronised, use_backend
from rfdarts_fast.runs.environment import backend_status, environment, version_of
from rfdarts_fast.runs.files import write_json
from rfdarts_fast.runs.graph import GraphedStep, Recorder
from rfdarts_fast.search.architect import descend, gradients
from rfdarts_fast.search.flat_sgd import FlatSGD
from rfdarts_fast.spaces import get_space

if TYPE_CHECKING:
    from benchmarks.cuda_predicted import Needs

# K, stem, image side
NETWORKS = {
    "RF-DARTS": (1, "cifar", 32),
    "RF-PCDARTS": (4, "cifar", 32),
    "RF-PCDARTS ImageNet K=2": (2, "imagenet", 224),
    "RF-PCDARTS ImageNet K=4": (4, "imagenet", 224),
}
VARIANTS = {
    "eager": "the reference, NCHW",
    "eager channels_last": "the reference",
    "kernels": "the compiled kernels",
    "kernels graph": "the compiled kernels, the whole step in a CUDA graph",
    "triton": "the Triton kernels",
    "triton graph": "the Triton kernels, the whole step in a CUDA graph",
    "compile": "the reference, torch.compile of each mixed op, the whole step in a CUDA graph",
}
Step = Callable[[], object]


class Figures:
    """Figures by kind, in a JSON file that is whole at any time.

    Attributes:
        failed: something raised.
    """

    def __init__(self, path: Path | None) -> None:
        self._path, self._found, self.failed = path, {}, False

    def add(self, kind: str, work: Callable[[], Any], **case: Any) -> None:
        """One more row of a kind: the case and what `work` returns, or its error; without a case, that."""
        try:
            value = work()
        except Exception as error:
            self.failed = True
            value = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
            print(f"{kind} {case}: {value['error']}", file=sys.stderr, flush=True)
        if case:
            self._found.setdefault(kind, []).append({**case, **value})
        else:
            self._found[kind] = value
        if self._path is not None:
            write_json(self._path, self._found)
        print(kind, json.dumps({**case, **value}), flush=True)


def backend_of(variant: str, device: str) -> str:
    return {"kernels": device, "triton": "triton"}.get(variant.split()[0], "reference")


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(work: Step, device: str, least: float = 0.3) -> float:
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


def roofs(device: str, quick: bool = False) -> dict[str, float]:
    """GB/s, read and written, of a large copy; TFLOP/s of large matrix products."""
    size = 1 << (22 if quick else 28)
    a, b = (torch.empty(size, device=device) for _ in range(2))
    n = 256 if quick else 8192
    found = {"copy_gb_s": 8 * size / seconds_of(lambda: b.copy_(a), device) / 1e9}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        x = torch.randn(n, n, device=device, dtype=dtype)
        found[f"matmul_{name}_tflop_s"] = 2 * n**3 / seconds_of(lambda x=x: x @ x, device) / 1e12
    return {name: round(value, 3) for name, value in found.items()}


def make_step(
    name: str, variant: str, batch: int, device: str, quick: bool = False, mode: str = "default"
) -> Step:
    """One gradient to all BatchNorm and architecture parameters, bfloat16 autocast, and the step along it."""
    K, stem, side = NETWORKS[name]
    torch.manual_seed(0)
    layers, side = (2, 32) if quick else (8, side)
    network = SearchNetwork(get_space("darts"), 16, 10, layers, stem, K, edge_norm=K > 1)  # type: ignore[arg-type]
    freeze_random_features(network)
    network.to(device)
    images = torch.randn(batch, 3, side, side, device=device)
    labels = torch.randint(10, (batch,), device=device)
    if variant != "eager":
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = images.contiguous(memory_format=torch.channels_last)
    parameters = [*network.arch_parameters(), *(p for p in network.parameters() if p.requires_grad)]
    if variant == "compile":
        compile_mixed_ops(network, mode)
    optimizer = FlatSGD(parameters, lr=torch.tensor(0.025, device=device), momentum=0.9, fused=True)

    def step(_: str, images: Tensor, labels: Tensor) -> None:
        with torch.autocast(device, torch.bfloat16, cache_enabled=False):
            logits = network(images).float()
        loss = torch.nn.functional.cross_entropy(logits, labels)
        descend(optimizer, parameters, gradients(loss, parameters), 5.0)

    if variant in ("kernels graph", "triton graph", "compile"):
        record = Recorder(torch.device(device)) if device == "cuda" else lambda work: work
        graphed = GraphedStep(step, record, required=True)
        for _ in range(4):
            graphed("step", images, labels)
        return lambda: graphed("step", images, labels)
    return lambda: step("step", images, labels)


def time_step(
    name: str, variant: str, batch: int, device: str, quick: bool = False, mode: str = "default"
) -> dict[str, Any]:
    """Milliseconds of a step and the most memory, GiB; or that it does not fit."""
    began = time.perf_counter()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        with use_backend(backend_of(variant, device)):
            step = make_step(name, variant, batch, device, quick, mode)
            step()
            wait(device)
            first = time.perf_counter() - began
            found = {"ms": round(1e3 * seconds_of(step, device), 3), "until_first_s": round(first, 1)}
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    if device == "cuda":
        found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
    return found


def largest_batch(
    name: str, variant: str, device: str, least: int = 128, most: int = 1 << 15
) -> dict[str, int]:
    """The largest batch, to a sixth, of which a step fits in the device's memory; 0: not even `least` / 2."""

    def fits(batch: int) -> bool:
        torch.cuda.empty_cache()
        try:
            with use_backend(backend_of(variant, device)):
                make_step(name, variant, batch, device)()
                wait(device)
        except torch.OutOfMemoryError:
            return False
        return True

    batch = least
    while batch < most and fits(batch):
        batch *= 2
    # unless it is the first, batch / 2 fits
    parts = 5 * batch // 6, 2 * batch // 3, batch // 2
    return {"batch": next((part for part in parts if fits(part)), 0)}


def kernel_times(batch: int, device: str, roof: dict[str, float]) -> dict[str, Any]:
    """Of each kernel in the first cell's forward and backward, and in the preprocessing's: milliseconds, GB/s
    over the bytes it needs and their share of `roof`'s copy, TFLOP/s."""
    from benchmarks import cuda_predicted
    from tests.kernels.oracles import Kernels
    from tests.kernels.problems import CellProblem, LayerProblem

    kernels = Kernels(backends()["cuda"], device)

    def tensor(*shape: int) -> Tensor:
        x = torch.randn(shape, device=device, dtype=torch.bfloat16)
        return x.contiguous(memory_format=torch.channels_last).requires_grad_()

    found: dict[str, Any] = {}
    for name, (K, stem, _) in NETWORKS.items():
        if stem == "imagenet":
            continue
        problem = CellProblem((1, 2, 2), torch.float32, channels=16, K=K, nodes=4)
        edges, _, weights = problem.leaves(kernels)
        inputs = [tensor(batch, 16, 32, 32) for _ in range(2)]

        def step(edges=edges, inputs=inputs, weights=weights) -> None:
            nodes = kernels.cell(list(edges), inputs, *weights)
            torch.autograd.backward(nodes, [torch.ones_like(node) for node in nodes])

        found[f"{name}, batch {batch}"] = profiled(step, cuda_predicted.cell_needs(K, 16, 32, 1, batch), roof)
    for stride, width in ((1, 16), (2, 32)):
        layers, _, _ = LayerProblem(
            (1, 2, 2), torch.float32, channels=(64, width), reduce=stride == 2
        ).leaves(kernels)
        x = tensor(batch, 64, 32, 32)

        def preprocess(x=x, layers=layers) -> None:
            [out] = kernels.layers(x, [layer.layer() for layer in layers])
            out.backward(torch.ones_like(out))

        needs = cuda_predicted.preprocessing_needs(64, width, 32, stride, batch)
        found[f"preprocessing, stride {stride}, batch {batch}"] = profiled(preprocess, needs, roof)
    return found


def profiled(step: Callable[[], None], needs: Needs, roof: dict[str, float]) -> dict[str, dict[str, float]]:
    """The kernels of a step that `needs` so much; see `kernel_times`."""
    for _ in range(2):
        step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    rows: dict[str, dict[str, float]] = {}
    for kernel, launches in needs.items():
        size = sum(one.bytes for one in launches)
        adds = sum(one.adds + one.tensor_adds for one in launches)
        events = [event for event in profile.key_averages() if kernel in event.key]
        ms = sum(event.device_time_total for event in events) / 1e3
        if not ms:
            continue
        rows[kernel] = {"ms": round(ms, 4)}
        if size:
            speed = size / ms / 1e6
            rows[kernel] |= {"gb_s": round(speed, 1), "of_copy": round(speed / roof["copy_gb_s"], 3)}
            rows[kernel]["tflop_s"] = round(2 * adds / ms / 1e9, 2)
    return rows


def machine() -> dict[str, Any]:
    """What is measured on. Raises RuntimeError without a CUDA device."""
    if not torch.cuda.is_available():
        raise RuntimeError("there is no CUDA device")
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, timeout=20)
    memory = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
    told = {"cuda": torch.version.cuda, "triton": version_of("triton"), "memory_gib": memory}
    return {**environment(), **told, "driver": driver.stdout.strip(), "kernels": backend_status()}


def build() -> None:
    """The CUDA kernels, for the device that is here and no other, in this process's place."""
    major, minor = torch.cuda.get_device_capability()
    options = {"RFDARTS_BUILD_CUDA": "required", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}"}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    os.execve(sys.executable, command, {**os.environ, **options})


def smoke(dtype: torch.dtype) -> dict[str, bool]:
    """Two tiny cells and a layer, forward and backward, by the rule of the tests, and twice the same bits."""
    from tests.kernels.oracles import GPUKernels
    from tests.kernels.problems import NASBENCH201, CellProblem, LayerProblem
    from tests.kernels.tolerances import assert_as_good_as_torch, assert_same_bits

    torch.manual_seed(0)
    kernels = GPUKernels(backends()["cuda"], "cuda")
    for problem in (
        CellProblem((2, 8, 8), dtype, channels=16),
        CellProblem((2, 8, 8), dtype, channels=16, **NASBENCH201),
        LayerProblem((2, 8, 8), dtype, channels=(16, 32)),
    ):
        assert_as_good_as_torch(kernels, problem)
        assert_same_bits(problem.run(kernels), problem.run(kernels))
    return {"passed": True}


@contextlib.contextmanager
def one_of_several_processes() -> Iterator[None]:
    """Synchronised BatchNorms exchange their sums, with nobody."""
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with mock.patch.object(synchronised, "several_processes", lambda: True):
            yield
    finally:
        distributed.destroy_process_group()


def small_case() -> None:
    """For compute-sanitizer: both strides, partial channels, tensor cores, NAS-Bench-201, preprocessing,
    synchronised BatchNorm; with gradients."""
    from tests.kernels.oracles import GPUKernels
    from tests.kernels.problems import NASBENCH201, CellProblem, LayerProblem

    kernels = GPUKernels(backends()["cuda"], "cuda")
    for dtype in (torch.float32, torch.bfloat16):
        # fresh memory as it is: what it is filled with would hide reads of what nobody wrote
        CellProblem((1, 10, 18), dtype, channels=16, nodes=1).run(kernels, poison=False)
        CellProblem((1, 10, 18), dtype, channels=32, nodes=1, stride=2, K=4).run(kernels, poison=False)
        CellProblem((1, 10, 18), dtype, channels=16, **NASBENCH201).run(kernels, poison=False)
        for reduce in (False, True):
            LayerProblem((2, 10, 18), dtype, channels=(80, 96), reduce=reduce).run(kernels, poison=False)
        with one_of_several_processes():
            cell = CellProblem((1, 10, 18), dtype, channels=16, nodes=1)
            ops.synchronise_batch_norms(cell.module)
            cell.run(kernels, poison=False)


def measure(options: argparse.Namespace, figures: Figures) -> None:
    device = options.device
    match options.what:
        case "machine":
            figures.add("machine", machine)
        case "smoke":
            for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                figures.add("smoke", lambda dtype=dtype: smoke(dtype), dtype=str(dtype))
        case "steps":
            for batch in options.batches:
                for variant in options.variants:
                    case = options.network, variant, batch, device, options.two_cells, options.mode
                    named = {"network": options.network, "variant": variant, "batch": batch}
                    figures.add("steps", lambda case=case: time_step(*case), **named)
        case "kernels":
            roof = roofs(device)
            figures.add("roofs", lambda: roof)
            for batch in options.batches:
                figures.add("kernels", lambda batch=batch: kernel_times(batch, device, roof), batch=batch)
        case "largest":
            for variant in ("kernels", "eager channels_last"):
                named = {"network": options.network, "variant": variant}
                figures.add(
                    "largest",
                    lambda variant=variant: largest_batch(options.network, variant, device),
                    **named,
                )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    whats = ("machine", "build", "smoke", "small-case", "steps", "kernels", "largest")
    parser.add_argument("what", choices=whats)
    parser.add_argument("network", nargs="?", choices=NETWORKS, default="RF-PCDARTS")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["kernels"])
    parser.add_argument("--batches", nargs="+", type=int, default=[256])
    parser.add_argument("--mode", default="default", help="of torch.compile")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--two-cells", action="store_true", help="two cells, 32x32")
    parser.add_argument("--json", type=Path, help="where the figures go")
    options = parser.parse_args(arguments)
    figures = Figures(options.json)
    if options.what == "build":
        build()
    elif options.what == "small-case":
        small_case()
    else:
        measure(options, figures)
    return int(figures.failed)


if __name__ == "__main__":
    sys.exit(main())
