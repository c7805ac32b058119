"""The Triton backend against the reference in float64."""

import dataclasses
import importlib

import pytest
import torch

from rfdarts_fast.ops import reference, use_backend
from tests.kernels.cuda.emulated import errors, wave
from tests.kernels.triton.call import mixed_cell
from tests.kernels.triton.cases import ALL, FEW, Cell, assert_equal, assert_exact
from tests.kernels.triton.device import DEVICE

pytestmark = pytest.mark.usefixtures("kernels")

# on a GPU too: pointwise products in float64 are as good there
CELLS = {
    "DARTS": dict(primitives=ALL, nodes=2),
    "DARTS, stride 2": dict(primitives=ALL, shape=(2, 8, 6), stride=2),
    "two inputs": dict(inputs=2, nodes=2, primitives=("skip_connect", "sep_conv_3x3", "max_pool_3x3")),
    "two inputs, stride 2": dict(
        inputs=2, nodes=2, stride=2, primitives=("skip_connect", "sep_conv_3x3", "avg_pool_3x3")
    ),
    "S1": dict(
        nodes=2,
        primitives=[("skip_connect", "dil_conv_5x5"), ("sep_conv_5x5", "none"), ("max_pool_3x3", "none")],
    ),
    "noise": dict(primitives=("noise", "sep_conv_3x3"), nodes=2),
    "no convolution": dict(primitives=("none", "skip_connect"), nodes=2),
    "no BatchNorm, K=2": dict(primitives=("none", "skip_connect"), K=2),
    "pools": dict(primitives=("avg_pool_3x3", "max_pool_3x3"), shape=(2, 1, 1)),
    "one channel": dict(channels=1, shape=(1, 7, 5)),
    "three channels": dict(channels=3, shape=(3, 1, 3)),
    "five channels": dict(channels=5, shape=(5, 3, 1)),
    "seven channels": dict(channels=7, shape=(1, 3, 7)),
    "more than a tile of channels": dict(channels=68, shape=(2, 2, 3)),
    "K=2": dict(K=2, channels=6, shape=(3, 5, 3), nodes=2),
    "K=4": dict(K=4, channels=20, shape=(1, 5, 7)),
    "K=8": dict(K=8, channels=8, shape=(2, 3, 3), primitives=("skip_connect", "sep_conv_3x3")),
    "K=2, stride 2": dict(
        K=2, channels=4, stride=2, shape=(2, 6, 10), nodes=2, inputs=2, primitives=FEW[1:4]
    ),
    "K=4, stride 2": dict(K=4, channels=8, stride=2, shape=(3, 2, 6), nodes=2),
    "not affine": dict(affine=False),
    "no running statistics": dict(track=False),
}


@pytest.mark.parametrize("options", CELLS.values(), ids=CELLS)
def test_matches_the_reference(options):
    assert_exact(Cell(**options))


EVALUATED = {
    "stride 1": dict(K=2, channels=6, nodes=2, primitives=FEW[2:]),
    "stride 2": dict(K=2, channels=4, stride=2, shape=(1, 2, 2)),
}


@pytest.mark.parametrize("options", EVALUATED.values(), ids=EVALUATED)
def test_evaluation_mode_uses_running_statistics(options):
    assert_exact(Cell(train=False, **options))


@pytest.fixture
def small_tiles(kernels, monkeypatch):
    """Cuts a small case as a large one is: several tiles, several parts of sums, several tiles in each."""
    tuning = importlib.import_module("rfdarts_fast.ops.triton.tuning")
    for name, value in {"TILE": 128, "CHUNK": 40, "PARTS": 3, "WIDEST": 2}.items():
        monkeypatch.setattr(tuning, name, value)
    assert tuning.parts(200) == (80, 3)


