"""The backend as the package sees it: its place among others, its refusals, its work on the host."""

import gc
import importlib
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
from rfdarts_fast.ops.plan import plan_of
from rfdarts_fast.spaces import DARTS_PRIMITIVES
from tests.asked import Asked
from tests.kernels.oracles import on
from tests.kernels.problems import CellProblem
from tests.kernels.triton.device import DEVICE, SWITCH

BACKEND = backends()["triton"]
FEW = ("none", "max_pool_3x3", "avg_pool_3x3", "skip_connect", "sep_conv_3x3", "dil_conv_3x3")
PARAMETER_FREE = ("none", "skip_connect")


def cell(**options):
    return CellProblem((2, 4, 6), torch.float32, **dict(inputs=1, nodes=1) | options)


@pytest.fixture(autouse=True)
def found_anew():
    """Reasons are found once in a process, and these tests change them."""
    caches = triton._kernels, triton._unavailable_reason
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@on("triton")
def test_mixed_ops_of_a_network_use_the_backend(backend):
    edge = MixedOp(FEW, 4, 1, 2).to(DEVICE)
    for conv in edge.modules():
        if isinstance(conv, torch.nn.Conv2d):
            conv.requires_grad_(False)
    x, op_weights = torch.randn(2, 4, 4, 4).to(DEVICE), torch.rand(len(FEW)).to(DEVICE)
    with use_backend("reference"):
        expected = edge(x, op_weights)
    with use_backend("triton"):
        node = edge(x, op_weights)
        torch.testing.assert_close(ops.concat_cell([edge], [x], op_weights[None]), node, rtol=0, atol=0)
    torch.testing.assert_close(node, expected, rtol=1e-4, atol=1e-4)
    assert node.is_contiguous(memory_format=torch.channels_last)


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


def against(edges, *inputs):
    """The reason against a cell on any machine."""
    op_weights = torch.rand(len(edges), len(edges[0].primitives))
    return triton.unsupported_anywhere(cell_call(list(edges), inputs, op_weights))


def test_reasons_against_a_cell():
    problem = cell(primitives=PARAMETER_FREE, channels=6, K=3)
    [x] = problem.inputs
    assert against(problem.module, x) == "no kernels for K=3"
    assert "dtype" in against(problem.module, x.int())
    problem = cell(primitives=PARAMETER_FREE, inputs=2)
    edges, x = problem.module, problem.inputs[0]
    assert against(edges, x, x) is None
    assert against(edges, x, x.float()) == "inputs of different dtypes"
    assert against(edges, x, x[:1]) == "inputs of different sizes"
    huge = torch.empty(2**14, 4, 2**8, 2**8, device="meta", dtype=torch.float64)
    assert "no kernels for inputs of" in against(edges, huge, huge)
    trained = cell()
    next(m for m in trained.module.modules() if isinstance(m, torch.nn.Conv2d)).weight.requires_grad_(True)
    assert "trained" in against(trained.module, *trained.inputs)


def test_edges_of_different_strides_are_refused():
    edges = [MixedOp(("none", "max_pool_3x3"), 4, stride).double() for stride in (2, 1)]
    x = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    assert against(edges, x, x) == "edges of different strides from one state"


