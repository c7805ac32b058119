"""Microbenchmarks of the compiled ops at the shapes of the supernets; nothing here asserts a time.

pytest benchmarks/test_kernels.py --benchmark-enable --benchmark-group-by=param:shape
"""

import pytest
import torch
from torch import nn

from rfdarts_fast.nn.supernet import MixedOp
from rfdarts_fast.ops import reference
from rfdarts_fast.ops.compiled import cpu
from rfdarts_fast.spaces import DARTS_PRIMITIVES

pytestmark = pytest.mark.skipif(not cpu.status()["built"], reason="the kernels were not built")

# channels, size, K: the three resolutions of RF-DARTS and RF-PCDARTS with 16 initial channels
SHAPES = {
    "16x32": (16, 32, 1),
    "32x16": (32, 16, 1),
    "64x8": (64, 8, 1),
    "16x32 K=4": (16, 32, 4),
    "32x16 K=4": (32, 16, 4),
    "64x8 K=4": (64, 8, 4),
}
ENGINES = {"reference": reference.mixed_cell, "native": cpu.mixed_cell}
BATCH = 64


def _node(channels, size, K, inputs, stride):
    edges = nn.ModuleList(MixedOp(DARTS_PRIMITIVES, channels, stride, K) for _ in range(inputs))
    for module in edges.modules():
        if isinstance(module, nn.Conv2d):
            module.requires_grad_(False)
    edges = edges.to(memory_format=torch.channels_last)
    x = [
        torch.randn(BATCH, channels, size * stride, size * stride)
        .contiguous(memory_format=torch.channels_last)
        .requires_grad_()
        for _ in range(inputs)
    ]
    return list(edges), x, torch.rand(inputs, len(DARTS_PRIMITIVES)).softmax(-1).requires_grad_()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stride", [1, 2])
def test_mixed_op_forward(benchmark, engine, shape, stride):
    edges, x, mix = _node(*SHAPES[shape], 1, stride)
    with torch.no_grad():
        benchmark(ENGINES[engine], edges, x, mix)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("shape", SHAPES)
def test_node_forward_backward(benchmark, engine, shape):
    """A node with two inputs: forward, and backward to everything that is trained."""
    edges, x, mix = _node(*SHAPES[shape], 2, 1)
    gradient = torch.randn_like(x[0])

    def step():
        ENGINES[engine](edges, x, mix)[0].backward(gradient)

    benchmark(step)


@pytest.mark.parametrize("fused", [False, True], ids=["torch", "native"])
@pytest.mark.parametrize("shape", [(64, 16, 32), (128, 32, 16), (256, 64, 8)], ids=str)
def test_preprocessing(benchmark, shape, fused):
    c_in, c_out, size = shape
    conv = nn.Conv2d(c_in, c_out, 1, bias=False).requires_grad_(False).to(memory_format=torch.channels_last)
    norm = nn.BatchNorm2d(c_out)
    x = torch.randn(BATCH, c_in, size, size).contiguous(memory_format=torch.channels_last).requires_grad_()

    def step():
        out = cpu.relu_conv_bn(x, (conv,), norm) if fused else norm(conv(x.relu()))
        out.sum().backward()

    benchmark(step)
