"""The published Architect, unchanged, on the drop-in networks."""

import copy

import pytest
import torch
from torch import nn

import rfdarts_fast
from rfdarts_fast.drop_in import complete_momentum
from rfdarts_fast.ops import use_backend

from .architects import PublishedArchitect, TrainableArchitect
from .common import MODULES, batch, freeze_convolutions, pair


def sgd(network):
    return torch.optim.SGD(network.parameters(), 0.025, momentum=0.9, weight_decay=3e-4)


def search(network, architect, optimizer, unrolled, steps=2, name="darts"):
    """The published loop; returns the alpha gradients of the last step and the alphas."""
    torch.manual_seed(3)
    for _ in range(steps):
        train, valid = batch(name), batch(name)
        architect.step(train, valid, 0.025, optimizer, unrolled)
        grads = [a.grad.clone() for a in network.arch_parameters()]
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(train[0]), train[1]).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
    return grads, [a.detach() for a in network.arch_parameters()]


@pytest.mark.parametrize("name", ["darts", "pc_darts"])
@pytest.mark.parametrize("unrolled", [False, True])
def test_trainable_network_searches_like_the_published_one(name, unrolled):
    theirs, ours = pair(name, 4, 3, nodes=2, random_features=False)
    results = [search(n, PublishedArchitect(n), sgd(n), unrolled, name=name) for n in (theirs, ours)]
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", MODULES)
def test_first_order_with_random_features(name):
    theirs, ours = pair(name, 4, 3, nodes=2, affine=True)
    freeze_convolutions(theirs)
    results = [search(n, PublishedArchitect(n), sgd(n), False, name=name) for n in (theirs, ours)]
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-9)


def frozen_tensors(network):
    return {n: p.detach().clone() for n, p in network.named_parameters() if not p.requires_grad}


def test_second_order_with_random_features():
    # the published code also decays frozen weights in its look-ahead copy, by 7.5e-6 of themselves, which
    # BatchNorm undoes but for its eps; hence the tolerance
    _, ours = pair("darts", 4, 3, nodes=2, affine=True)
    _, reference = pair("darts", 4, 3, nodes=2)
    reference.load_state_dict(ours.state_dict())
    start = copy.deepcopy(ours.state_dict())
    before = frozen_tensors(ours)
    actual = search(ours, PublishedArchitect(ours), sgd(ours), True)
    expected = search(reference, TrainableArchitect(reference), sgd(reference), True)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-7)
    # without the momentum the gradients are visibly others
    _, other = pair("darts", 4, 3, nodes=2)
    other.load_state_dict(start)
    for parameter in other.parameters():
        vars(parameter).clear()
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            search(other, PublishedArchitect(other), sgd(other), True), expected, rtol=1e-3, atol=1e-7
        )
    after = frozen_tensors(ours)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(p.grad is None for p in ours.parameters() if not p.requires_grad)


def test_second_order_on_an_accelerated_network():
    theirs, _ = pair("darts", 4, 3, nodes=2)
    rfdarts_fast.accelerate(theirs)
    reference = copy.deepcopy(theirs)
    start, before = copy.deepcopy(theirs.state_dict()), frozen_tensors(theirs)
    actual = search(theirs, PublishedArchitect(theirs), sgd(theirs), True)
    with use_backend("reference"):
        expected = search(reference, TrainableArchitect(reference), sgd(reference), True)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-7)
    after = frozen_tensors(theirs)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not all(torch.equal(value, start[name]) for name, value in theirs.state_dict().items())


def test_complete_momentum_takes_no_memory_and_survives_a_checkpoint():
    _, ours = pair("darts", 4, 3, nodes=2)
    optimizer = sgd(ours)
    complete_momentum(optimizer)
    buffers = [optimizer.state[p]["momentum_buffer"] for p in ours.parameters() if not p.requires_grad]
    assert buffers and all(b.untyped_storage().nbytes() == 8 and not b.any() for b in buffers)
    again = sgd(ours)
    again.load_state_dict(optimizer.state_dict())
    search(ours, PublishedArchitect(ours), again, True, steps=1)


def test_loss_is_a_plain_number_to_everyone_else():
    _, ours = pair("darts", 4, 3, nodes=2)
    x, y = batch("darts")
    loss = ours._loss(x, y)
    assert loss.item() > 0
    assert type(loss + 1) is torch.Tensor and type(loss.detach()) is torch.Tensor
    frozen = next(p for p in ours.parameters() if not p.requires_grad)
    bias = next(p for p in ours.parameters() if p.requires_grad)
    zero, grad = torch.autograd.grad(loss, [frozen, bias])
    assert zero.shape == frozen.shape and not zero.any() and grad.any()


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("random_features", [True, False])
def test_new(name, random_features):
    _, ours = pair(name, 4, 3, nodes=2, random_features=random_features)
    ours.eval()
    other = ours.new()
    assert type(other) is type(ours) and other.training
    for mine, its in zip(ours.arch_parameters(), other.arch_parameters(), strict=True):
        assert its is not mine and torch.equal(its, mine)
    for mine, its in zip(ours.parameters(), other.parameters(), strict=True):
        assert its is not mine and its.dtype == mine.dtype and its.requires_grad == mine.requires_grad
        if not mine.requires_grad:
            assert torch.equal(its, mine) and not its.grad.any()
        elif mine.ndim == 4:
            assert not torch.equal(its, mine)
    assert other._options == ours._options
