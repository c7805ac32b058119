"""The backend as the package sees it: its place among others, its refusals, its work on the host."""

import gc
import importlib.util
import subprocess
import sys
import weakref

import pytest
import torch

from rfdarts_fast import ops
from rfdarts_fast.nn import MixedOp
from rfdarts_fast.nn.primitives import FactorizedReduce
from rfdarts_fast.ops import BackendError, backends, triton, use_backend
from rfdarts_fast.ops.dispatch import cell_call
from tests.asked import Asked
from tests.kernels.triton.call import mixed_cell
from tests.kernels.triton.cases import ALL, FEW, Cell
from tests.kernels.triton.device import DEVICE, SWITCH

BACKEND = backends()["triton"]


@pytest.fixture(autouse=True)
def found_anew():
    """Reasons are found once in a process, and these tests change them."""
    caches = triton._kernels, triton._unavailable_reason
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_mixed_ops_of_a_network_use_the_backend(kernels):
    torch.manual_seed(0)
    edge = MixedOp(FEW, 4, 1, 2).to(DEVICE)
    for conv in edge.modules():
        if isinstance(conv, torch.nn.Conv2d):
            conv.requires_grad_(False)
    x, weights = torch.randn(2, 4, 4, 4).to(DEVICE), torch.rand(len(FEW)).to(DEVICE)
    with use_backend("reference"):
        expected = edge(x, weights)
    with use_backend("triton"):
        found = edge(x, weights)
        torch.testing.assert_close(ops.concat_cell([edge], [x], weights[None]), found, rtol=0, atol=0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_autocast_decides_the_dtype_of_states(kernels):
    cell = Cell(dtype=torch.float32, primitives=("skip_connect", "sep_conv_3x3"))
    edges = list(cell.edges.float().to(DEVICE))
    inputs = [x.float().to(DEVICE).requires_grad_() for x in cell.inputs]
    weights = cell.weights.float().to(DEVICE).requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16), use_backend("triton"):
        assert BACKEND.unsupported_cell(cell_call(edges, inputs, weights)) is None
        [node] = ops.mixed_cell(edges, inputs, weights)
    assert node.dtype == torch.bfloat16
    node.float().sum().backward()
    assert inputs[0].grad.dtype == weights.grad.dtype == torch.float32


def test_a_backend_that_was_named_raises_where_it_cannot_run(monkeypatch):
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    edge = MixedOp(FEW, 4, 1)
    edge.requires_grad_(False)
    with use_backend("triton"), pytest.raises(BackendError, match=r"triton cannot run: .*(CUDA|installed)"):
        edge(torch.randn(2, 4, 4, 4), torch.rand(len(FEW)))


def test_an_absent_triton_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find(name))
    reason = "triton is not installed (pip install 'rfdarts_fast[triton]')"
    assert triton.unavailable_reason() == reason
    assert BACKEND.status() == {"built": False, "reason": reason}


def test_a_device_too_old_is_named(monkeypatch):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton")
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "7.5" in triton.unavailable_reason()


def against(edges, inputs):
    """The reason against a cell on any machine."""
    primitives = len(edges[0].primitives)
    return triton.unsupported_anywhere(cell_call(edges, inputs, torch.rand(len(edges), primitives)))


def test_reasons_against_a_cell():
    cell = Cell(primitives=("none", "skip_connect"), channels=6, K=3)
    edges, [x] = list(cell.edges), cell.inputs
    assert against(edges, [x]) == "no kernels for K=3"
    assert "dtype" in against(edges, [x.int()])
    cell = Cell(primitives=("none", "skip_connect"), inputs=2)
    edges, [x, _] = list(cell.edges), cell.inputs
    assert against(edges, [x, x]) is None
    assert against(edges, [x, x.float()]) == "inputs of different dtypes"
    assert against(edges, [x, x[:1]]) == "inputs of different sizes"
    huge = torch.empty(2**14, 4, 2**8, 2**8, device="meta", dtype=torch.float64)
    assert "no kernels for inputs of" in against(edges, [huge, huge])
    trained = Cell()
    next(m for m in trained.edges.modules() if isinstance(m, torch.nn.Conv2d)).weight.requires_grad_(True)
    assert "trained" in against(list(trained.edges), trained.inputs)


def test_edges_of_different_strides_are_refused():
    edges = [MixedOp(("none", "max_pool_3x3"), 4, stride).double() for stride in (2, 1)]
    x = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    assert against(edges, [x, x]) == "edges of different strides from one state"


def test_one_value_per_channel_is_refused(kernels):
    cell = Cell((1, 1, 1))
    with pytest.raises(ValueError, match="more than one value per channel"):
        mixed_cell(list(cell.edges), cell.inputs, cell.weights)


