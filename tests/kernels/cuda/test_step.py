"""What the host does around the kernels: tracing, recording a step, autocast."""

import warnings
from unittest.mock import Mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rfdarts_fast import ops
from rfdarts_fast.runs.graph import GraphedStep
from rfdarts_fast.runs.meters import Meter
from rfdarts_fast.nn import SearchNetwork, freeze_random_features
from rfdarts_fast.nn.primitives import FactorizedReduce, ReLUConvBN
from rfdarts_fast.ops import use_backend
from rfdarts_fast.ops.compiled import cpu, cuda, conv_bn
from rfdarts_fast.search import run as search_run
from rfdarts_fast.search import search
from rfdarts_fast.search.architect import gradients
from rfdarts_fast.spaces import get_space
from tests.asked import Asked
from tests.kernels.cuda.emulated import make_edges

needs_schemas = pytest.mark.skipif(not cpu.status()["built"], reason="needs the compiled ops' schemas")


def without_data(module):
    """The module on a CUDA device that need not exist; inside FakeTensorMode."""
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                empty = torch.empty(p.shape, dtype=p.dtype)
                part._parameters[name] = torch.nn.Parameter(empty, requires_grad=p.requires_grad)
        for name, b in part._buffers.items():
            part._buffers[name] = torch.empty(b.shape, dtype=b.dtype)
    return module


class Context:
    """What autograd gives to a function; a torch without CUDA builds no graph for its tensors."""

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors):
        pass

    set_materialize_grads = mark_non_differentiable


@needs_schemas
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("concatenate", [False, True])
@pytest.mark.parametrize("memory", ["fast", "recompute"])
def test_host_side_on_a_device_that_is_not_there(monkeypatch, dtype, concatenate, memory):
    modules = make_edges(channels=8, K=2, stride=2)
    context = Context()

    def apply(*arguments):
        context.needs_input_grad = [True] * len(arguments)
        return cpu.CellFunction.forward(context, *arguments)

    monkeypatch.setattr(cpu.CellFunction, "apply", apply)
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        edges = list(without_data(modules))
        # in the layout that needs no copy
        inputs = [torch.empty(2, 6, 10, 8, dtype=dtype).permute(0, 3, 1, 2) for _ in range(2)]
        weights, edge_weights = torch.empty(5, 8), torch.empty(5)
        assert cuda.unsupported(edges, inputs) is None
        nodes = cuda.mixed_cell(edges, inputs, weights, edge_weights, memory=memory, concatenate=concatenate)
        assert [tuple(x.shape) for x in nodes] == ([(2, 16, 3, 5)] if concatenate else 2 * [(2, 8, 3, 5)])
        assert all(x.device.type == "cuda" and x.dtype == dtype for x in nodes)
        grads = cpu.CellFunction.backward(context, *map(torch.empty_like, nodes), None)
        assert grads[:5] == (None,) * 5
        norms = sum(isinstance(part, torch.nn.BatchNorm2d) for part in modules.modules())
        found = [(tuple(x.shape), x.dtype) for x in grads[5:]]
        gamma = (norms, 4), torch.float32
        assert found == [
            gamma, gamma, ((5, 8), torch.float32), ((5,), torch.float32), *2 * [((2, 8, 6, 10), dtype)]
        ]  # fmt: skip
        assert all(x.device.type == "cuda" for x in grads[5:])


@needs_schemas
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("memory", ["fast", "recompute"])
def test_host_side_of_the_preprocessing(monkeypatch, dtype, reduce, memory):
    modules = FactorizedReduce(16, 8) if reduce else ReLUConvBN(16, 8, 1)
    context = Context()

    def apply(*arguments):
        context.needs_input_grad = [True] * len(arguments)
        return conv_bn.ConvNormFunction.forward(context, *arguments)

    monkeypatch.setattr(conv_bn.ConvNormFunction, "apply", apply)
    monkeypatch.setattr(cuda, "missing", lambda: None)
    modules.requires_grad_(False)
    side = (3, 5) if reduce else (6, 10)
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad(), use_backend("native", memory):
        module, x = without_data(modules), torch.empty(2, 6, 10, 16, dtype=dtype).permute(0, 3, 1, 2)
        out = module(x)
        assert (tuple(out.shape), out.dtype, out.device.type) == ((2, 8, *side), dtype, "cuda")
        *options, dx, gamma, beta = conv_bn.ConvNormFunction.backward(context, torch.empty_like(out), None)
        assert (tuple(dx.shape), dx.dtype, dx.stride()) == ((2, 16, 6, 10), dtype, x.stride())
        assert [(tuple(x.shape), x.dtype) for x in (gamma, beta)] == 2 * [((8,), torch.float32)]
        assert options == [None] * 5


