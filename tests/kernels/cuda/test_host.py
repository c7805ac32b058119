"""The host's part of the CUDA backend: shapes, dtypes and devices; reasons; steps that can be recorded."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rfdarts_fast.nn import SearchNetwork, freeze_random_features
from rfdarts_fast.nn.primitives import FactorizedReduce, ReLUConvBN
from rfdarts_fast.ops import ReLUConvBNLayer, backends, contract, reference, use_backend
from rfdarts_fast.ops.compiled import cuda
from rfdarts_fast.runs.meters import Meter
from rfdarts_fast.search.architect import gradients
from rfdarts_fast.spaces import get_space
from tests.asked import Asked
from tests.kernels.oracles import Kernels, RecordedOps
from tests.kernels.problems import NASBENCH201, CellProblem, LayerProblem

CUDA = Kernels(backends()["cuda"], "cuda")
needs_schemas = pytest.mark.skipif(
    not backends()["cpu"].status()["built"], reason="needs the compiled ops' schemas"
)


@pytest.fixture
def with_gpu(monkeypatch):
    """The kernels may be called on fake tensors."""
    monkeypatch.setattr(cuda, "unavailable_reason", lambda device: None)
    monkeypatch.setattr(cuda.CUDABackend, "misfit", lambda *_: None)


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
    """Gradients that the outputs' autograd node returns. Torch without CUDA records it but cannot run it."""
    with torch.no_grad():
        grads = outputs[0].grad_fn.apply(*map(torch.empty_like, outputs), None)
    return [grad for grad in grads if grad is not None]


@needs_schemas
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("concat", [False, True])
@pytest.mark.parametrize("memory", ["fast", "recompute"])
def test_cells_on_a_device_that_is_not_there(with_gpu, dtype, concat, memory):
    module = CellProblem(dtype=torch.float32, channels=8, K=2, stride=2).module.float()
    norms = sum(isinstance(part, torch.nn.BatchNorm2d) for part in module.modules())
    with FakeTensorMode(), torch.device("cuda"):
        edges = list(without_data(module))
        # in the layout that needs no copy
        inputs = [
            torch.empty(2, 6, 10, 8, dtype=dtype).permute(0, 3, 1, 2).requires_grad_() for _ in range(2)
        ]
        nodes = CUDA.cell(edges, inputs, torch.empty(5, 8), torch.empty(5), memory=memory, concat=concat)
        assert [tuple(x.shape) for x in nodes] == ([(2, 16, 3, 5)] if concat else 2 * [(2, 8, 3, 5)])
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
def test_layers_on_a_device_that_is_not_there(with_gpu, dtype, reduce, memory):
    module = FactorizedReduce(16, 8) if reduce else ReLUConvBN(16, 8, 1)
    freeze_random_features(module)
    side = (3, 5) if reduce else (6, 10)
    with FakeTensorMode(), torch.device("cuda"), use_backend("cuda", memory):
        x = torch.empty(2, 6, 10, 16, dtype=dtype).permute(0, 3, 1, 2).requires_grad_()
        out = without_data(module)(x)
        assert (tuple(out.shape), out.dtype, out.device.type) == ((2, 8, *side), dtype, "cuda")
        grad_x, gamma, beta = backward([out])
        assert (tuple(grad_x.shape), grad_x.dtype, grad_x.stride()) == ((2, 16, 6, 10), dtype, x.stride())
        assert [(tuple(x.shape), x.dtype) for x in (gamma, beta)] == 2 * [((8,), torch.float32)]
        assert all(x.device.type == "cuda" for x in (grad_x, gamma, beta))


@needs_schemas
@pytest.mark.parametrize("memory", ["fast", "recompute"])
def test_cells_of_nas_bench_201_on_a_device_that_is_not_there(with_gpu, memory):
    module = CellProblem(dtype=torch.float32, channels=16, **NASBENCH201).module.float()
    with FakeTensorMode(), torch.device("cuda"):
        x = torch.empty(2, 7, 9, 16, dtype=torch.bfloat16).permute(0, 3, 1, 2).requires_grad_()
        nodes = CUDA.cell(list(without_data(module)), [x], torch.empty(6, 5), memory=memory)
        assert [(tuple(node.shape), node.dtype) for node in nodes] == 3 * [((2, 16, 7, 9), torch.bfloat16)]
        shapes = [tuple(grad.shape) for grad in backward(nodes)]
        # two convolutions on each of six edges
        assert shapes == [(12, 16), (12, 16), (6, 5), (2, 16, 7, 9)]


