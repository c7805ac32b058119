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
from rfdarts_fast.spaces import DARTS_PRIMITIVES
from tests.asked import Asked
from tests.kernels.oracles import Kernels, on
from tests.kernels.problems import NASBENCH201, CellProblem
from tests.kernels.triton.device import DEVICE, SWITCH

TRITON = Kernels(backends()["triton"], DEVICE)
FEW = ("none", "max_pool_3x3", "avg_pool_3x3", "skip_connect", "sep_conv_3x3", "dil_conv_3x3")


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


@pytest.mark.parametrize("module", [MixedOp(FEW, 4, 1), FactorizedReduce(4, 6)], ids=["cell", "layer"])
def test_a_backend_that_was_named_raises_where_it_cannot_run(module, monkeypatch):
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    module.requires_grad_(False)
    arguments = [torch.rand(len(FEW))] if isinstance(module, MixedOp) else []
    with use_backend("triton"), pytest.raises(BackendError, match=r"triton cannot run: .*(CUDA|installed)"):
        module(torch.randn(2, 4, 4, 4), *arguments)


def test_an_absent_triton_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find(name))
    reason = "triton is not installed (pip install 'rfdarts_fast[triton]')"
    assert triton.unavailable_reason(0) == reason
    assert TRITON.backend.status() == {"built": False, "reason": reason}


def test_a_device_too_old_is_named(monkeypatch):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton")
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: ((8, 6), (7, 5))[device])
    assert "7.5" not in str(triton.unavailable_reason(0))
    assert triton.unavailable_reason(1) == "Triton needs compute capability 8.0, CUDA device 1 has 7.5"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    status = TRITON.backend.status()
    assert "7.5" in status["not on device 1"] and "not on device 0" not in status


def reason(edges, *inputs):
    """The reason against a cell on any machine."""
    op_weights = torch.rand(len(edges), len(edges[0].primitives))
    return triton.unsupported_anywhere(TRITON.call(list(edges), inputs, op_weights))


def test_reasons_against_a_cell():
    problem = CellProblem(primitives=("none", "skip_connect"), channels=6, K=3, inputs=1, nodes=1)
    [x] = problem.inputs
    assert reason(problem.module, x) == "no kernels for K=3"
    assert "dtype" in reason(problem.module, x.int())
    problem = CellProblem(primitives=("none", "skip_connect"), nodes=1)
    edges, [x, _] = problem.module, problem.inputs
    assert reason(edges, x, x) is None
    assert reason(edges, x, x.float()) == "inputs of different dtypes"
    assert reason(edges, x, x[:1]) == "inputs of different sizes"
    huge = torch.empty(2**14, 4, 2**8, 2**8, device="meta", dtype=torch.float64)
    assert "no kernels for inputs of" in reason(edges, huge, huge)
    with torch.device("meta"):
        wide = MixedOp(("nor_conv_1x1", "nor_conv_3x3"), 2**14, 1).double().requires_grad_(False)
        x = torch.empty(2, 2**14, 1, 1, dtype=torch.float64)
    assert reason([wide], x) == f"no kernels for {10 * 2**28} weights of convolutions that leave one state"
    trained = CellProblem(nodes=1)
    next(m for m in trained.module.modules() if isinstance(m, torch.nn.Conv2d)).weight.requires_grad_(True)
    assert "trained" in reason(trained.module, *trained.inputs)


def test_edges_of_different_strides_are_refused():
    edges = [MixedOp(("none", "max_pool_3x3"), 4, stride).double() for stride in (2, 1)]
    x = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    assert reason(edges, x, x) == "edges of different strides from one state"


@on("triton")
def test_layers_are_those_of_the_reference(backend):
    module, x = (
        FactorizedReduce(4, 6).requires_grad_(False).to(DEVICE),
        torch.randn(2, 4, 6, 6, device=DEVICE),
    )
    with use_backend("triton"):
        found = module(x)
    with use_backend("reference"):
        assert torch.equal(module(x), found)


def test_backends_of_a_gpu_in_order():
    assert [name for name, backend in backends().items() if "cuda" in backend.devices] == ["cuda", "triton"]


def test_importing_the_package_leaves_triton_alone():
    code = "import sys, rfdarts_fast.ops; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.fixture
