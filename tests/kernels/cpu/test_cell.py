"""The compiled engine against the reference in float64: values, gradients, running statistics."""

import pytest
import torch
from tests.kernels.cpu.cells import Problem, assert_as_good_as_torch, make_cell, nearest_kink, needs_kernels
from hypothesis import given, settings
from hypothesis import strategies as st

from rfdarts_fast.ops import reference
from rfdarts_fast.ops.compiled import cpu
from rfdarts_fast.spaces import SPACES

pytestmark = needs_kernels

CASES = {
    "mixed op": dict(inputs=1, nodes=1),
    "mixed op, stride 2": dict(inputs=1, nodes=1, reduce=True),
    "node": dict(inputs=3, nodes=1),
    "cell": dict(nodes=4),
    "reduction cell": dict(nodes=4, reduce=True),
    "narrow": dict(channels=4),
    "wide": dict(channels=64, nodes=1, inputs=1),
    "odd width": dict(channels=5),
    "twelve channels": dict(channels=12),
    "K=4": dict(K=4, channels=16),
    "K=4, stride 2": dict(K=4, channels=32, reduce=True),
    "K=2": dict(K=2, channels=6),
    "K=8": dict(K=8, channels=8),
    "plain BatchNorm": dict(affine=False),
    "no running statistics": dict(track=False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_matches_reference(case, dtype):
    problem = Problem(
        make_cell(**case), 2, 8, 8, case.get("inputs", 2), edge_weights=case.get("K", 1) > 1, dtype=dtype
    )
    assert_as_good_as_torch(problem)


@pytest.mark.parametrize("case", ["cell", "K=4, stride 2", "no running statistics"])
def test_evaluation_mode(case):
    cell = make_cell(**CASES[case])
    for buffer in cell.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    problem = Problem(cell.eval(), 2, 8, 8)
    assert_as_good_as_torch(problem)


# sums about a value that lies far from the mean, or about none, cancel
FAR_OUT = {
    "first pixel": lambda x: x[:, :, 0, 0].uniform_(200, 400),
    "lower half": lambda x: x[:, :, 16:].add_(50),
    "all pixels": lambda x: x.add_(100),
}


@pytest.mark.parametrize("case", ["cell", "reduction cell", "narrow", "K=4", "K=4, stride 2"])
@pytest.mark.parametrize("place", FAR_OUT.values(), ids=FAR_OUT)
def test_pixels_far_out(place, case):
    problem = Problem(make_cell(**CASES[case] | {"nodes": 1}), 2, 32, 32)
    for x in problem.x:
        place(x)
    assert_as_good_as_torch(problem)


@pytest.mark.parametrize("size", [(1, 2), (1, 1), (3, 5), (7, 9), (9, 16), (17, 8)])
@pytest.mark.parametrize("channels", [2, 8, 16])
def test_odd_sizes(size, channels):
    assert_as_good_as_torch(Problem(make_cell(channels=channels, nodes=1), 3, *size))


@given(
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
@settings(max_examples=15, deadline=None)
def test_any_shape(channels, K, reduce, nodes, n, h, w, space, seed):
    _any_shape(channels, K, reduce, nodes, n, h, w, space, seed)


@pytest.mark.slow
@given(
    channels=st.sampled_from([1, 2, 4, 5, 8, 12, 16, 24, 32, 48, 64, 100]),
    K=st.sampled_from([1, 2, 4, 8]),
    reduce=st.booleans(),
    nodes=st.integers(1, 4),
    n=st.integers(1, 4),
    h=st.integers(1, 20),
    w=st.integers(1, 36),
    space=st.sampled_from(["darts", "s2", "s3"]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=200, deadline=None)
def test_any_shape_thoroughly(channels, K, reduce, nodes, n, h, w, space, seed):
    _any_shape(channels, K, reduce, nodes, n, h, w, space, seed)


def _any_shape(channels, K, reduce, nodes, n, h, w, space, seed):
    channels *= K if channels % K else 1
    if reduce:
        h, w = 2 * h, 2 * w
        # FactorizedReduce needs an even number of channels
        channels *= 2 if channels // K % 2 else 1
    primitives = SPACES[space].cells["normal"][0]
    # normalising a handful of values amplifies rounding beyond any bound
    n = max(n, -(-12 * (4 if reduce else 1) // (h * w)))
    smooth, rough = [], []
    for attempt in range(10):
        torch.manual_seed(seed + 2**16 * attempt)
        problem = Problem(make_cell(2, nodes, channels, K, reduce, primitives), n, h, w, 2, K > 1)
        # on either side of a kink gradients differ, whose rounding ever it was that went there
        (smooth if nearest_kink(problem) > 2e-6 else rough).append(problem)
        if len(smooth) == (5 if K > 1 else 1):
            break
    if smooth:
        assert_as_good_as_torch(*smooth)
    if rough:
        assert_as_good_as_torch(rough[0], gradients=False)


def test_edge_weight_gradients_of_wide_rows():
    # a row has thousands of products, too many for floats alone; one draw may be lucky
    errors = []
    for seed in range(10):
        torch.manual_seed(seed)
        cell = make_cell(nodes=1, channels=800, K=8, primitives=("sep_conv_3x3",))
        problem = Problem(cell, 1, 1, 56, edge_weights=True)
        truth, theirs, ours = (
            problem.run(engine, dtype)["gradient of edge weights"].double()
            for engine, dtype in (
                (reference.mixed_cell, torch.float64),
                (reference.mixed_cell, torch.float32),
                (cpu.mixed_cell, torch.float32),
            )
        )
        errors.append([(ours - truth).square().sum(), (theirs - truth).square().sum()])
    ours, theirs = torch.tensor(errors).sum(0).sqrt().tolist()
    assert ours <= 3 * theirs, (ours, theirs)


def test_memory_modes_agree_bit_for_bit():
    problem = Problem(make_cell(nodes=3, channels=32, K=4, reduce=True), 3, 8, 8, edge_weights=True)
    fast = problem.run(cpu.mixed_cell, memory="fast")
    small = problem.run(cpu.mixed_cell, memory="recompute")
    assert all(torch.equal(fast[name], small[name]) for name in fast)


@pytest.mark.parametrize("K", [1, 4])
def test_threads_agree_bit_for_bit(K):
    problem = Problem(make_cell(nodes=2, K=K), 5, 8, 8, edge_weights=True)
    one = problem.run(cpu.mixed_cell)
    torch.set_num_threads(2)
    try:
        two = problem.run(cpu.mixed_cell)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_bfloat16_storage_is_close():
    problem = Problem(make_cell(nodes=2), 4, 8, 8)
    exact, rough = problem.run(cpu.mixed_cell), problem.run(cpu.mixed_cell, memory="bfloat16")
    for name in exact:
        if name.startswith(("node", "gradient of input")):
            assert (exact[name] - rough[name]).norm() < 0.03 * exact[name].norm(), name


def test_concatenated_nodes():
    problem = Problem(make_cell(nodes=3, K=4), 2, 8, 8, edge_weights=True)
    apart = problem.run(cpu.mixed_cell)

    def engine(*arguments):
        (together,) = cpu.mixed_cell(*arguments, concatenate=True)
        return together.chunk(3, dim=1)

    joined = problem.run(engine)
    assert all(torch.equal(apart[name], joined[name]) for name in apart)


def test_inputs_in_any_memory_order():
    problem = Problem(make_cell(), 2, 6, 8)
    plain = problem.run(cpu.mixed_cell)
    wide = torch.randn(2, 40, 12, 8)
    wide[:, 3:19, ::2] = problem.x[0]
    for other in (
        problem.x[0].contiguous(memory_format=torch.channels_last),
        wide[:, 3:19, ::2],
        wide.contiguous(memory_format=torch.channels_last)[:, 3:19, ::2],
    ):
        problem.x[0] = other
        leaves = [x.detach().requires_grad_() for x in problem.x]
        nodes = cpu.mixed_cell(list(problem.cell), leaves, problem.mix)
        assert all(torch.equal(node.detach(), plain[f"node {i}"]) for i, node in enumerate(nodes))


def test_same_tensor_twice_and_expanded_gradients():
    cell = make_cell()
    x, mix = torch.randn(2, 16, 6, 6), torch.rand(5, 8).softmax(-1)
    gradients = []
    for engine in (cpu.mixed_cell, reference.mixed_cell):
        leaf = x.clone().requires_grad_()
        states = engine(list(cell), [leaf, leaf], mix, None)
        # a sum's gradient is expanded from one number; the first node gets none from outside
        states[1].sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, atol=2e-4, rtol=1e-4)


def test_gradcheck():
    cell = make_cell(
        nodes=1, channels=4, K=2, primitives=("none", "max_pool_3x3", "skip_connect", "sep_conv_3x3")
    )
    cell = cell.double()
    parameters = [p for p in cell.parameters() if p.requires_grad]
    x = [torch.randn(2, 4, 3, 4, dtype=torch.double, requires_grad=True) for _ in range(2)]
    mix = torch.rand(2, 4, dtype=torch.double, requires_grad=True)
    edge_weights = torch.rand(2, dtype=torch.double, requires_grad=True)

    def nodes(*_):
        return tuple(cpu.mixed_cell(list(cell), x, mix, edge_weights))

    assert torch.autograd.gradcheck(nodes, (*x, mix, edge_weights, *parameters), fast_mode=True, atol=1e-4)


def test_second_derivative_is_refused():
    cell = make_cell(inputs=1, nodes=1)
    x = torch.randn(2, 16, 4, 4, requires_grad=True)
    (node,) = cpu.mixed_cell(list(cell), [x], torch.rand(1, 8))
    (gradient,) = torch.autograd.grad(node.pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_backward_twice():
    cell = make_cell()
    x = [torch.randn(2, 16, 6, 6, requires_grad=True) for _ in range(2)]
    out = cpu.mixed_cell(list(cell), x, torch.rand(5, 8))[1].pow(2).sum()
    first = torch.autograd.grad(out, x, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(out, x), strict=True))


def test_nan_passes_and_poison_does_not():
    problem = Problem(make_cell(K=4, reduce=True, channels=32), 2, 8, 8, edge_weights=True)
    clean = problem.run(cpu.mixed_cell)
    torch.ops.rfdarts.pool_poison(True)
    torch.use_deterministic_algorithms(True)
    try:
        poisoned = problem.run(cpu.mixed_cell)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.ops.rfdarts.pool_poison(False)
    assert all(torch.equal(clean[name], poisoned[name]) for name in clean)
    problem.x[0][0, 0, 0, 0] = float("nan")
    assert all(problem.run(cpu.mixed_cell)[f"node {i}"].isnan().any() for i in range(2))


def test_noise_is_fresh_and_counts():
    cell = make_cell(primitives=("noise", "sep_conv_3x3"), nodes=1)
    x = [torch.randn(2, 16, 8, 8) for _ in range(2)]
    mix = torch.tensor([[1.0, 0.0], [0.0, 0.0]], requires_grad=True)
    one = cpu.mixed_cell(list(cell), x, mix)[0]
    two = cpu.mixed_cell(list(cell), x, mix)[0]
    assert not torch.equal(one, two)
    assert abs(one.std().item() - 1) < 0.1
    (gradient,) = torch.autograd.grad((one * one.detach()).sum(), mix)
    torch.testing.assert_close(gradient[0, 0], one.detach().pow(2).sum())