@on("triton")
def test_layers_are_those_of_the_reference_where_triton_runs(backend, monkeypatch):
    module, x = FactorizedReduce(4, 6).to(DEVICE), torch.randn(2, 4, 6, 6).to(DEVICE)
    with use_backend("reference"):
        expected = module(x)
    with use_backend("triton"):
        torch.testing.assert_close(module(x), expected, rtol=0, atol=0)
        monkeypatch.delenv(SWITCH, raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        triton._unavailable_reason.cache_clear()
        with pytest.raises(BackendError, match="triton cannot run: there is no CUDA device"):
            module(x)


def test_backends_of_a_gpu_in_order():
    assert [name for name, backend in backends().items() if "cuda" in backend.devices] == ["cuda", "triton"]


def test_importing_the_package_leaves_triton_alone():
    code = "import sys, rfdarts_fast.ops; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.fixture
def launched(backend, monkeypatch):
    """Names of the kernels that are launched; none runs, so that their results stay NaN."""
    tuning = importlib.import_module("rfdarts_fast.ops.triton.tuning")
    names = []
    monkeypatch.setattr(tuning, "launch", lambda kernel, *_, **__: names.append(kernel.fn.fn.__name__))
    return names


@pytest.mark.parametrize("memory", ["fast", "recompute"])
@on("triton")
def test_the_host_never_asks_for_a_value(backend, launched, memory):
    """Or a step could not be recorded in a CUDA graph."""
    problem = cell(K=2, channels=8, nodes=2, stride=2, primitives=("noise", *DARTS_PRIMITIVES))
    edges, inputs, weights = problem.leaves(backend)

    def step():
        nodes = problem.compute(backend, edges, inputs, *weights, memory=memory)
        torch.autograd.grad(nodes, [*inputs, *weights], [*map(torch.ones_like, nodes)])

    # constants are made once
    step()
    with Asked() as asked:
        step()
    assert asked.found == []
    assert "input_gradient_kernel" in launched


@on("triton")
def test_edges_share_launches(backend, launched):
    counts = []
    for nodes in (1, 2, 4):
        del launched[:]
        cell(inputs=2, nodes=nodes).run(backend)
        counts.append(len(launched))
    # one more state and one more node, however many edges between them
    assert counts[1] - counts[0] == (counts[2] - counts[1]) / 2
    assert launched.count("node_kernel") == 4
    assert launched.count("input_gradient_kernel") == 5
    # four groups of first halves and two of second halves of each state
    assert launched.count("depthwise_kernel") == 5 * 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("concat", [False, True])
@pytest.mark.parametrize("memory", ["fast", "bfloat16", "recompute"])
@on("triton")
def test_host_side_on_another_device(backend, launched, monkeypatch, dtype, concat, memory):
    """Shapes and dtypes, on a device whose tensors hold no data: none may be made on the CPU."""
    # torch knows no autocast there
    for module in (triton, importlib.import_module("rfdarts_fast.ops.triton.autograd")):
        monkeypatch.setattr(module, "storage_dtype", lambda x: x.dtype)
    primitives = "noise", *DARTS_PRIMITIVES
    problem = cell(primitives=primitives, channels=8, K=2, stride=2, nodes=2, inputs=2)
    edges = problem.module.float().to("meta")
    with torch.device("meta"):
        inputs = [torch.empty(2, 8, 6, 10, dtype=dtype, requires_grad=True) for _ in range(2)]
        weights = torch.empty(5, 9, requires_grad=True), torch.empty(5, requires_grad=True)
    call = cell_call(list(edges), inputs, *weights, memory, concat)
    assert triton.unsupported_anywhere(call) is None
    nodes = BACKEND.mixed_cell(call)
    assert [tuple(x.shape) for x in nodes] == ([(2, 16, 3, 5)] if concat else 2 * [(2, 8, 3, 5)])
    assert all(x.device.type == "meta" and x.dtype == dtype for x in nodes)
    torch.autograd.backward(nodes, [torch.empty_like(node) for node in nodes])
    for leaf in [*inputs, *weights, *(p for p in edges.parameters() if p.requires_grad)]:
        assert (leaf.grad.shape, leaf.grad.dtype, leaf.grad.device) == (leaf.shape, leaf.dtype, leaf.device)
    assert "depthwise_kernel" in launched and "bypass_backward_kernel" in launched


@on("triton")
def test_a_layout_lives_as_long_as_its_plan(backend):
    layouts = importlib.import_module("rfdarts_fast.ops.triton.layout")
    edges = list(cell(nodes=2, primitives=FEW).module)
    plan = plan_of(edges, 1)
    layout = layouts.layout_of(plan)
    assert layouts.layout_of(plan) is layout
    edges[1]._ops[3] = torch.nn.Identity()
    assert layouts.layout_of(plan_of(edges, 1)) is not layout
    layout = weakref.ref(layout)
    del plan
    gc.collect()
    assert layout() is None