def reason(problem, *inputs):
    """The reason against a cell on any machine."""
    return cuda.unsupported_anywhere(CUDA.call(list(problem.module), inputs, *problem.weights.values()))


def test_reasons_against_a_cell():
    problem = CellProblem((2, 4, 4), torch.float32, channels=6, K=3)
    problem.module.float()
    x = torch.empty(2, 6, 4, 4)
    call = CUDA.call(list(problem.module), [x, x], *problem.weights.values())
    assert CUDA.backend.unsupported_cell(call) == "inputs that are not all on one CUDA device"
    assert reason(problem, x, x) == "no kernels for K=3"
    assert "dtype" in reason(problem, x.to(torch.int32), x.to(torch.int32))
    wide = CellProblem((1, 2, 2), channels=512, nodes=1, inputs=1)
    assert "512" in reason(wide, *wide.inputs)


def test_reasons_against_a_layer():
    problem = LayerProblem()
    [module], [x] = problem.module, problem.inputs
    layer = module.layer()
    assert CUDA.backend.unsupported_layer(x, layer) == "no CUDA kernels for device cpu"
    assert cuda.unsupported_layer_anywhere(x, layer) is None
    assert "dtype" in cuda.unsupported_layer_anywhere(x.to(torch.int32), layer)
    assert "devices" in cuda.unsupported_layer_anywhere(x.to("meta"), layer)
    assert "different dtypes" in cuda.unsupported_layer_anywhere(x.bfloat16(), layer)
    layer.convs[0].requires_grad_(True)
    assert "trained" in cuda.unsupported_layer_anywhere(x, layer)
    convs = (torch.nn.Conv2d(6, c, 1, 2, bias=False).double().requires_grad_(False) for c in (1, 3))
    uneven = ReLUConvBNLayer(tuple(convs), layer.norm)
    assert "halves" in cuda.unsupported_layer_anywhere(x, uneven)
    with pytest.raises(ValueError, match="even height"):
        reference.relu_conv_bn(x[:, :, 1:], *uneven)


def test_a_step_never_asks_for_a_value(emulated_kernels, monkeypatch):
    """Or it could not be recorded in a CUDA graph."""
    backend, layers = emulated_kernels.backend, []
    monkeypatch.setattr(contract, "_backends", {backend.name: backend})
    relu_conv_bns = backend.relu_conv_bns
    monkeypatch.setattr(
        backend,
        "relu_conv_bns",
        lambda x, some, memory: layers.extend(some) or relu_conv_bns(x, some, memory),
    )
    network = SearchNetwork(get_space("darts"), C=4, layers=3, K=2, edge_norm=True)
    freeze_random_features(network)
    images, labels, meter = torch.randn(2, 3, 8, 8), torch.tensor([1, 3]), Meter(torch.device("cpu"))
    parameters = [*network.arch_parameters(), *(p for p in network.parameters() if p.requires_grad)]
    with use_backend(backend.name), Asked() as asked:
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
    assert len(layers) == 6


@pytest.mark.parametrize(("layers", "ops"), [(1, 1), (3, 1), (10, 2)])
def test_layers_of_one_state_share_their_launches(emulated_kernels, layers, ops):
    problem = LayerProblem((2, 4, 4), torch.float32, channels=(4, *layers * (6,)))
    emulated_kernels.ops.record(True)
    try:
        problem.run(emulated_kernels)
        launches = emulated_kernels.ops.recorded().splitlines()
    finally:
        emulated_kernels.ops.record(False)
    # three forward, three backward; running statistics are updated layer by layer
    assert len(launches) == 6 * ops + layers


def test_more_layers_than_a_launch_takes_are_refused(emulated_kernels):
    recorded = RecordedOps(emulated_kernels.backend)
    problem = LayerProblem((2, 4, 4), torch.float32)
    problem.run(Kernels(recorded.backend))
    op, _, options = recorded.calls["relu_conv_bn_forward"]
    several = {name: 9 * value for name, value in options.items() if isinstance(value, list)}
    with pytest.raises(ValueError, match="gammas: expected up to 8 layers on CUDA, got 9"):
        op(**options | several)
