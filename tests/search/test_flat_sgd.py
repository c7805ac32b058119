"""SGD along all vectors as one, against torch.optim.SGD."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rfdarts_fast.search.architect import descend
from rfdarts_fast.search.flat_sgd import FlatSGD

OPTIONS = [
    {"momentum": 0.9, "weight_decay": 3e-4},
    {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
    {"weight_decay": 0.1},
]
SHAPES = [(3,), (4, 2), (5,), (2, 3, 1, 1), (1,), (7,)]


def network(shapes=SHAPES):
    torch.manual_seed(0)
    return nn.ParameterList(nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes)


def groups(network):
    parameters = list(network)
    return [{"params": parameters[:4]}, {"params": parameters[4:], "weight_decay": 0.0}]


def gradients(network):
    return [torch.randn_like(p) for p in network]


def take_steps(pairs, count=3, clip=1.0):
    """The same steps with each (network, optimiser)."""
    for _ in range(count):
        grads = gradients(pairs[0][0])
        for network, optimizer in pairs:
            descend(optimizer, list(network), [grad.clone() for grad in grads], clip)


def assert_same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_steps_and_state_are_those_of_sgd(options):
    flat, plain = network(), network()
    optimizers = FlatSGD(groups(flat), lr=0.1, **options), torch.optim.SGD(groups(plain), lr=0.1, **options)
    for _ in range(2):
        take_steps([(flat, optimizers[0]), (plain, optimizers[1])])
        assert_same(list(flat), list(plain))
        assert_same(optimizers[0].state_dict(), optimizers[1].state_dict())
        for optimizer in optimizers:
            optimizer.param_groups[1]["lr"] = 0.01
    assert all(p.grad is None for p in (*flat, *optimizers[0].stepped))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize(
    "kinds", [(FlatSGD, torch.optim.SGD), (torch.optim.SGD, FlatSGD), (FlatSGD, FlatSGD)]
)
def test_a_state_goes_from_one_to_the_other(options, steps, kinds):
    first = network()
    optimizer = kinds[0](groups(first), lr=0.1, **options)
    take_steps([(first, optimizer)], steps)
    second = network()
    other = kinds[1](groups(second), lr=0.5, **options)
    take_steps([(second, other)], 1)
    file = io.BytesIO()
    torch.save((first.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file)
    second.load_state_dict(weights)
    other.load_state_dict(state)
    take_steps([(first, optimizer), (second, other)])
    assert_same(list(first), list(second))
    assert_same(optimizer.state_dict(), other.state_dict())


def test_a_momentum_that_a_vector_lacks_is_none_yet():
    flat, plain = network(), network()
    optimizers = [
        kind(groups(n), lr=0.1, **OPTIONS[0]) for kind, n in ((FlatSGD, flat), (torch.optim.SGD, plain))
    ]
    take_steps([(flat, optimizers[0]), (plain, optimizers[1])])
    state = copy.deepcopy(optimizers[0].state_dict())
    del state["state"][2]
    for optimizer in optimizers:
        optimizer.load_state_dict(copy.deepcopy(state))
    take_steps([(flat, optimizers[0]), (plain, optimizers[1])])
    assert_same(list(flat), list(plain))


@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_that_others_gave_are_taken(to_none):
    flat, plain = network(), network()
    for n in (flat, plain):
        torch.manual_seed(1)
        optimizer = (FlatSGD if n is flat else torch.optim.SGD)(n, lr=0.1, **OPTIONS[0])
        optimizer.state[n[0]].get("momentum_buffer")
        for _ in range(2):
            sum((p**2).sum() for p in n).backward()
            optimizer.step()
            optimizer.zero_grad(to_none)
    assert_same(list(flat), list(plain))
    assert all(p.grad is None if to_none else not p.grad.any() for p in flat)


def test_hooks_see_every_parameters_clipped_gradient():
    flat = network()
    optimizer = FlatSGD(flat, lr=0.1)
    seen = []
    optimizer.register_step_pre_hook(
        lambda *_: seen.append(torch.cat([p.grad.flatten() for p in flat]).norm())
    )
    descend(optimizer, list(flat), gradients(flat), 0.5)
    assert seen[0].item() == pytest.approx(0.5, rel=1e-5)


class Calls(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_a_step_is_a_few_operators_and_a_checkpoint_holds_each_number_once():
    many = network([(16,)] * 500)
    optimizer = FlatSGD(many, lr=0.1, momentum=0.9, weight_decay=3e-4)
    take_steps([(many, optimizer)], 1)
    grads = gradients(many)
    with Calls() as calls:
        descend(optimizer, list(many), grads, 5.0)
    assert calls.count < 30
    sizes = []
    for state in (many.state_dict(), optimizer.state_dict()["state"]):
        file = io.BytesIO()
        torch.save(state, file)
        sizes.append(len(file.getvalue()))
    # the names and shapes of 500 tensors beside 8,000 numbers
    assert max(sizes) < 3 * 500 * 16 * 8


@pytest.mark.parametrize("moved", ["before the first step", "between"])
def test_a_network_may_be_moved(moved):
    nets = network(), network()
    optimizers = [kind(n, lr=0.1) for kind, n in zip((FlatSGD, torch.optim.SGD), nets, strict=True)]
    if moved == "between":
        take_steps([*zip(nets, optimizers, strict=True)])
    for n in nets:
        n.to(torch.float32)
        n[2].data = n[2].data.clone()
    take_steps([*zip(nets, optimizers, strict=True)])
    torch.testing.assert_close(list(nets[0]), list(nets[1]))


def test_what_it_cannot_do_right_is_refused():
    flat = network()
    optimizer = FlatSGD(flat, lr=0.1)
    with pytest.raises(ValueError, match="step: expected a gradient of every parameter"):
        optimizer.step()
    mixed = [nn.Parameter(torch.zeros(2, dtype=dtype)) for dtype in (torch.float32, torch.float64)]
    with pytest.raises(
        ValueError, match=r"one dtype and device in a group, got torch\.float32 on cpu and torch"
    ):
        FlatSGD(mixed, lr=0.1)
    assert mixed[0].dtype == torch.float32
