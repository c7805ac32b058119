"""Cells of random shapes on the CPU, in float32, away from the kinks of ReLUs and maxima where it can be."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rfdarts_fast.ops import backends
from rfdarts_fast.spaces import SPACES
from tests.kernels.oracles import CPUKernels
from tests.kernels.problems import CellProblem
from tests.kernels.tolerances import TRUTH, assert_as_good_as_torch, errors

CPU = CPUKernels(backends()["cpu"])
pytestmark = pytest.mark.skipif(not CPU.backend.status()["built"], reason="the kernels were not built")


def nearest_kink(problem):
    """The least distance in float64 of a ReLU's input from 0, and of a maximum from the next.

    Derivatives jump there.
    """
    module, distances = copy.deepcopy(problem.module), [math.inf]

    def relu(_, x):
        distances.append(x[0].abs().min().item())

    def pool(module, x):
        padded = nn.functional.pad(x[0], (1, 1, 1, 1), value=-1e9)
        windows = nn.functional.unfold(padded, 3, stride=module.stride).unflatten(1, (-1, 9))
        first, second = windows.topk(2, dim=2).values.unbind(2)
        distances.append((first - second).min().item())

    for part in module.modules():
        if isinstance(part, nn.ReLU):
            part.register_forward_pre_hook(relu)
        elif isinstance(part, nn.MaxPool2d):
            part.register_forward_pre_hook(pool)
    with torch.no_grad():
        problem.compute(TRUTH, module, problem.inputs, *problem.weights.values())
    return min(distances)


SHAPES = dict(
    channels=st.sampled_from([4, 8, 12, 16, 24, 32, 40]),
    K=st.sampled_from([1, 2, 4]),
    reduce=st.booleans(),
    nodes=st.integers(1, 3),
    n=st.integers(1, 3),
    h=st.integers(1, 9),
    w=st.integers(1, 9),
    space=st.sampled_from(["darts", "s2", "s3"]),
    seed=st.integers(0, 2**16),
)
MORE = dict(
    channels=st.sampled_from([1, 2, 4, 5, 8, 12, 16, 24, 32, 48, 64, 100]),
    K=st.sampled_from([1, 2, 4, 8]),
    nodes=st.integers(1, 4),
    n=st.integers(1, 4),
    h=st.integers(1, 20),
    w=st.integers(1, 36),
)


def check(channels, K, reduce, nodes, n, h, w, space, seed):
    channels *= K if channels % K else 1
    if reduce:
        h, w = 2 * h, 2 * w
        # FactorizedReduce needs an even number of channels
        channels *= 2 if channels // K % 2 else 1
    # normalising a handful of values amplifies rounding beyond any bound
    n = max(n, -(-12 * (4 if reduce else 1) // (h * w)))
    options = dict(primitives=SPACES[space].cells["normal"][0], channels=channels, K=K, nodes=nodes)
    smooth, rough = [], []
    for attempt in range(10):
        torch.manual_seed(seed + 2**16 * attempt)
        problem = CellProblem((n, h, w), torch.float32, stride=2 if reduce else 1, **options)
        # on either side of a kink gradients differ, whose rounding ever it was that went there
        (smooth if nearest_kink(problem) > 2e-6 else rough).append(problem)
        if len(smooth) == (5 if K > 1 else 1):
            break
    if smooth:
        assert_as_good_as_torch(CPU, *smooth)
    if rough:
        assert_as_good_as_torch(CPU, rough[0], gradients=False)


test_any_shape = settings(max_examples=15, deadline=None)(given(**SHAPES)(check))
test_any_shape_thoroughly = pytest.mark.slow(
    settings(max_examples=200, deadline=None)(given(**SHAPES | MORE)(check))
)


def test_edge_weight_gradients_of_wide_rows():
    """A row has thousands of products, too many for floats alone; one draw may be lucky."""
    squares = torch.zeros(2, dtype=torch.float64)
    for seed in range(10):
        torch.manual_seed(seed)
        problem = CellProblem(
            (1, 1, 56), torch.float32, nodes=1, channels=800, K=8, primitives=("sep_conv_3x3",)
        )
        truth = problem.run(TRUTH, torch.float64)
        for i, backend in enumerate((CPU, TRUTH)):
            squares[i] += errors(problem.run(backend), truth)["gradient of edge_weights"][-1].square()
    ours, theirs = squares.sqrt()
    assert ours <= 3 * theirs