@pytest.mark.parametrize("where", ["elsewhere", "here"])
def test_layers_are_those_of_the_reference_where_triton_runs(where, request, monkeypatch):
    module, x = FactorizedReduce(4, 6).requires_grad_(False), torch.randn(2, 4, 6, 6)
    with use_backend("triton"):
        if where == "elsewhere":
            monkeypatch.delenv(SWITCH, raising=False)
            monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
            with pytest.raises(BackendError, match=r"triton cannot run: .*(CUDA|installed)"):
                module(x)
            return
        request.getfixturevalue("kernels")
        found = module.to(DEVICE)(x.to(DEVICE))
    with use_backend("reference"):
        torch.testing.assert_close(module(x.to(DEVICE)), found, rtol=0, atol=0)


def test_backends_of_a_gpu_in_order():
    assert [name for name, backend in backends().items() if "cuda" in backend.devices] == ["cuda", "triton"]


def test_importing_the_package_leaves_triton_alone():
    code = "import sys, rfdarts_fast.ops; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.fixture
def launched(kernels, monkeypatch):
    """Names of the kernels that are launched; none runs, so that what they should write stays NaN."""
    tuning = importlib.import_module("rfdarts_fast.ops.triton.tuning")
    names = []
    monkeypatch.setattr(tuning, "launch", lambda kernel, *_, **__: names.append(kernel.fn.fn.__name__))
    return names


@pytest.mark.parametrize("memory", ["fast", "recompute"])
def test_the_host_never_asks_for_a_value(launched, memory):
    """Or a step could not be recorded in a CUDA graph."""
    cell = Cell(dtype=torch.float32, K=2, channels=8, nodes=2, stride=2, primitives=("noise", *ALL))
    # what is made once
    cell.ours(memory=memory)
    with Asked() as asked:
        cell.ours(memory=memory)
    assert asked.found == []
    assert "input_gradient_kernel" in launched


def test_edges_share_launches(launched):
    counts = []
    for nodes in (1, 2, 4):
        del launched[:]
        Cell(inputs=2, nodes=nodes, primitives=ALL, dtype=torch.float32).ours()
        counts.append(len(launched))
    # one more state to stage, one more node: no more launches for the edges between them
    assert counts[1] - counts[0] == (counts[2] - counts[1]) / 2
    assert launched.count("node_kernel") == 4
    assert launched.count("input_gradient_kernel") == 5
    # the four kinds of first halves and the two of second halves of each state
    assert launched.count("depthwise_kernel") == 5 * 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("concat", [False, True])
@pytest.mark.parametrize("memory", ["fast", "bfloat16", "recompute"])
def test_host_side_on_another_device(launched, monkeypatch, dtype, concat, memory):
    """Shapes, dtypes, and that nothing is made on the CPU: on a device whose tensors hold no data."""
    # torch knows no autocast there
    for module in (triton, importlib.import_module("rfdarts_fast.ops.triton.autograd")):
        monkeypatch.setattr(module, "storage_dtype", lambda x: x.dtype)
    case = Cell(primitives=("noise", *ALL), channels=8, K=2, stride=2, nodes=2, inputs=2)
    edges = list(case.edges.float().to("meta"))
    with torch.device("meta"):
        inputs = [torch.empty(2, 8, 6, 10, dtype=dtype, requires_grad=True) for _ in range(2)]
        weights, edge_weights = torch.empty(5, 9, requires_grad=True), torch.empty(5, requires_grad=True)
    assert against(edges, inputs) is None
    nodes = mixed_cell(edges, inputs, weights, edge_weights, memory=memory, concat=concat)
    assert [tuple(x.shape) for x in nodes] == ([(2, 16, 3, 5)] if concat else 2 * [(2, 8, 3, 5)])
    assert all(x.device.type == "meta" and x.dtype == dtype for x in nodes)
    torch.autograd.backward(nodes, [torch.empty_like(node) for node in nodes])
    leaves = [*inputs, weights, edge_weights, *(p for p in case.edges.parameters() if p.requires_grad)]
    for leaf in leaves:
        assert (leaf.grad.shape, leaf.grad.dtype, leaf.grad.device) == (leaf.shape, leaf.dtype, leaf.device)
    assert "depthwise_kernel" in launched and "bypass_backward_kernel" in launched


def test_a_layout_lives_as_long_as_its_plan(kernels):
    from rfdarts_fast.ops.plan import plan_of
    from rfdarts_fast.ops.triton.layout import layout_of

    edges = list(Cell(nodes=2).edges)
    plan = plan_of(edges, 1)
    layout = layout_of(plan)
    assert layout_of(plan) is layout
    edges[1]._ops[3] = torch.nn.Identity()
    assert layout_of(plan_of(edges, 1)) is not layout
    layout = weakref.ref(layout)
    del plan
    gc.collect()
    assert layout() is None