def test_why_not_names_the_reason():
    edges = list(make_edges(channels=6, K=3))
    x = torch.empty(2, 6, 4, 4)
    assert cuda.why_not(edges, [x, x]) == "inputs that are not all on one CUDA device"
    assert cuda.unsupported(edges, [x, x]) == "no kernels for K=3"
    assert "dtype" in cuda.unsupported(edges, [x.to(torch.int32)] * 2)
    wide = list(make_edges(channels=512, nodes=1, inputs=1))
    assert "512" in cuda.unsupported(wide, [torch.empty(1, 512, 2, 2)])


def test_a_step_never_asks_for_a_value(emulation, monkeypatch):
    """Or it could not be recorded in a CUDA graph."""
    monkeypatch.setattr(cpu, "why_not", cuda.unsupported)
    monkeypatch.setattr(cpu, "why_not_conv", cuda.unsupported_conv)
    preprocess = Mock(side_effect=cuda.relu_conv_bns)
    monkeypatch.setattr(cpu, "relu_conv_bns", preprocess)
    network = SearchNetwork(get_space("darts"), C=4, layers=3, K=2, edge_norm=True)
    freeze_random_features(network)
    images, labels, meter = torch.randn(2, 3, 8, 8), torch.tensor([1, 3]), Meter(torch.device("cpu"))
    parameters = [*network.arch_parameters(), *(p for p in network.parameters() if p.requires_grad)]
    with use_backend("native"), Asked() as asked:
        logits = network(images)
        loss = torch.nn.functional.cross_entropy(logits, labels)
        grads = gradients(loss, parameters)
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        torch.nn.utils.clip_grad_norm_(parameters, 5.0)
        meter.add(loss, logits, labels)
    assert asked.found == []
    assert loss.isfinite()
    # two in every cell
    assert sum(len(call.args[1]) for call in preprocess.call_args_list) == 6


def played_back(work):
    """A recorder that keeps the work itself."""
    return work


def test_recorded_steps_read_their_arguments_anew():
    seen, total = [], torch.zeros(1)

    def step(kind, x):
        seen.append(kind)
        total.add_(x.sum())

    graphed = GraphedStep(step, played_back, warmup=2)
    for i in range(6):
        graphed("a", torch.full((2,), float(i)))
    graphed("a", torch.ones(3))
    graphed("b", torch.ones(2))
    assert total.item() == 2 * sum(range(6)) + 3 + 2
    assert seen == ["a"] * 7 + ["b"]


@pytest.mark.parametrize("required", [False, True])
def test_a_step_that_cannot_be_recorded(required):
    def refuse(work):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    total = torch.zeros(1)
    graphed = GraphedStep(lambda kind, x: total.add_(x), refuse, warmup=1, required=required)
    graphed("a", torch.ones(1))
    if required:
        with pytest.raises(RuntimeError, match="not permitted"):
            graphed("a", torch.ones(1))
        return
    with pytest.warns(RuntimeWarning, match="not permitted"):
        graphed("a", torch.ones(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graphed("a", torch.ones(1))
    assert total.item() == 3


def test_a_search_in_recorded_steps_is_the_same_search(tiny_search, tmp_path, monkeypatch):
    alphas = []
    for graphed in (False, True):
        monkeypatch.setattr(search_run, "uses_graph", lambda *_, graphed=graphed: graphed)
        monkeypatch.setattr(search_run, "Recorder", lambda: played_back)
        out = tmp_path / str(graphed)
        search(tiny_search(out=out, arch_warmup_epochs=1, epochs=3))
        alphas.append(torch.load(out / "checkpoint.pt", weights_only=False)["network"]["alphas"])
    torch.testing.assert_close(*alphas, rtol=1e-4, atol=1e-6)


@needs_schemas
@pytest.mark.parametrize("memory", ["fast", "recompute"])
def test_autocast_on_the_cpu_keeps_branch_outputs_in_bfloat16(memory):
    edges = list(make_edges(channels=4).float())
    inputs = [torch.randn(2, 4, 6, 6) for _ in range(2)]
    weights = torch.rand(5, 8).softmax(-1)
    half = [x.bfloat16() for x in inputs]
    with use_backend("native", memory), torch.autocast("cpu", torch.bfloat16):
        found = [ops.mixed_cell(edges, x, weights) for x in (inputs, half)]
        together = ops.concatenated_cell(edges, inputs, weights)
    kept = "bfloat16" if memory == "fast" else memory
    expected = [cpu.mixed_cell(edges, [y.float() for y in x], weights, memory=kept) for x in (inputs, half)]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(torch.cat(expected[0], 1), together, rtol=0, atol=0)
    exact = cpu.mixed_cell(edges, inputs, weights)
    same = all(torch.equal(a, b) for a, b in zip(exact, expected[0], strict=True))
    assert same == (memory == "recompute")


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_search_in_bfloat16(tiny_search, tmp_path, backend):
    search(tiny_search(amp="bf16", space="darts", channels=4, backend=backend))
    state = torch.load(tmp_path / "run/checkpoint.pt", weights_only=False)["network"]
    parts = [x for x in state.values() if x.is_floating_point()]
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in parts)
