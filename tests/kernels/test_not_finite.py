"""NaN and infinities spread through cells as in plain PyTorch, forward and back."""

import pytest
import torch
from torch import nn

from rfdarts_fast.ops.dispatch import cell_call
from tests.kernels.oracles import EVERYWHERE, on
from tests.kernels.problems import FEW, NASBENCH201, CellProblem
from tests.kernels.tolerances import TRUTH


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", FEW[1:])
@EVERYWHERE
def test_what_is_not_finite_spreads_as_in_pytorch(backend, name, stride, value):
    """In evaluation mode; in training a channel's statistics spread it to all of its pixels."""
    problem = not_finite_problem(name, stride)
    # windows with several, and with nothing else
    problem.inputs[0][0, 2, :3, :3] = problem.inputs[0][0, 2, 5, 5] = value
    found, expected = problem.run(backend), problem.run(TRUTH)
    # the ReLU takes a negative infinity away
    assert value == -torch.inf or not expected["output 0"][0].isfinite().all()
    # compensated sums make a NaN of an infinity
    identity = name == "skip_connect" and stride == 1
    for key in expected.keys() - ({"gradient of op_weights"} if identity else set()):
        torch.testing.assert_close(found[key], expected[key], equal_nan=True)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e308])
@pytest.mark.parametrize("name", ["nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3"])
@on("cpu", "emulated", "gpu")
def test_what_is_not_finite_spreads_through_nas_bench_201(backend, name, value):
    options = NASBENCH201 | dict(primitives=("none", name), nodes=1, train=False)
    problem = CellProblem((1, 7, 7), **options)
    problem.inputs[0][0, 2, 3, 3] = value
    problem.grads[0][0, 1, 1, 5] = value
    found, expected = problem.run(backend), problem.run(TRUTH)
    # the products of a transform may overflow where those of a convolution do not
    assert value == 1e308 or not expected["gradient of input 0"][0].isfinite().all()
    for key in expected.keys() - {"gradient of op_weights"}:
        torch.testing.assert_close(found[key], expected[key], equal_nan=True)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["sep_conv_3x3", "dil_conv_5x5", "max_pool_3x3"])
@on("emulated", "gpu")
def test_what_is_not_finite_spreads_in_sixteen_bits(backend, name, value):
    """A product with a Toeplitz matrix would spread it to pixels that the kernel does not reach."""
    problem = CellProblem(
        (1, 18, 34), torch.bfloat16, channels=16, inputs=1, nodes=1, train=False, primitives=("none", name)
    )
    problem.inputs[0][0, 2, 3, 3] = value
    problem.grads[0][0, 5, 12, 20] = value
    found, expected = problem.run(backend), problem.run(TRUTH)
    for key in ("output 0", "gradient of input 0"):
        [here], [there] = found[key], expected[key]
        assert not there.isfinite().all()
        assert torch.equal(here.isfinite(), there.isfinite()), key


def not_finite_problem(name, stride, **options):
    options = dict(primitives=("none", name), inputs=1, nodes=1, train=False, stride=stride) | options
    return CellProblem((1, 8, 8), **options)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", FEW[1:])
@EVERYWHERE
def test_what_is_not_finite_spreads_back_as_in_pytorch(backend, name, stride):
    problem = not_finite_problem(name, stride)
    problem.grads[0][0, 1, 2, 3] = torch.nan
    found, expected = problem.run(backend), problem.run(TRUTH)
    assert not expected["gradient of input 0"][0].isfinite().all()
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_halves_of_outputs_that_no_kernels_take():
    problem = not_finite_problem("skip_connect", 2)
    [edge], inputs, weights = problem.leaves(TRUTH)
    skip = edge._ops[1]
    skip.conv_1, skip.conv_2 = (nn.Conv2d(4, c, 1, 2, bias=False).requires_grad_(False) for c in (3, 1))
    assert "FactorizedReduce of an unexpected shape" in cell_call(
        [edge], inputs, *weights, None, "fast", False
    )


@EVERYWHERE
def test_a_gradient_that_is_not_finite_stays_on_its_edges(backend):
    edges = [("none", "skip_connect"), ("none", "avg_pool_3x3"), ("none", "max_pool_3x3")]
    for node in range(2):
        problem = not_finite_problem("", 1, primitives=edges, nodes=2)
        problem.grads[node][0, 1, 4, 3] = torch.nan
        torch.testing.assert_close(problem.run(backend), problem.run(TRUTH), equal_nan=True)


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
@EVERYWHERE
def test_bypassed_maxima_that_are_not_finite(backend, value):
    problem = not_finite_problem("sep_conv_3x3", 2, K=2)
    problem.inputs[0][0, 2, :3, 1:5] = value
    [found], [expected] = (problem.run(each)["gradient of input 0"] for each in (backend, TRUTH))
    torch.testing.assert_close(found, expected, equal_nan=True)
