"""Cells of NAS-Bench-201 in Triton; those of the CPU and of CUDA are among the cells of test_cells.py."""

import pytest
import torch

from tests.kernels.oracles import on, over
from tests.kernels.problems import NASBENCH201, CellProblem
from tests.kernels.tolerances import assert_as_good_as_torch, assert_same_bits
from tests.kernels.views import channels_last, expanded, not_aligned, wider

F64, F32 = torch.float64, torch.float32
CONVS = ("nor_conv_1x1", "nor_conv_3x3")

TRITON = {
    "cell": dict(nodes=3),
    "one channel": dict(channels=1, shape=(1, 7, 5)),
    "three channels": dict(channels=3, shape=(3, 1, 3)),
    "one pixel": dict(channels=5, shape=(6, 1, 1)),
    # several blocks of inputs and of outputs, the last ones not whole
    "68 channels": dict(channels=68, nodes=2, shape=(2, 2, 3), primitives=CONVS),
    "K=2": dict(channels=6, K=2, nodes=2),
    "two inputs": dict(inputs=2),
    "not affine": dict(affine=False),
    "evaluated": dict(nodes=2, train=False),
    "no running statistics": dict(track=False, train=False),
    "3x3 alone": dict(primitives=("none", "nor_conv_3x3")),
    "1x1 alone": dict(primitives=("nor_conv_1x1", "none")),
    "other convolutions on other edges": dict(
        nodes=2, primitives=[("nor_conv_1x1",), ("nor_conv_3x3",), ("nor_conv_1x1",)]
    ),
    "average pool alone": dict(primitives=("none", "avg_pool_3x3"), nodes=2),
    "pools with BatchNorm": dict(batch_norm=True, primitives=("avg_pool_3x3", "nor_conv_1x1")),
    "pools with and without BatchNorm": dict(
        nodes=2, batch_norm=[False, True, False], primitives=("avg_pool_3x3", "nor_conv_1x1")
    ),
    "beside depthwise convolutions": dict(
        nodes=2, primitives=("sep_conv_3x3", "nor_conv_3x3", "max_pool_3x3", "avg_pool_3x3"), batch_norm=True
    ),
    "in a reduction cell": dict(
        nodes=2, stride=2, primitives=[("skip_connect", "none"), ("skip_connect", "none"), CONVS]
    ),
}
TRITON = {
    name: NASBENCH201 | {"channels": 4, "nodes": 1, "shape": (2, 4, 6)} | options
    for name, options in TRITON.items()
}


def problem_of(dtype, shape=(2, 4, 6), **options):
    torch.manual_seed(0)
    return CellProblem(shape, dtype, **NASBENCH201 | {"channels": 8} | options)


@over(("triton", (F64,), TRITON))
def test_as_good_as_plain_pytorch(backend, dtype, options):
    assert_as_good_as_torch(backend, problem_of(dtype, **options))


@over(("triton", (F32,), {"K=1": dict(nodes=2), "K=2": dict(K=2, nodes=1)}))
def test_memory_changes_no_bit(backend, dtype, options):
    problem = problem_of(dtype, **options)
    expected = problem.run(backend)
    assert_same_bits(problem.run(backend, memory="recompute"), expected)
    assert_same_bits(problem.run(backend, concat=True, memory="recompute"), expected)
    assert_same_bits(problem.run(backend, poison=False), expected)


@on("cpu", "triton")
def test_inputs_and_gradients_in_any_layout(backend):
    problem = problem_of(F32, nodes=1)
    problem.grads = [torch.ones_like(grad) for grad in problem.grads]
    expected = problem.run(backend)
    for view, grad_view in (
        (channels_last, expanded),
        (wider(8, rows=2), not_aligned),
        (wider(3, 2, torch.contiguous_format), channels_last),
        (not_aligned, channels_last),
    ):
        assert_same_bits(problem.run(backend, view=view, grad_view=grad_view), expected)


@on("cpu", "triton")
def test_the_same_tensor_twice_and_a_node_without_a_gradient(backend):
    problem = problem_of(F64, inputs=2, nodes=2, channels=4)
    problem.inputs[1] = problem.inputs[0]
    problem.grads[0] = None
    assert_as_good_as_torch(backend, problem)


@pytest.mark.parametrize("train", [True, False])
@on("cpu", "triton")
def test_inputs_that_need_no_gradient(backend, train):
    problem = problem_of(F32, nodes=1, train=train)
    found, expected = problem.run(backend, view=torch.Tensor.detach), problem.run(backend)
    assert found.pop("gradient of input 0") == [None]
    assert_same_bits(found, {name: expected[name] for name in found})


@over(("triton", (F64,), {"K=2": dict(K=2, nodes=1)}))
def test_gradcheck(backend, dtype, options):
    problem = problem_of(dtype, (2, 2, 3), **options | {"channels": 4})
    edges, inputs, weights = problem.leaves(backend)
    assert torch.autograd.gradcheck(
        lambda *leaves: tuple(backend.cell(list(edges), leaves[:1], *leaves[1:])),
        [*inputs, *weights],
        fast_mode=True,
    )


@on("cpu", "triton")
def test_frozen_weights_that_change_are_packed_again(backend):
    problem = problem_of(F64, nodes=1, channels=4, primitives=CONVS)
    edges, inputs, weights = problem.leaves(backend)
    [before] = problem.compute(backend, edges, inputs, *weights)
    for conv in (part for part in edges.modules() if isinstance(part, torch.nn.Conv2d)):
        torch.nn.init.normal_(conv.weight)
    [after] = problem.compute(backend, edges, inputs, *weights)
    [gradient] = torch.autograd.grad(after, inputs, problem.grads)
    problem.module = edges
    expected = problem.run(backend)
    assert torch.equal(after, expected["output 0"][0]) and not torch.equal(after, before)
    assert torch.equal(gradient, expected["gradient of input 0"][0])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@on("cpu", "triton")
def test_an_infinity_reaches_the_pixels_around_it_alone(backend):
    """The padding, and the places that fill a block, are zeros: times an infinity they would be NaNs."""
    problem = problem_of(F32, (1, 6, 6), nodes=1, channels=3, primitives=("nor_conv_3x3",), train=False)
    problem.inputs[0][0, :, 0, 0] = torch.inf
    [node] = problem.run(backend)["output 0"]
    reached = torch.zeros(6, 6, dtype=torch.bool)
    reached[:2, :2] = True
    assert torch.equal(node[0].isfinite(), ~reached.expand(3, 6, 6))
