"""The host's part of the CUDA backend: shapes, dtypes and devices; reasons; steps that can be recorded."""

from unittest.mock import Mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rfdarts_fast.runs.meters import Meter
from rfdarts_fast.nn import SearchNetwork, freeze_random_features
from rfdarts_fast.nn.primitives import FactorizedReduce, ReLUConvBN
from rfdarts_fast.ops import use_backend
from rfdarts_fast.ops.compiled import cpu, cuda
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


def backward(outputs):
    """The gradients that the outputs' autograd node returns. A torch without CUDA records it, but cannot run it."""
    with torch.no_grad():
        grads = outputs[0].grad_fn.apply(*map(torch.empty_like, outputs), None)
    return [grad for grad in grads if grad is not None]


@needs_schemas
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("concatenate", [False, True])
@pytest.mark.parametrize("memory", ["fast", "recompute"])
def test_host_side_on_a_device_that_is_not_there(dtype, concatenate, memory):
    modules = make_edges(channels=8, K=2, stride=2)
    norms = sum(isinstance(part, torch.nn.BatchNorm2d) for part in modules.modules())
    with FakeTensorMode(), torch.device("cuda"):
        edges = list(without_data(modules))
        # in the layout that needs no copy
        inputs = [
            torch.empty(2, 6, 10, 8, dtype=dtype).permute(0, 3, 1, 2).requires_grad_() for _ in range(2)
        ]
        weights, edge_weights = torch.empty(5, 8), torch.empty(5)
        assert cuda.unsupported(edges, inputs) is None
        nodes = cuda.mixed_cell(edges, inputs, weights, edge_weights, memory=memory, concatenate=concatenate)
        assert [tuple(x.shape) for x in nodes] == ([(2, 16, 3, 5)] if concatenate else 2 * [(2, 8, 3, 5)])
        assert all(x.device.type == "cuda" and x.dtype == dtype for x in nodes)
        grads = backward(nodes)
        gamma = (norms, 4), torch.float32
        assert [(tuple(x.shape), x.dtype) for x in grads] == [
            gamma, gamma, ((5, 8), torch.float32), ((5,), torch.float32), *2 * [((2, 8, 6, 10), dtype)]
        ]  # fmt: skip
        assert all(x.device.type == "cuda" for x in grads)


@needs_schemas
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("memory", ["fast", "recompute"])
def test_host_side_of_the_preprocessing(monkeypatch, dtype, reduce, memory):
    module = FactorizedReduce(16, 8) if reduce else ReLUConvBN(16, 8, 1)
    monkeypatch.setattr(cuda, "missing", lambda: None)
    freeze_random_features(module)
    side = (3, 5) if reduce else (6, 10)
    with FakeTensorMode(), torch.device("cuda"), use_backend("native", memory):
        x = torch.empty(2, 6, 10, 16, dtype=dtype).permute(0, 3, 1, 2).requires_grad_()
        out = without_data(module)(x)
        assert (tuple(out.shape), out.dtype, out.device.type) == ((2, 8, *side), dtype, "cuda")
        dx, gamma, beta = backward([out])
        assert (tuple(dx.shape), dx.dtype, dx.stride()) == ((2, 16, 6, 10), dtype, x.stride())
        assert [(tuple(x.shape), x.dtype) for x in (gamma, beta)] == 2 * [((8,), torch.float32)]
        assert all(x.device.type == "cuda" for x in (dx, gamma, beta))


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
