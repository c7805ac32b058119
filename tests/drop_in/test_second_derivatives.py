"""Second derivatives of a drop-in network's loss: those of plain PyTorch, or an error that names it."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from rfdarts_fast.ops import BackendError, backends, use_backend

from .common import batch, copy_arch, drop_in_network

pytestmark = pytest.mark.skipif(
    not backends()["cpu"].status()["built"], reason="the compiled kernels are not built here"
)
BACKENDS = ("cpu", "reference")


@pytest.fixture(params=["darts", "pc_darts"])
def network(request):
    made = drop_in_network(request.param, 4, 3, steps=2, multiplier=2).double()
    copy_arch(made, drop_in_network(request.param, 4, 3, steps=2, multiplier=2).double())
    # derivatives of a ReLU jump at 0: nothing is exactly there
    for name, parameter in made.named_parameters():
        if parameter.requires_grad and name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    made.images = batch("darts", n=4)
    return made


def dominant_eigenvalue(network, steps=6):
    """The eigenvalue of largest magnitude of the loss's Hessian in the alphas, by power iteration, as
    RobustDARTS's analyze.py and SmoothDARTS's early stopping look for it."""
    alphas = network.arch_parameters()
    grads = torch.autograd.grad(network._loss(*network.images), alphas, create_graph=True)
    generator = torch.Generator().manual_seed(0)
    vector = [torch.randn(a.shape, dtype=a.dtype, generator=generator) for a in alphas]
    for _ in range(steps):
        norm = sum(v.square().sum() for v in vector).sqrt()
        vector = [v / norm for v in vector]
        product = torch.autograd.grad(grads, alphas, vector, retain_graph=True)
        value = sum((p * v).sum() for p, v in zip(product, vector, strict=True))
        vector = product
    return value.item()


def test_dominant_eigenvalue(network):
    values = []
    for backend in BACKENDS:
        with use_backend(backend):
            values.append(dominant_eigenvalue(network))
    assert abs(values[0] - values[1]) <= 1e-6 * max(1, abs(values[1])) and abs(values[1]) > 1e-3


def test_backward_with_create_graph(network):
    results = []
    for backend in BACKENDS:
        network.zero_grad()
        for alpha in network.arch_parameters():
            alpha.grad = None
        with use_backend(backend):
            network._loss(*network.images).backward(create_graph=True)
            penalty = sum(p.grad.square().sum() for p in network.parameters() if p.requires_grad)
            results.append(torch.autograd.grad(penalty, network.arch_parameters()))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-8)


def test_gradgradcheck(network):
    alphas = network.arch_parameters()[:1]
    # training mode would move the statistics between two evaluations
    network.eval()

    def loss(alpha):
        return functional_call(network, {"alphas_normal": alpha}, (network.images[0],)).square().mean()

    with use_backend("cpu"):
        assert torch.autograd.gradgradcheck(loss, alphas, atol=1e-4, fast_mode=True)


def as_function(network):
    """The loss as a function of the alphas, and these."""
    x, y = network.images
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}

    def loss(alphas):
        logits = functional_call(network, {**buffers, **alphas}, (x,))
        return nn.functional.cross_entropy(logits, y)

    return loss, {name: alpha.detach() for name, alpha in network.named_arch_parameters().items()}


def transforms(loss, alphas):
    """(name, result) of each transform of torch.func and of forward mode."""
    yield "grad", torch.func.grad(loss)(alphas)
    yield "jvp", torch.func.jvp(loss, (alphas,), (alphas,))[1]
    yield "product", torch.func.jvp(torch.func.grad(loss), (alphas,), (alphas,))[1]


@pytest.mark.parametrize("network", ["pc_darts"], indirect=True)
@pytest.mark.filterwarnings("ignore:mixed ops run on the slow", "ignore:`torch.jit.script`")
def test_torch_func(network):
    network.eval()
    loss, alphas = as_function(network)
    results = []
    for backend in ("auto", "reference"):
        with use_backend(backend):
            results.append(dict(transforms(loss, alphas)))
            logits, generator = network(network.images[0]), torch.Generator().manual_seed(5)
            grads = torch.randn(3, *logits.shape, dtype=logits.dtype, generator=generator)
            batched = torch.autograd.grad(logits, network.arch_parameters(), grads, is_grads_batched=True)
            results[-1]["batched"] = batched
    torch.testing.assert_close(*results, rtol=1e-7, atol=1e-9)
    with use_backend("cpu"), pytest.raises(BackendError, match=r"torch\.func.*use_backend\('reference'\)"):
        torch.func.grad(loss)(alphas)
