"""How cells may be called, on every backend: memory, layouts, what autograd may do, changes in place."""

import statistics

import pytest
import torch
from torch import nn

from tests.kernels.oracles import EVERYWHERE, Kernels, Oracle, RecordedOps, on, over
from tests.kernels.problems import FEW, NASBENCH201, CellProblem
from tests.kernels.tolerances import TRUTH, assert_as_good_as_torch, assert_same_bits, errors, size_of
from tests.kernels.views import ALIGNED, GRADIENT_VIEWS, not_aligned

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16


def small(backend, dtype=F64, shape=(2, 4, 6), **options):
    """A cell of all primitives and two inputs; for Triton's interpreter, which is slow, of two and one."""
    if backend.name == "triton":
        options = dict(primitives=("skip_connect", "sep_conv_3x3"), inputs=1) | options
    return CellProblem(shape, dtype, **options)


@EVERYWHERE
def test_fresh_memory_changes_no_bit(backend):
    problem = small(backend, F32, channels=8, K=2, stride=2, nodes=1)
    assert_same_bits(problem.run(backend), problem.run(backend, poison=False))


@pytest.mark.parametrize("K", [1, 2])
@EVERYWHERE
def test_concatenated_nodes_are_the_nodes(backend, K):
    problem = small(backend, F32, channels=8, K=K)
    assert_same_bits(problem.run(backend, concat=True), problem.run(backend))


@EVERYWHERE
def test_inputs_in_any_layout(backend):
    problem = small(backend, F32, channels=8, K=2, nodes=1)
    expected = problem.run(backend)
    for view in ALIGNED:
        assert_same_bits(problem.run(backend, view=view), expected)
    # the sums of CUDA's threads depend on the alignment
    if backend.name in ("cpu", "triton"):
        assert_same_bits(problem.run(backend, view=not_aligned), expected)
    else:
        assert_as_good_as_torch(backend, small(backend, nodes=1), view=not_aligned)


@EVERYWHERE
def test_gradients_in_any_layout(backend):
    problem = small(backend, F32, channels=8, K=2)
    problem.grads = [torch.ones_like(grad) for grad in problem.grads]
    expected = problem.run(backend)
    for view in GRADIENT_VIEWS:
        assert_same_bits(problem.run(backend, grad_view=view), expected)


@EVERYWHERE
def test_the_same_tensor_twice_and_a_node_without_a_gradient(backend):
    problem = small(backend, inputs=2)
    problem.inputs[1] = problem.inputs[0]
    problem.grads[0] = None
    assert_as_good_as_torch(backend, problem)


@pytest.mark.parametrize("train", [True, False])
@EVERYWHERE
def test_inputs_that_need_no_gradient(backend, train):
    problem = small(backend, inputs=1, nodes=1, train=train)
    found, expected = problem.run(backend, view=torch.Tensor.detach), problem.run(backend)
    assert found.pop("gradient of input 0") == [None]
    assert_same_bits(found, {name: expected[name] for name in found})


@pytest.mark.parametrize("stride", [1, 2])
@EVERYWHERE
def test_ties_go_to_the_first_maximum(backend, stride):
    options = dict(inputs=1, nodes=1, K=2, stride=stride, primitives=("none", "max_pool_3x3"))
    assert_as_good_as_torch(backend, CellProblem((2, 6, 6), place=torch.Tensor.round_, **options))


@over(
    ("cpu", (F32,), {"cell": dict(channels=16, draws=5)}),
    ("triton", (F32,), {"mixed op": dict(inputs=1, nodes=1, primitives=FEW[1:], draws=1)}),
)
def test_branch_outputs_kept_in_bfloat16(backend, dtype, options):
    """In the median of draws: rounding takes values across a ReLU's kink."""
    options = dict(options)
    rows = []
    for problem in [
        CellProblem((4, 8, 8), dtype, edge_weights=True, **options) for _ in range(options.pop("draws"))
    ]:
        exact, rounded = problem.run(backend), problem.run(backend, memory="bfloat16")
        gaps, sizes = errors(rounded, exact), size_of(exact)
        rows.append({name: (gaps[name][-1] / sizes[name][-1]).item() for name in gaps})
    for name in rows[0]:
        gap = statistics.median(row[name] for row in rows)
        assert gap < (0.03 if name.startswith("gradient") else 0.005), name
        assert gap > 0 or not name.startswith(("gradient of input", "gradient of weight")), name
    # the states of Triton are those of exact outputs
    assert backend.name == "cpu" or rows[0]["output 0"] == 0


