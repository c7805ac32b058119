"""Derivatives of derivatives: kernels have none, and are not to give a wrong one."""

import pytest
import torch
from torch import nn

from rfdarts_fast import ops
from rfdarts_fast.nn import MixedOp, SearchNetwork, freeze_random_features
from rfdarts_fast.nn.primitives import FactorizedReduce, ReLUConvBN
from rfdarts_fast.spaces import get_space

pytestmark = pytest.mark.skipif(not ops.backends()["cpu"].status()["built"], reason="needs the CPU kernels")


def supernet(K=1, space="darts"):
    torch.manual_seed(0)
    network = SearchNetwork(get_space(space), 4, 10, 3, K=K, edge_norm=K > 1).double()
    freeze_random_features(network)
    # derivatives of a ReLU jump at 0: nothing is exactly there
    for name, parameter in network.named_parameters():
        if parameter.requires_grad and name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    return network


def hessian(network, backend, evaluate=False):
    """The Hessian of the loss in all architecture parameters, row by row."""
    network.train(not evaluate)
    torch.manual_seed(1)
    x, y = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.randint(0, 10, (2,))
    with ops.use_backend(backend):
        loss = nn.functional.cross_entropy(network(x), y)
        parameters = network.arch_parameters()
        grads = torch.autograd.grad(loss, parameters, create_graph=True)
        flat = torch.cat([grad.flatten() for grad in grads])
        rows = []
        for value in flat[:: max(1, len(flat) // 4)]:
            row = torch.autograd.grad(value, parameters, retain_graph=True)
            rows.append(torch.cat([part.flatten() for part in row]))
    return flat.detach(), torch.stack(rows)


@pytest.mark.parametrize(("K", "space", "evaluate"), [(2, "darts", False), (1, "s1", True)])
def test_hessian_in_alpha_is_the_references(K, space, evaluate):
    network = supernet(K, space)
    grads, rows = hessian(network, "cpu", evaluate)
    expected_grads, expected = hessian(network, "reference", evaluate)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(rows, expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())
    assert expected.abs().max() > 1e-4


def test_backward_with_create_graph():
    network, gradients = supernet(2), []
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for backend in ("cpu", "reference"):
        for parameter in [*network.parameters(), *network.arch_parameters()]:
            parameter.grad = None
        with ops.use_backend(backend):
            network(x).square().sum().backward(create_graph=True)
            penalty = sum(p.grad.square().sum() for p in network.arch_parameters())
            parameters = [p for p in network.parameters() if p.requires_grad]
            gradients.append(torch.autograd.grad(penalty, parameters))
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item() + 1e-9)


@pytest.mark.parametrize("memory", ["fast", "recompute"])
@pytest.mark.parametrize("stride", [1, 2])
def test_gradgradcheck_of_a_cell(stride, memory):
    torch.manual_seed(3)
    names = ("max_pool_3x3", "avg_pool_3x3", "skip_connect", "sep_conv_3x3", "dil_conv_3x3")
    edges = [MixedOp(names, 4, stride, K=2).double().requires_grad_(False) for _ in range(2)]
    inputs = [torch.randn(2, 4, 4, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    weights = torch.rand(2, 5, dtype=torch.float64, requires_grad=True)
    edge_weights = torch.rand(2, dtype=torch.float64, requires_grad=True)

    def cell(weights, edge_weights, *inputs):
        return ops.mixed_cell(edges, inputs, weights, edge_weights)[0]

    with ops.use_backend("cpu", memory):
        assert torch.autograd.gradgradcheck(cell, (weights, edge_weights, *inputs), atol=1e-4, fast_mode=True)


@pytest.mark.parametrize("make", [lambda: ReLUConvBN(4, 6, 1), lambda: FactorizedReduce(4, 6)])
def test_gradgradcheck_of_a_layer(make):
    torch.manual_seed(2)
    layer = make().double().requires_grad_(False)
    layer(torch.randn(2, 4, 4, 4, dtype=torch.float64))
    x = torch.randn(2, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    with ops.use_backend("cpu"):
        assert torch.autograd.gradgradcheck(layer, (x,), atol=1e-4, fast_mode=True)


def test_the_same_input_twice_and_unused_nodes():
    torch.manual_seed(4)
    edges = [MixedOp(("skip_connect", "sep_conv_3x3"), 4, 1).double().requires_grad_(False) for _ in range(5)]
    x = torch.randn(2, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(5, 2, dtype=torch.float64, requires_grad=True)
    seconds = []
    for backend in ("cpu", "reference"):
        with ops.use_backend(backend):
            first, _ = ops.mixed_cell(edges, [x, x], weights)
            (grad,) = torch.autograd.grad(first.pow(3).sum(), x, create_graph=True)
            seconds.append(torch.autograd.grad(grad.pow(2).sum(), [x, weights]))
    for ours, expected in zip(*seconds, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-8)