def launched(backend, monkeypatch):
    """Names of the kernels that are launched; none runs, so that what they should write stays NaN."""
    tuning = importlib.import_module("rfdarts_fast.ops.triton.tuning")
    names = []
    monkeypatch.setattr(tuning, "launch", lambda kernel, *_, **__: names.append(kernel.fn.fn.__name__))
    return names


HOST = {
    "DARTS": dict(K=2, channels=8, stride=2, primitives=("noise", *DARTS_PRIMITIVES)),
    "NAS-Bench-201": NASBENCH201 | dict(channels=8, inputs=2, nodes=2),
}


@pytest.mark.parametrize("memory", ["fast", "recompute"])
@pytest.mark.parametrize("options", HOST.values(), ids=HOST)
@on("triton")
def test_the_host_never_asks_for_a_value(backend, launched, options, memory):
    """Or a step could not be recorded in a CUDA graph."""
    problem = CellProblem(dtype=torch.float32, **options | {"inputs": 1})
    # what is made once
    problem.run(backend, memory=memory)
    with Asked() as asked:
        problem.run(backend, memory=memory)
    assert asked.found == []
    assert "input_gradient_kernel" in launched


@on("triton")
def test_edges_share_launches(backend, launched):
    counts = []
    for nodes in (1, 2, 4):
        del launched[:]
        CellProblem(dtype=torch.float32, nodes=nodes).run(backend)
        counts.append(len(launched))
    # one more state to stage, one more node: no more launches for the edges between them
    assert counts[1] - counts[0] == (counts[2] - counts[1]) / 2
    assert launched.count("node_kernel") == 4
    assert launched.count("input_gradient_kernel") == 5
    # the four kinds of first halves and the two of second halves of each state
    assert launched.count("depthwise_kernel") == 5 * 6


@on("triton")
def test_ordinary_convolutions_share_launches(backend, launched):
    CellProblem(dtype=torch.float32, channels=4, **NASBENCH201).run(backend)
    # those of one kernel size that leave one of the three states
    assert launched.count("nor_conv_kernel") == 3 * 2
    assert launched.count("nor_conv_backward_kernel") == 3
    # what they make is not read again for its statistics, and pools have none
    assert "statistics_kernel" not in launched


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("concat", [False, True])
@pytest.mark.parametrize("memory", ["fast", "bfloat16", "recompute"])
@pytest.mark.parametrize("options", HOST.values(), ids=HOST)
@on("triton")
def test_host_side_on_another_device(backend, launched, monkeypatch, dtype, options, concat, memory):
    """Shapes, dtypes, and that nothing is made on the CPU: on a device whose tensors hold no data."""
    # torch knows no autocast there
    for module in (triton, importlib.import_module("rfdarts_fast.ops.triton.autograd")):
        monkeypatch.setattr(module, "storage_dtype", lambda x: x.dtype)
    problem = CellProblem((2, 6, 10), **options)
    edges, inputs, weights = problem.leaves(Kernels(backend.backend, "meta"), dtype)
    call = backend.call(list(edges), inputs, *weights, memory=memory, concat=concat)
    assert triton.unsupported_anywhere(call) is None
    nodes = backend.backend.mixed_cell(call)
    size = (3, 5) if options.get("stride") == 2 else (6, 10)
    assert [tuple(x.shape) for x in nodes] == ([(2, 16, *size)] if concat else 2 * [(2, 8, *size)])
    assert all(x.device.type == "meta" and x.dtype == dtype for x in nodes)
    torch.autograd.backward(nodes, [torch.empty_like(node) for node in nodes])
    for leaf in (*inputs, *weights, *(p for p in edges.parameters() if p.requires_grad)):
        assert (leaf.grad.shape, leaf.grad.dtype, leaf.grad.device) == (leaf.shape, leaf.dtype, leaf.device)
    assert "input_gradient_kernel" in launched
    assert ("bypass_backward_kernel" in launched) != ("nor_conv_backward_kernel" in launched)


@on("triton")
def test_a_layout_lives_as_long_as_its_plan(backend):
    from rfdarts_fast.ops.plan import plan_of
    from rfdarts_fast.ops.triton.layout import layout_of

    edges = list(CellProblem(primitives=FEW, inputs=1).module)
    plan = plan_of(edges, 1)
    layout = layout_of(plan)
    assert layout_of(plan) is layout
    edges[1]._ops[3] = torch.nn.Identity()
    assert layout_of(plan_of(edges, 1)) is not layout
    layout = weakref.ref(layout)
    del plan
    gc.collect()
    assert layout() is None
