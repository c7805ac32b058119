"""The architecture's gradient against plain autograd and a literal port of quark0/darts cnn/architect.py."""

import copy

import pytest
import torch
import torch.nn.functional as F

from rfdarts_fast.nn import SearchNetwork, freeze_random_features
from rfdarts_fast.search import Architect
from rfdarts_fast.search.architect import descend, gradients
from rfdarts_fast.spaces import get_space
from tests.drop_in.architects import TrainableArchitect


class PublishedNetwork(SearchNetwork):
    """With the methods that the published Architect calls."""

    def _loss(self, images, labels):
        return loss_of(self, (images, labels))

    def new(self):
        return copy.deepcopy(self)


@pytest.fixture(params=["trained", "frozen"])
def network(request):
    network = PublishedNetwork(get_space("s2"), C=4, layers=3, num_classes=4, K=2, edge_norm=True).double()
    for parameter in network.arch_parameters():
        torch.nn.init.normal_(parameter)
    if request.param == "frozen":
        freeze_random_features(network)
    return network


def batch():
    return torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.randint(0, 4, (4,))


def loss_of(network, batch):
    return F.cross_entropy(network(batch[0]), batch[1])


def trainable(network):
    return [p for p in network.parameters() if p.requires_grad]


def sgd(network, momentum, weight_decay):
    return torch.optim.SGD(trainable(network), lr=0.05, momentum=momentum, weight_decay=weight_decay)


def train_a_little(network, optimizer, steps=2):
    for _ in range(steps):
        grads = gradients(loss_of(network, batch()), trainable(network))
        descend(optimizer, trainable(network), grads, clip=0)


def assert_all_close(tensors, expected, **tolerance):
    assert len(tensors) == len(expected)
    for a, b in zip(tensors, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def test_first_order_is_the_gradient_of_the_validation_loss(network):
    twin = copy.deepcopy(network)
    train, val = batch(), batch()
    grads, sums = Architect(network, sgd(network, 0.9, 3e-4), "first").gradients(train, val)
    expected_loss = loss_of(twin, val)
    expected_loss.backward()
    expected_loss = expected_loss.item()
    assert_all_close(grads, [p.grad for p in twin.arch_parameters()], rtol=1e-10, atol=1e-14)
    hits = (twin(val[0]).argmax(1) == val[1]).sum()
    torch.testing.assert_close(sums[[0, 1, 3]], torch.tensor([expected_loss * 4, hits, 4]).double())


@pytest.mark.parametrize(
    ("before", "momentum", "weight_decay"),
    [(0, 0.9, 3e-4), (2, 0.9, 3e-4), (1, 0.5, 0.1)],
    ids=["first-step", "published", "other-rates"],
)
def test_second_order_equals_the_published_architect(network, momentum, weight_decay, before):
    optimizer = sgd(network, momentum, weight_decay)
    train_a_little(network, optimizer, before)
    twin, twin_optimizer = copy.deepcopy((network, optimizer))
    train, val = batch(), batch()
    weights = [p.clone() for p in network.parameters()]
    first, _ = Architect(copy.deepcopy(network), optimizer, "first").gradients(train, val)

    grads, _ = Architect(network, optimizer, "second").gradients(train, val)

    # over the trainable parameters alone, which are all but for frozen features
    port = TrainableArchitect(twin, momentum, weight_decay)
    port._backward_step_unrolled(train, val, 0.05, twin_optimizer)
    expected = [p.grad for p in twin.arch_parameters()]
    assert_all_close(grads, expected, rtol=1e-6, atol=1e-9)
    assert not all(torch.allclose(a, b, rtol=1e-3) for a, b in zip(grads, first, strict=True))
    # the weights are where they were, bit by bit; the running statistics where the published code leaves them
    assert all(torch.equal(p, before) for p, before in zip(network.parameters(), weights, strict=True))
    assert_all_close(list(network.buffers()), list(twin.buffers()), rtol=1e-9, atol=1e-12)
    assert all(p.grad is None for p in network.parameters())


def test_second_order_leaves_the_momentum_alone(network):
    optimizer = sgd(network, 0.9, 3e-4)
    train_a_little(network, optimizer)
    before = copy.deepcopy(optimizer.state_dict())
    Architect(network, optimizer, "second").gradients(batch(), batch())
    for key, state in optimizer.state_dict()["state"].items():
        assert torch.equal(state["momentum_buffer"], before["state"][key]["momentum_buffer"])


def test_a_weight_step_leaves_the_architecture_alone(network):
    before = [p.clone() for p in network.arch_parameters()]
    train_a_little(network, sgd(network, 0.9, 3e-4))
    assert all(torch.equal(a, b) for a, b in zip(network.arch_parameters(), before, strict=True))
    assert all(p.grad is None for p in network.arch_parameters())


@pytest.mark.parametrize(("clip", "norm"), [(0.0, 5.0), (2.0, 2.0), (9.0, 5.0)], ids=["off", "on", "loose"])
def test_clipping(clip, norm):
    parameter = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    descend(torch.optim.SGD([parameter], lr=1.0), [parameter], [torch.tensor([3.0, 4.0]).double()], clip)
    assert parameter.norm().item() == pytest.approx(norm, rel=1e-5)
    assert parameter.grad is None
