"""Microbenchmarks of every op on every backend and device here, at the shapes of the supernets.

    pytest benchmarks/test_kernels.py --benchmark-enable --benchmark-json=FILE [-k "cpu or eager"]

Nothing asserts a time. Each benchmark's extra_info has the operations and bytes that the op needs at least,
what its median makes of them, and the share of this machine's measured roofs. Two commits are compared by two
such files: `pytest-benchmark compare BEFORE AFTER --columns=median,iqr --group-by=name`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rfdarts_fast.bench.roofs import machine_roofs
from rfdarts_fast.ops import BatchNormBackend, backends, reference
from rfdarts_fast.runs.environment import environment
from rfdarts_fast.spaces import DARTS_PRIMITIVES, SPACES
from tests.kernels.oracles import Kernels, Oracle
from tests.kernels.problems import CellProblem, LayerProblem, NormProblem, Problem
from tests.kernels.views import channels_last

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH = 64
BYTES = 4

# of the cells of each supernet with 16 initial channels
SUPERNETS: dict[str, dict[str, Any]] = {
    "rf-darts": dict(primitives=DARTS_PRIMITIVES),
    "rf-pcdarts": dict(primitives=DARTS_PRIMITIVES, K=4),
    "nasbench201": dict(primitives=SPACES["nasbench201"].cells["cell"][0], batch_norm=False),
}
# channels and size of the three resolutions of 32x32 images, and of ImageNet's behind PC-DARTS's stem
CIFAR = ((16, 32), (32, 16), (64, 8))
IMAGENET = ((16, 28), (32, 14), (64, 7))
CELLS = [
    pytest.param(name, channels, size, 1, id=f"{name}-{data}-{channels}x{size}")
    for data, shapes in (("cifar", CIFAR), ("imagenet", IMAGENET))
    for name in (SUPERNETS if data == "cifar" else ("rf-pcdarts",))
    for channels, size in shapes
]
CELLS += [
    pytest.param(name, channels, size, 2, id=f"{name}-cifar-{channels}x{size}-reduction")
    for name in ("rf-darts", "rf-pcdarts")
    for channels, size in CIFAR[1:]
]
LAYERS = {
    "64-16x32": dict(channels=(64, 16), size=32),
    "128-32x16": dict(channels=(128, 32), size=16),
    "256-64x8": dict(channels=(256, 64), size=8),
    "imagenet, 64-16x28": dict(channels=(64, 16), size=28),
    "reduction, 64-32x32": dict(channels=(64, 32), size=32, reduce=True),
}


class Compiled(Oracle):
    """The reference, each edge and layer compiled."""

    def cell(self, edges, inputs, op_weights, edge_weights=None) -> list[Tensor]:
        compiled = [torch.compile(edge, dynamic=False) for edge in edges]
        return super().cell(compiled, inputs, op_weights, edge_weights)

    def layers(self, x, layers) -> list[Tensor]:
        compiled = torch.compile(reference.relu_conv_bn, dynamic=False)
        return [compiled(x, *layer) for layer in layers]

    def batch_norm(self, x, norm, relu) -> Tensor:
        return torch.compile(super().batch_norm, dynamic=False)(x, norm, relu)


# the reference in both layouts and compiled, and the kernels
PLAIN = {"eager": Oracle, "eager-channels_last": Oracle, "compile": Compiled}
VARIANTS = [*PLAIN, *backends()]


@dataclass
class Work:
    """A benchmark's op: a forward, and what its outputs are multiplied with on the way back.

    Attributes:
        flops: operations of the convolutions forward; their backward to the inputs has as many.
        numbers: of the inputs and outputs, each read or written once; `kept` of the branch outputs.
    """

    forward: Callable[[], list[Tensor]]
    flops: float
    numbers: float
    kept: float
    leaves: list[Tensor] = field(default_factory=list)

    def forward_only(self) -> None:
        with torch.no_grad():
            self.forward()
        _wait()

    def graph(self) -> tuple[tuple[list[Tensor], list[Tensor]], dict]:
        for leaf in self.leaves:
            leaf.grad = None
        outputs = self.forward()
        grads = [torch.ones_like(y) for y in outputs]
        _wait()
        return (outputs, grads), {}

    @staticmethod
    def backward(outputs: list[Tensor], grads: list[Tensor]) -> None:
        torch.autograd.backward(outputs, grads)
        _wait()


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@pytest.fixture(autouse=True)
def every_graph_compiles() -> Iterator[None]:
    # beyond eight shapes of the same code, torch.compile would go on in eager mode
    with torch._dynamo.config.patch(cache_size_limit=4096, fail_on_recompile_limit_hit=True):
        yield


@pytest.fixture(scope="module")
def roofs() -> dict[str, float]:
    return machine_roofs(DEVICE)


@pytest.fixture(autouse=True)
def machine(benchmark: Any) -> Iterator[None]:
    benchmark.extra_info.update(environment())
    yield


def runner(variant: str) -> Oracle | Kernels:
    """What computes a variant; skips what does not run here."""
    if variant in PLAIN:
        return PLAIN[variant](DEVICE)
    backend = backends()[variant]
    reason = backend.status().get("reason")
    if reason or DEVICE not in backend.devices:
        pytest.skip(f"{variant}: {reason or f'not for {DEVICE}'}")
    return Kernels(backend, DEVICE)


def leaves(problem: Problem, variant: str) -> tuple[nn.ModuleList, list[Tensor], list[Tensor]]:
    """Modules, inputs and weights in float32 in the layout of the variant."""
    module, inputs, weights = problem.leaves(Oracle(DEVICE), torch.float32)
    if variant != "eager":
        inputs = [channels_last(x.detach()).requires_grad_() for x in inputs]
        module = module.to(memory_format=torch.channels_last)
    return module, inputs, weights


def cell(variant: str, supernet: str, channels: int, size: int, stride: int) -> Work:
    """A node with one input."""
    shape = BATCH, size * stride, size * stride
    options = dict(SUPERNETS[supernet], channels=channels, stride=stride, edge_weights=False)
    problem = CellProblem(shape, torch.float32, inputs=1, nodes=1, **options)
    computed, (edges, inputs, weights) = runner(variant), leaves(problem, variant)
    if isinstance(computed, Kernels):
        reason = computed.backend.unsupported_cell(computed.call(list(edges), inputs, *weights))
        if reason:
            pytest.skip(f"{variant}: {reason}")
    pixels = BATCH * size * size
    convs = [m for m in edges.modules() if isinstance(m, nn.Conv2d)]
    flops = sum(2 * pixels * conv.weight.numel() for conv in convs)
    kept = sum(pixels * conv.out_channels for conv in convs if conv.groups == 1)
    numbers = inputs[0].numel() + pixels * channels
    arguments = list(edges), inputs, *weights
    trained = [*inputs, *weights, *(p for p in edges.parameters() if p.requires_grad)]
    return Work(lambda: computed.cell(*arguments), flops, numbers, kept, trained)


def layer(variant: str, name: str) -> Work:
    options = dict(LAYERS[name])
    size = options.pop("size")
    problem = LayerProblem((BATCH, size, size), torch.float32, **options)
    computed, (modules, [x], _) = runner(variant), leaves(problem, variant)
    layers = [module.layer() for module in modules]
    if isinstance(computed, Kernels):
        reason = computed.backend.unsupported_layer(x, layers[0])
        if reason:
            pytest.skip(f"{variant}: {reason}")
    stride = 2 if options.get("reduce") else 1
    pixels = BATCH * (size // stride) ** 2
    flops = sum(2 * pixels * conv.weight.numel() for conv in layers[0].convs)
    outputs = pixels * options["channels"][1]
    trained = [x, *(p for p in modules.parameters() if p.requires_grad)]
    return Work(lambda: list(computed.layers(x, layers)), flops, x.numel() + outputs, outputs, trained)


def norm(variant: str, channels: int, size: int, relu: bool) -> Work:
    problem = NormProblem((BATCH, channels, size, size), torch.float32, relu=relu)
    computed, ([module], [x], _) = runner(variant), leaves(problem, variant)
    if not isinstance(computed, Oracle) and not isinstance(computed.backend, BatchNormBackend):
        pytest.skip(f"{variant}: leaves it to PyTorch")
    trained = [x, *module.parameters()]
    # read for its statistics, too
    return Work(lambda: [computed.batch_norm(x, module, relu)], 0, 2 * x.numel(), x.numel(), trained)


def measure(benchmark: Any, roofs: dict[str, float], work: Work, direction: str) -> None:
    """Times one direction, and says what the time is of the least that it computes and moves."""
    if direction == "forward":
        work.forward_only()
        benchmark(work.forward_only)
        moved = work.numbers + work.kept
    else:
        work.backward(*work.graph()[0])
        rounds = 1 if benchmark.disabled else 9
        benchmark.pedantic(work.backward, setup=work.graph, rounds=rounds)
        # gradients in and out, what was kept twice: for the sums, then for the gradients
        moved = 2 * work.numbers + 2 * work.kept
    if benchmark.stats is None:
        return
    seconds, moved = benchmark.stats.stats.median, moved * BYTES
    floor = max(work.flops / roofs["gflops"], moved / roofs["gbytes"]) / 1e9
    benchmark.extra_info |= {
        "device": DEVICE,
        "flops": work.flops,
        "bytes": moved,
        "gflops_per_second": work.flops / seconds / 1e9,
        "gbytes_per_second": moved / seconds / 1e9,
        "share_of_roof": floor / seconds,
        "roofs": roofs,
    }


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("supernet", "channels", "size", "stride"), CELLS)
def test_cell(benchmark, roofs, supernet, channels, size, stride, variant, direction):
    measure(benchmark, roofs, cell(variant, supernet, channels, size, stride), direction)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", LAYERS)
def test_relu_conv_bn(benchmark, roofs, name, variant, direction):
    measure(benchmark, roofs, layer(variant, name), direction)


# of the stems with 16 initial channels
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("channels", "size", "relu"),
    [
        pytest.param(48, 32, False, id="48x32"),
        pytest.param(24, 112, True, id="imagenet, ReLU, 24x112"),
        pytest.param(48, 56, False, id="imagenet, 48x56"),
    ],
)
def test_batch_norm(benchmark, roofs, channels, size, relu, variant, direction):
    measure(benchmark, roofs, norm(variant, channels, size, relu), direction)