@pytest.mark.parametrize("options", [dict(K=2, channels=8), dict(stride=2)], ids=str)
def test_many_tiles_and_parts(options, small_tiles):
    assert_exact(Cell((2, 10, 10), primitives=("max_pool_3x3", "skip_connect", "sep_conv_3x3"), **options))


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter checks this")
def test_no_index_overflows(monkeypatch):
    import triton.runtime.interpreter as interpreter

    builder = interpreter.interpreter_builder
    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=True))
    assert_exact(Cell(K=2, stride=2, channels=4))


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("options", [dict(nodes=2), dict(stride=2, K=4, channels=16, inputs=2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_that_of_pytorch_in_the_same_dtype(dtype, options, monkeypatch):
    from rfdarts_fast.ops.triton import tuning

    # the interpreter adds a tile's rows one after the other, a GPU adds them in a tree
    monkeypatch.setattr(tuning, "TILE", 256 if DEVICE == "cpu" else tuning.TILE)
    cell = Cell((4, 6, 10), dtype, primitives=FEW[1:], **options)
    expected = cell.reference()
    ours, plain = errors(cell.ours(), expected), errors(cell.reference(dtype), expected)
    floor = 4 * torch.finfo(dtype).eps
    for name, error in ours.items():
        times = 2 if name in ("states", "running") else 3
        assert error <= times * plain[name] + floor, (name, error, plain[name])


def test_statistics_of_values_far_from_zero():
    """Where a sum of squares in float32 would be all rounding."""
    cell = Cell((4, 8, 8), torch.float32, primitives=("avg_pool_3x3", "max_pool_3x3"))
    cell.inputs = [x + 1000 for x in cell.inputs]
    expected = cell.reference()
    ours, plain = errors(cell.ours(), expected), errors(cell.reference(torch.float32), expected)
    assert ours["states"] <= 2 * plain["states"] + 1e-6
    assert ours["running"] <= 2 * plain["running"] + 1e-6


def test_recomputing_branch_outputs_changes_no_bit():
    cell = Cell(dtype=torch.float32, K=2, channels=8, nodes=2, primitives=("noise", *FEW[1:]))
    assert_equal(cell.ours(memory="recompute"), cell.ours())


def test_branch_outputs_kept_in_bfloat16():
    cell = Cell((4, 8, 8), torch.float32, primitives=FEW[1:])
    exact, rough = cell.ours(), cell.ours(memory="bfloat16")
    assert_equal({"states": rough["states"]}, {"states": exact["states"]})
    found = errors(rough, exact)
    assert 0 < found["inputs"] < 0.03 and 0 < found["norms"] < 0.03


def test_memory_modes_keep_less():
    def saved(memory):
        cell, held = Cell(dtype=torch.float32), {}

        def hold(x):
            held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(hold, lambda x: x):
            inputs = [x.float().to(DEVICE).requires_grad_() for x in cell.inputs]
            edges = list(cell.edges.float().to(DEVICE))
            alive = mixed_cell(edges, inputs, cell.weights.float().to(DEVICE), memory=memory)
        assert alive
        return sum(held.values())

    assert saved("fast") > saved("bfloat16") > saved("recompute")


@pytest.mark.parametrize("K", [1, 2])
def test_concatenated_nodes_are_the_nodes(K):
    cell = Cell(dtype=torch.float32, channels=8, K=K, nodes=2, primitives=("skip_connect", "sep_conv_3x3"))

    def concatenated(*arguments):
        [concat] = mixed_cell(*arguments, concat=True)
        assert concat.is_contiguous(memory_format=torch.channels_last)
        return list(concat.chunk(2, dim=1))

    assert_equal(cell.ours(engine=concatenated), cell.ours())


def test_inputs_in_any_layout():
    cell = Cell(inputs=2, primitives=("max_pool_3x3", "skip_connect", "dil_conv_3x3"))

    def strided(edges, inputs, *arguments):
        wide = torch.nn.functional.pad(inputs[0], (2, 2, 1, 1, 1, 2), value=torch.nan)
        views = wide[:, 1:-2, 1:-1, 2:-2], inputs[1].contiguous(memory_format=torch.channels_last)
        assert not any(x.is_contiguous() for x in views)
        return mixed_cell(edges, views, *arguments)

    assert_equal(cell.ours(engine=strided), cell.ours())


def test_same_tensor_twice_and_expanded_gradients():
    cell = Cell(inputs=2, nodes=2, primitives=("skip_connect", "sep_conv_3x3"))
    gradients = []
    for engine, device in ((mixed_cell, DEVICE), (reference.mixed_cell, "cpu")):
        x = cell.inputs[0].detach().to(device).requires_grad_()
        edges = list(cell.edges.to(device))
        nodes = engine(edges, [x, x], cell.weights.to(device))
        # the first node gets no gradient from outside, the second one without strides
        nodes[1].sum().backward()
        gradients.append(x.grad.cpu())
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


def test_gradients_in_any_layout():
    cell = Cell(K=2, channels=4, nodes=2, primitives=("skip_connect", "dil_conv_3x3"))
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        inputs = [x.detach().to(DEVICE).requires_grad_() for x in cell.inputs]
        nodes = mixed_cell(list(cell.edges.to(DEVICE)), inputs, cell.weights.to(DEVICE))
        torch.manual_seed(2)
        grads = [torch.randn(node.shape, dtype=node.dtype).to(DEVICE) for node in nodes]
        torch.autograd.backward(nodes, [grad.contiguous(memory_format=layout) for grad in grads])
        found.append(inputs[0].grad)
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_backward_twice():
    cell = Cell(primitives=("skip_connect", "sep_conv_3x3"))
    x = cell.inputs[0].to(DEVICE).requires_grad_()
    [node] = mixed_cell(list(cell.edges.to(DEVICE)), [x], cell.weights.to(DEVICE))
    loss = node.pow(2).sum()
    [first] = torch.autograd.grad(loss, x, retain_graph=True)
    [second] = torch.autograd.grad(loss, x)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_a_changed_state_is_noticed_before_the_backward_pass():
    cell = Cell(primitives=("skip_connect", "sep_conv_3x3"))
    x = cell.inputs[0].to(DEVICE).requires_grad_()
    [node] = mixed_cell(list(cell.edges.to(DEVICE)), [x], cell.weights.to(DEVICE))
    node.detach().add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        node.sum().backward()


@pytest.mark.parametrize("train", [True, False])
def test_inputs_that_need_no_gradient(train):
    cell = Cell(primitives=("skip_connect", "sep_conv_3x3"), train=train)
    expected = cell.ours()["norms"]
    nodes = mixed_cell(
        list(cell.edges.to(DEVICE)), [x.to(DEVICE) for x in cell.inputs], cell.weights.to(DEVICE)
    )
    norms = [p for p in cell.edges.parameters() if p.requires_grad]
    found = torch.autograd.grad(sum((node * wave(node).to(DEVICE)).sum() for node in nodes), norms)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=0, atol=0)


@pytest.mark.parametrize("name", FEW[1:])
def test_nan_in_nan_out(name):
    cell = Cell((1, 7, 7), train=False, primitives=("none", name))
    cell.inputs[0][0, 2, 3, 3] = torch.nan
    found, expected = cell.ours(), cell.reference()
    torch.testing.assert_close(found["states"], expected["states"], equal_nan=True)


@pytest.mark.parametrize("stride", [1, 2])
def test_ties_go_to_the_first_maximum(stride):
    cell = Cell((2, 6, 6), K=2, channels=4, stride=stride, primitives=("none", "max_pool_3x3"))
    cell.inputs = [x.round() for x in cell.inputs]
    assert_exact(cell)


def test_results_do_not_depend_on_the_order_of_programs(small_tiles, monkeypatch):
    """A GPU runs a kernel's programs in any order: sums that several of them add to would differ."""
    primitives = "max_pool_3x3", "skip_connect", "sep_conv_3x3"
    cell = Cell((3, 8, 8), torch.float32, primitives, K=2, channels=8)
    expected = cell.ours()
    programs = []
    if DEVICE == "cpu":
        builder = importlib.import_module("triton.runtime.interpreter").interpreter_builder
        set_grid_idx = builder.set_grid_idx

        def backwards(*index):
            programs.append(index)
            set_grid_idx(*(count - 1 - i for i, count in zip(index, builder.grid_dim, strict=True)))

        monkeypatch.setattr(builder, "set_grid_idx", backwards)
    assert_equal(cell.ours(), expected)
    assert DEVICE == "cuda" or max(programs) > (2, 0, 0)


def test_gradcheck():
    cell = Cell((2, 2, 4), channels=4, K=2, stride=2, primitives=("skip_connect", "sep_conv_3x3"))
    edges = list(cell.edges.to(DEVICE))
    norms = [norm for norm in cell.edges.modules() if isinstance(norm, torch.nn.BatchNorm2d)]
    leaves = [*cell.inputs, cell.weights, cell.edge_weights, *(norm.weight for norm in norms)]
    leaves = [leaf.detach().to(DEVICE).requires_grad_() for leaf in leaves]

    def run(x, weights, edge_weights, *gammas):
        for norm, gamma in zip(norms, gammas, strict=True):
            norm._parameters["weight"] = gamma
        return tuple(mixed_cell(edges, [x], weights, edge_weights))

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


def test_frozen_weights_that_change_are_packed_again():
    cell = Cell(primitives=("sep_conv_3x3", "dil_conv_3x3"))
    inputs, weights = [x.to(DEVICE) for x in cell.inputs], cell.weights.to(DEVICE)
    edges = list(cell.edges.to(DEVICE))
    mixed_cell(edges, inputs, weights)
    for conv in cell.edges.modules():
        if isinstance(conv, torch.nn.Conv2d):
            with torch.no_grad():
                conv.weight.normal_()
    with use_backend("reference"):
        expected = reference.mixed_cell(edges, inputs, weights)
    torch.testing.assert_close(mixed_cell(edges, inputs, weights), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: nothing is tuned under the interpreter")
def test_tuned_kernels():
    torch.use_deterministic_algorithms(False)
    for options in (dict(channels=16, nodes=4), dict(channels=32, K=4, stride=2, inputs=2, nodes=2)):
        assert_exact(Cell((4, 32, 32), primitives=ALL, **options))
