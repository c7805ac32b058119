"""The CUDA kernels on a GPU, and what the emulation cannot see: the real memory model and CUDA graphs."""

import copy

import pytest
import torch
from torch import library
from torch.utils._python_dispatch import TorchDispatchMode

from rfdarts_fast.runs.graph import GraphedStep, Recorder
from rfdarts_fast.nn import SearchNetwork, freeze_random_features
from rfdarts_fast.ops import reference, use_backend
from rfdarts_fast.ops.compiled import cuda
from rfdarts_fast.search import search
from rfdarts_fast.search.architect import descend, gradients
from rfdarts_fast.spaces import get_space
from tests.kernels.cuda.convs import ConvCase
from tests.kernels.cuda.emulated import Case, errors

pytestmark = pytest.mark.skipif(cuda.missing() is not None, reason=f"needs a GPU: {cuda.missing()}")

CELLS = [
    {"channels": 16, "nodes": 4},
    {"channels": 16, "stride": 2},
    {"channels": 7},
    {"channels": 128, "nodes": 1},
    {"channels": 256, "nodes": 1, "stride": 2},
    {"channels": 16, "K": 4, "nodes": 4},
    {"channels": 64, "K": 8, "stride": 2},
    {"channels": 12, "K": 2},
]
SHAPES = [(3, 18, 10), (2, 32, 32), (1, 8, 8)]


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """PyTorch's own convolutions without TF32, and with the same algorithm in every run."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


# channels of a cell's preprocessing
CONVS = [(16, 16), (64, 16), (192, 48), (256, 64), (40, 140), (5, 6)]


def plain(case, dtype):
    """PyTorch on the same device in the same dtype."""
    with use_backend("reference"):
        return case.run(reference.mixed_cell, dtype, device="cuda")


def assert_same_bits(case):
    first = case.kernels()
    for again in (case.kernels(), case.kernels(memory="recompute")):
        for name, group in first.items():
            for a, b in zip(group, again[name], strict=True):
                assert torch.equal(a, b), name


def assert_exact_on_poisoned_memory(case):
    torch.use_deterministic_algorithms(True)
    try:
        found = errors(case.kernels(), case.reference())
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(error < 1e-10 for error in found.values()), found


def assert_error_is_that_of_pytorch(found, theirs, dtype):
    # in float64, PyTorch on either device may be the truth itself
    floor = (100 if dtype == torch.float64 else 4) * torch.finfo(dtype).eps
    for name, error in found.items():
        times = 2 if name in ("states", "running") else 3
        assert error <= times * theirs[name] + floor, (name, error, theirs[name])


@pytest.mark.parametrize("options", CELLS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_error_is_that_of_pytorch(dtype, options):
    for shape in SHAPES:
        case = Case(shape, dtype, **options)
        expected = case.reference()
        found, theirs = errors(case.kernels(), expected), errors(plain(case, dtype), expected)
        assert_error_is_that_of_pytorch(found, theirs, dtype)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("channels", CONVS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_error_of_the_preprocessing_is_that_of_pytorch(dtype, channels, reduce, train):
    for shape in SHAPES:
        case = ConvCase(shape, dtype, channels, reduce, train)
        expected = case.reference()
        found = errors(case.kernels(), expected)
        assert_error_is_that_of_pytorch(found, errors(case.reference(dtype, "cuda"), expected), dtype)


@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_preprocessing_is_deterministic(dtype, reduce):
    # several tiles a block
    assert_same_bits(ConvCase((64, 80, 80), dtype, (64, 16), reduce))


@pytest.mark.parametrize("reduce", [False, True])
def test_poisoned_memory_in_the_preprocessing(reduce):
    assert_exact_on_poisoned_memory(ConvCase((2, 12, 20), channels=(24, 20), reduce=reduce))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_preprocessing_of_views(dtype):
    case = ConvCase((2, 6, 10), dtype, (16, 32))
    convs, norm = case.parts(case.module.float().cuda())
    wide = torch.randn(2, 40, 8, 12).to(dtype).cuda().contiguous(memory_format=torch.channels_last)
    # aligned to vectors, and not
    for view in (wide[:, 8:24, 1:7, 1:11], wide[:, 3:19, 2:, 2:]):
        found = [cuda.relu_conv_bn(x, convs, norm) for x in (view, view.contiguous())]
        assert torch.equal(*found)


@pytest.mark.parametrize("reduce", [False, True])
def test_opcheck_of_the_preprocessing(reduce):
    native = torch.ops.rfdarts
    x = torch.randn(2, 8, 4, 4).cuda().contiguous(memory_format=torch.channels_last)
    weights, gamma, beta = torch.rand((4 if reduce else 2) * 8 * 6).cuda(), *torch.rand(2, 6).cuda()
    tests = ("test_schema", "test_faketensor")
    layer = [weights], [gamma], [beta]
    forward = (x, *layer, [], 1e-5, reduce)
    library.opcheck(native.relu_conv_bn_forward.default, forward, test_utils=tests)
    outs, ys, used = native.relu_conv_bn_forward(*forward)
    for wanted in (True, False):
        backward = (outs, x, ys, *layer, used, 1e-5, True, reduce, wanted)
        library.opcheck(native.relu_conv_bn_backward.default, backward, test_utils=tests)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("K", [1, 4])
def test_deterministic(dtype, K):
    assert_same_bits(Case((8, 32, 32), dtype, channels=16, K=K, nodes=4))


def test_poisoned_memory():
    assert_exact_on_poisoned_memory(Case((2, 12, 20), channels=8, K=2, stride=2))


def test_gradcheck():
    case = Case((2, 4, 4), channels=4, K=2, nodes=1, stride=2)
    edges = list(copy.deepcopy(case.edges).cuda())
    leaves = [x.cuda().requires_grad_() for x in (*case.inputs, case.weights, case.edge_weights)]

    def run(a, b, weights, edge_weights):
        return tuple(cuda.mixed_cell(edges, [a, b], weights, edge_weights))

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


class Calls(TorchDispatchMode):
    """The calls of one compiled op, as (overload, arguments)."""

    def __init__(self, name):
        super().__init__()
        self.name, self.found = name, []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.overloadpacket is getattr(torch.ops.rfdarts, self.name):
            self.found.append((function, arguments))
        return function(*arguments, **(options or {}))


def test_opcheck():
    case = Case((2, 8, 8), torch.float32, channels=8, nodes=2)
    with Calls("cell_forward") as calls:
        case.kernels()
    [call] = calls.found
    library.opcheck(*call, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("amp", [False, True])
def test_replayed_steps_equal_eager_steps(amp):
    torch.manual_seed(0)
    network = SearchNetwork(get_space("darts"), C=16, layers=3, K=4, edge_norm=True).cuda()
    freeze_random_features(network)
    network.to(memory_format=torch.channels_last)
    batches = [(torch.randn(8, 3, 32, 32).cuda(), torch.randint(10, (8,)).cuda()) for _ in range(8)]

    def train(graphed):
        model = copy.deepcopy(network)
        parameters = [*model.arch_parameters(), *(p for p in model.parameters() if p.requires_grad)]
        optimizer = torch.optim.SGD(parameters, lr=torch.tensor(0.1).cuda(), momentum=0.9, fused=True)

        def step(kind, images, labels):
            with torch.autocast("cuda", torch.bfloat16, enabled=amp, cache_enabled=False):
                logits = model(images).float()
            loss = torch.nn.functional.cross_entropy(logits, labels)
            descend(optimizer, parameters, gradients(loss, parameters), 5.0)

        run = GraphedStep(step, Recorder(), required=True) if graphed else step
        for images, labels in batches:
            run("step", images, labels)
        return [p.detach() for p in parameters]

    with use_backend("native"):
        for a, b in zip(train(False), train(True), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"K": 2}, {"amp": "bf16"}], ids=str)
def test_a_recorded_search_is_the_same_search(tiny_search, tmp_path, changes):
    options = {"space": "darts", "channels": 4, "epochs": 3, "arch_warmup_epochs": 1, **changes}
    if "K" in options:
        options |= {"method": "rf-pcdarts", "partial_channels": options.pop("K"), "edge_norm": True}
    alphas = []
    for graph in ("off", "on"):
        out = tmp_path / graph
        search(tiny_search(out=out, device="cuda", backend="native", cuda_graph=graph, **options))
        alphas.append(torch.load(out / "checkpoint.pt", weights_only=False)["network"]["alphas_normal"])
    torch.testing.assert_close(*alphas, rtol=1e-3, atol=1e-5)
