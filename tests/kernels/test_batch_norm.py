"""BatchNorms by themselves, with and without the ReLU behind: against plain PyTorch; layouts, bits."""

import copy

import pytest
import torch
from torch import nn

from rfdarts_fast import ops
from rfdarts_fast.nn.sequential import FusedSequential
from tests.kernels.oracles import Kernels, RecordedOps, grid, on, over
from tests.kernels.problems import NormProblem
from tests.kernels.tolerances import TRUTH, assert_as_good_as_torch, assert_same_bits
from tests.kernels.views import ALIGNED, GRADIENT_VIEWS, channels_last, not_aligned

F64, F32 = torch.float64, torch.float32
BOTH = [False, True]
relu = pytest.mark.parametrize("relu", BOTH)

# C that fills vectors, divides them, and neither; images of one pixel, and of several chunks
SHAPES = [
    (3, 1, 5, 7),
    (5, 3, 1, 1),
    (4, 8, 9, 6),
    (2, 16, 20, 12),
    (2, 24, 11, 10),
    (5, 70, 3, 4),
    (1, 5, 40, 44),
]
CASES = grid(shape=SHAPES, relu=BOTH, train=BOTH)
CASES |= {"not affine": dict(affine=False), "no running statistics": dict(track=False, train=False)}
CASES |= {"all pixels far out": dict(place=lambda x: x.add_(100))}
# past the caches
CASES |= grid(shape=[(40, 12, 30, 30)], relu=BOTH)


@over(("cpu", (F64, F32), CASES))
def test_as_good_as_plain_pytorch(backend, dtype, options):
    assert_as_good_as_torch(backend, NormProblem(dtype=dtype, **options))


@relu
@on("cpu")
def test_threads_and_fresh_memory_change_no_bit(backend, relu):
    problem = NormProblem((7, 12, 10, 9), F32, relu=relu)
    results = [problem.run(backend) for _ in backend.schedules()]
    for result in (*results[1:], problem.run(backend, poison=False)):
        assert_same_bits(result, results[0])


@relu
@on("cpu")
def test_inputs_in_any_layout(backend, relu):
    problem = NormProblem((3, 8, 5, 7), F32, relu=relu)
    expected = problem.run(backend)
    for view in (*ALIGNED, not_aligned):
        assert_same_bits(problem.run(backend, view=view), expected)


@on("cpu")
def test_gradients_in_any_layout(backend):
    problem = NormProblem((3, 8, 5, 7), F32, relu=True)
    problem.grads = [torch.ones_like(problem.grads[0])]
    expected = problem.run(backend)
    for view in GRADIENT_VIEWS:
        assert_same_bits(problem.run(backend, grad_view=view), expected)


@relu
@on("cpu")
def test_no_gradient_of_the_input(backend, relu):
    """The images' own convolution is frozen: nothing before the first BatchNorm has a gradient."""
    problem = NormProblem(relu=relu)
    [norm], [x], _ = problem.leaves(backend)
    found = []
    for leaf in (x, x.detach()):
        output = backend.batch_norm(channels_last(leaf), norm, relu)
        found.append(torch.autograd.grad(output, [norm.weight, norm.bias], problem.grads[0]))
    assert_same_bits({"gradients": [*found[0]]}, {"gradients": [*found[1]]})


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@relu
@on("cpu")
def test_what_is_not_finite_spreads_as_in_pytorch(backend, relu, value):
    problem = NormProblem((2, 8, 4, 4), relu=relu, train=False)
    problem.inputs[0][0, 2, 1, 1] = problem.grads[0][1, 3, 2, 2] = value
    found, expected = problem.run(backend), problem.run(TRUTH)
    torch.testing.assert_close(found, expected, equal_nan=True)


@relu
@pytest.mark.parametrize("train", BOTH)
@on("cpu")
def test_first_and_second_derivatives(backend, relu, train):
    problem = NormProblem((2, 3, 3, 2), relu=relu, train=train)
    [norm], [x], _ = problem.leaves(backend)

    def layer(x, gamma, beta):
        norm._parameters.update(weight=gamma, bias=beta)
        return backend.batch_norm(x, norm, relu)

    arguments = [x, *(p.detach().requires_grad_() for p in norm.parameters())]
    assert torch.autograd.gradcheck(layer, arguments)
    assert torch.autograd.gradgradcheck(layer, arguments)


@relu
@on("cpu")
def test_opcheck(backend, relu):
    recorded = RecordedOps(backend.backend)
    NormProblem(dtype=F32, relu=relu).run(Kernels(recorded.backend, backend.device))
    recorded.opcheck("batch_norm_forward", "batch_norm_backward", "update_running_stats")


class Bounded(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).clamp(-1, 1)


REFUSED = {
    "one value": (nn.BatchNorm2d(4), torch.randn(1, 4, 1, 1)),
    "no momentum": (nn.BatchNorm2d(4, momentum=None), torch.randn(2, 4, 3, 3)),
    "a subclass": (Bounded(4), torch.randn(2, 4, 3, 3)),
    "other channels": (nn.BatchNorm2d(3), torch.randn(2, 4, 3, 3)),
    "other dtypes": (nn.BatchNorm2d(4), torch.randn(2, 4, 3, 3, dtype=F64)),
    "no image": (nn.BatchNorm2d(4), torch.randn(0, 4, 3, 3)),
    "half the bytes": (nn.BatchNorm2d(4), torch.randn(2, 4, 3, 3, dtype=torch.bfloat16)),
}


@pytest.mark.parametrize("case", REFUSED)
@on("cpu")
def test_what_is_left_to_pytorch(backend, case):
    norm, x = REFUSED[case]
    assert backend.backend.unsupported_batch_norm(x, norm)


@on("cpu")
def test_sequence_is_that_of_pytorch(backend, monkeypatch):
    """The same numbers, buffers and names; BatchNorms are the op's, but one with a hook."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 8, 3),
        nn.BatchNorm2d(8),
        Bounded(8),
    ]
    plain = nn.Sequential(*layers).double()
    fused = FusedSequential(*copy.deepcopy(layers)).double()
    assert [*fused.state_dict()] == [*plain.state_dict()]
    recorded = RecordedOps(backend.backend)
    monkeypatch.setitem(ops.contract._backends, "cpu", recorded.backend)
    x = torch.randn(2, 3, 8, 8, dtype=F64)
    with ops.use_backend("cpu"):
        torch.testing.assert_close(fused(x), plain(x))
        torch.testing.assert_close(fused.state_dict(), plain.state_dict())
        assert recorded.calls["batch_norm_forward"][2]["relu"] is False
        fused[4].register_forward_hook(lambda *_: None)
        fused(x)
        assert recorded.calls["batch_norm_forward"][2]["relu"] is True