@on("emulated", "gpu")
def test_branch_outputs_have_the_dtype_of_states(backend):
    problem = small(backend, F32, nodes=1)
    assert_same_bits(problem.run(backend, memory="bfloat16"), problem.run(backend))


STRIDES = {f"stride {stride}": dict(stride=stride) for stride in (1, 2)}
SMALL_201 = {"NAS-Bench-201": NASBENCH201 | dict(channels=4, nodes=2)}


@over(
    ("cpu", (F64,), STRIDES | SMALL_201),
    ("emulated", (F64,), STRIDES | SMALL_201),
    ("triton", (F64,), {"stride 2": dict(stride=2)}),
    ("gpu", (F64,), STRIDES | SMALL_201),
)
def test_gradcheck(backend, dtype, options):
    problem = small(backend, **dict(shape=(2, 2, 4), K=2, nodes=1) | options)
    edges, inputs, weights = problem.leaves(backend)
    norms = [part for part in edges.modules() if isinstance(part, nn.BatchNorm2d)]

    def cell(*leaves):
        inputs, (op_weights, edge_weights, *parameters) = (
            leaves[: -2 - 2 * len(norms)],
            leaves[-2 - 2 * len(norms) :],
        )
        for norm, gamma, beta in zip(norms, parameters[::2], parameters[1::2], strict=True):
            norm._parameters.update(weight=gamma, bias=beta)
        return tuple(backend.cell(list(edges), inputs, op_weights, edge_weights))

    parameters = [p.detach().requires_grad_() for norm in norms for p in norm.parameters()]
    assert torch.autograd.gradcheck(cell, [*inputs, *weights, *parameters], fast_mode=True)


