"""Microbenchmarks of the compiled ops at the shapes of the supernets; nothing here asserts a time.

pytest benchmarks/test_kernels.py --benchmark-enable --benchmark-group-by=param:shape
"""

import pytest
import torch

from rfdarts_fast.ops import backends
from tests.kernels.oracles import CPUKernels, Oracle
from tests.kernels.problems import CellProblem, LayerProblem
from tests.kernels.views import channels_last

CPU = CPUKernels(backends()["cpu"])
pytestmark = pytest.mark.skipif(not CPU.backend.status()["built"], reason="the kernels were not built")

# channels, size, K: the three resolutions of RF-DARTS and RF-PCDARTS with 16 initial channels
SHAPES = {
    "16x32": (16, 32, 1),
    "32x16": (32, 16, 1),
    "64x8": (64, 8, 1),
    "16x32 K=4": (16, 32, 4),
    "32x16 K=4": (32, 16, 4),
    "64x8 K=4": (64, 8, 4),
}
BACKENDS = {"reference": Oracle(), "cpu": CPU}
BATCH = 64


def leaves(problem):
    """The modules, inputs and weights, in float32 and channels_last."""
    module, inputs, weights = problem.leaves(CPU)
    inputs = [channels_last(x.detach()).requires_grad_() for x in inputs]
    return module.to(memory_format=torch.channels_last), inputs, weights


def node(channels, size, K, inputs, stride):
    shape = BATCH, size * stride, size * stride
    options = dict(channels=channels, stride=stride, K=K, inputs=inputs, nodes=1, edge_weights=False)
    return leaves(CellProblem(shape, torch.float32, **options))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stride", [1, 2])
def test_mixed_op_forward(benchmark, backend, shape, stride):
    edges, x, weights = node(*SHAPES[shape], 1, stride)
    with torch.no_grad():
        benchmark(BACKENDS[backend].cell, list(edges), x, *weights)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_node_forward_backward(benchmark, backend, shape):
    """A node with two inputs: forward, and backward to everything that is trained."""
    edges, x, weights = node(*SHAPES[shape], 2, 1)
    gradient = torch.randn_like(x[0])

    def step():
        BACKENDS[backend].cell(list(edges), x, *weights)[0].backward(gradient)

    benchmark(step)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(64, 16, 32), (128, 32, 16), (256, 64, 8)], ids=str)
def test_preprocessing(benchmark, backend, shape):
    c_in, c_out, size = shape
    [module], [x], _ = leaves(LayerProblem((BATCH, size, size), torch.float32, channels=(c_in, c_out)))

    def step():
        [out] = BACKENDS[backend].layers(x, [module.layer()])
        out.sum().backward()

    benchmark(step)