@EVERYWHERE
def test_backward_twice(backend):
    problem = small(backend, inputs=1, nodes=1)
    edges, inputs, weights = problem.leaves(backend)
    [node] = problem.compute(backend, edges, inputs, *weights)
    loss = node.square().sum()
    first, second = (torch.autograd.grad(loss, [*inputs, *weights], retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize(
    "options",
    [dict(nodes=1), dict(), dict(concat=True), dict(concat=True, memory="recompute"), dict(train=False)],
    ids=str,
)
@EVERYWHERE
def test_outputs_may_be_changed_in_place(backend, options):
    shape = {name: options[name] for name in ("nodes", "train") if name in options}
    call = {name: options[name] for name in ("concat", "memory") if name in options}
    problem = small(backend, inputs=1, primitives=("skip_connect", "sep_conv_3x3", "noise"), **shape)
    results = []
    for change in (lambda y: y.mul_(2).relu_(), lambda y: (2 * y).relu()):
        edges, inputs, weights = problem.leaves(backend)
        outputs = problem.compute(backend, edges, inputs, *weights, **call)
        loss = sum(change(y).square().sum() for y in outputs)
        leaves = [*inputs, *weights, *(p for p in edges.parameters() if p.requires_grad)]
        results += [torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2)]
        with torch.no_grad():
            outputs[0].zero_()
    for found in results[1:]:
        assert all(map(torch.equal, found, results[0]))


@EVERYWHERE
def test_trains_after_a_pass_in_inference_mode(backend):
    problem = small(backend, inputs=1, nodes=1)
    edges, inputs, weights = problem.leaves(backend)
    with torch.inference_mode():
        problem.compute(backend, edges, inputs, *weights)
    [node] = problem.compute(backend, edges, inputs, *weights)
    assert torch.autograd.grad(node.sum(), weights)[0].isfinite().all()


CHANGES = {
    "drawn anew": nn.init.normal_,
    "data": lambda weight: weight.data.mul_(2),
    "other data": lambda weight: setattr(weight, "data", torch.randn_like(weight)),
    "NumPy": lambda weight: weight.detach().numpy().fill(0.2),
    "one number": lambda weight: weight.data[-1, -1, -1].fill_(3.0),
}


@pytest.mark.parametrize("change", CHANGES)
@EVERYWHERE
def test_frozen_weights_that_change_are_packed_again(backend, change):
    if backend.device != "cpu" and change in ("data", "NumPy", "one number"):
        pytest.skip("changes that nobody counts are noticed on the CPU")
    problem = CellProblem((2, 4, 6), inputs=1, nodes=1, primitives=("sep_conv_3x3", "dil_conv_3x3"))
    edges, inputs, weights = problem.leaves(backend)
    [before] = problem.compute(backend, edges, inputs, *weights)
    convs = [conv for conv in edges.modules() if isinstance(conv, nn.Conv2d)]
    for conv in convs[:1] if change == "one number" else convs:
        CHANGES[change](conv.weight)
    # what is not seen at once is within so many calls
    for _ in range(16 if change == "one number" else 0):
        problem.compute(backend, edges, inputs, *weights)
    [found], [expected] = (
        problem.compute(each, edges, inputs, *weights) for each in (backend, Oracle(backend.device))
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(found, before)


@EVERYWHERE
def test_noise_is_drawn_anew_and_its_weight_has_a_gradient(backend):
    problem = CellProblem((2, 8, 8), F32, channels=16, nodes=1, primitives=("noise", "skip_connect"))
    edges, inputs, _ = problem.leaves(backend)
    op_weights = torch.tensor([[1.0, 0.0], [0.0, 0.0]], device=backend.device, requires_grad=True)
    [first], [second] = (backend.cell(list(edges), inputs, op_weights) for _ in range(2))
    assert not torch.equal(first, second)
    assert abs(first.std().item() - 1) < 0.1
    [gradient] = torch.autograd.grad((first * first.detach()).sum(), op_weights)
    torch.testing.assert_close(gradient[0, 0], first.detach().square().sum())


@EVERYWHERE
def test_one_value_per_channel_is_refused(backend):
    problem = small(backend, shape=(1, 1, 1))
    edges, inputs, weights = problem.leaves(backend)
    with pytest.raises(ValueError, match="more than one value per channel"):
        problem.compute(backend, edges, inputs, *weights)


@on("emulated", "triton", "gpu")
def test_autocast_decides_the_dtype_of_states(backend):
    problem = small(backend, F32, inputs=1)
    edges, inputs, weights = problem.leaves(backend)
    with torch.autocast(backend.device, BF16):
        nodes = problem.compute(backend, edges, inputs, *weights)
    assert all(node.dtype == BF16 for node in nodes)
    grads = torch.autograd.grad(nodes, [*inputs, *weights], [*map(torch.ones_like, nodes)])
    assert all(grad.dtype == F32 for grad in grads)
    for i, [expected] in enumerate([*problem.run(TRUTH, F64).values()][: len(nodes)]):
        assert (nodes[i].cpu() - expected).norm() < 0.02 * expected.norm()


@on("cpu", "emulated", "gpu")
@pytest.mark.parametrize("concat", [False, True])
def test_opcheck(backend, concat):
    """Aliases of every op that a cell calls, and its fake's shapes, strides and dtypes."""
    recorded = RecordedOps(backend.backend)
    problem = small(backend, F32, channels=8, K=2, stride=2)
    problem.run(Kernels(recorded.backend, backend.device), memory="recompute", concat=concat)
    recorded.opcheck("cell_forward", "cell_branch_outputs", "cell_backward", "update_running_stats")
