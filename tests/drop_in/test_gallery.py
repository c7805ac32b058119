"""`accelerate` on each family of forks: what the fork computes is computed, and its quirks are respected."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import rfdarts_fast
from rfdarts_fast.ops import backends
from rfdarts_fast.ops.contract import Op

from . import gallery
from .gallery import GALLERY, NAMES, Network

F64 = torch.float64
BUILT = backends()["cpu"].status()["built"]


@pytest.fixture(autouse=True)
def without_onednn():
    # trained convolutions corrupt the heap in it on processors without AVX-512
    with torch.backends.mkldnn.flags(enabled=torch.backends.cpu.get_cpu_capability() == "AVX512"):
        yield


def double(network):
    network.double()
    for alpha in network.arch_parameters():
        alpha.data = torch.randn(alpha.shape, dtype=F64)
    return network


def accelerated(network, **options):
    ours = copy.deepcopy(network)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ours, rfdarts_fast.accelerate(ours, **options)


def images(n=4, side=8):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, side, side, dtype=F64, generator=generator), torch.arange(n) % 5


def loss_of(network):
    x, y = images()
    return nn.functional.cross_entropy(network(x), y)


def hessian_vector_products(network):
    grads = torch.autograd.grad(loss_of(network), network.arch_parameters(), create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in grads), network.arch_parameters())


def assert_equal(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", GALLERY)
def test_computes_what_the_fork_computes(name):
    network = double(GALLERY[name]())
    ours, report = accelerated(network)
    assert report.kernels or not BUILT
    assert not report.left or name in ("unshuffled", "function", "edges of a network")
    for training in (True, False):
        results = []
        for each in (network, ours):
            each.train(training)
            grads = torch.autograd.grad(loss_of(each), each.arch_parameters())
            results.append([each(images()[0]).detach(), *grads, *hessian_vector_products(each)])
        assert_equal(results[1], results[0])
    state = ours.state_dict()
    assert all(torch.allclose(state[key], value) for key, value in network.state_dict().items())

    ours.train()
    before = {n: p.detach().clone() for n, p in ours.named_parameters()}
    optimizer = torch.optim.SGD(ours.parameters(), 0.1, weight_decay=0.1)
    loss_of(ours).backward()
    optimizer.step()
    uncalled = tuple(f"{path}." for path in report.never_called)
    idle = {n for n, p in ours.named_parameters() if not p.requires_grad or n.startswith(uncalled)}
    if name == "sampling":
        sampled_out = {n for n, p in ours.named_parameters() if p.grad is None} - idle
        assert len(sampled_out) > 10 and all("._ops." in n for n in sampled_out)
        idle |= sampled_out
    assert idle == {n for n, p in ours.named_parameters() if torch.equal(p, before[n])}

    other = pickle.loads(pickle.dumps(ours.eval()))
    assert_equal(other(images()[0]), ours(images()[0]))
    assert all(type(a) is type(b) for a, b in zip(other.modules(), ours.modules(), strict=True))


def branches(monkeypatch):
    """The number of operations that each call of the kernels computes."""
    calls = []
    mixed_cell = backends()["cpu"].mixed_cell

    def spy(call):
        calls.append(sum(branch.op is not Op.NONE for branch in call.plan.branches()))
        return mixed_cell(call)

    monkeypatch.setattr(backends()["cpu"], "mixed_cell", spy)
    return calls


@pytest.mark.skipif(not BUILT, reason="the compiled kernels are not built here")
@pytest.mark.parametrize("cell", [gallery.SkippingCell, gallery.SamplingCell])
def test_operations_of_weight_zero_are_not_run(cell, monkeypatch):
    network = double(Network(cell))
    network.kept[0, 1, 2:] = 0
    network.kept[1] = nn.functional.one_hot(torch.tensor([3, 1, 3, 2, 0]), len(NAMES))
    ours, _ = accelerated(network)
    calls = branches(monkeypatch)
    for _ in range(2):
        results = []
        for each in (network, ours):
            each.zero_grad()
            loss = loss_of(each)
            loss.backward()
            results.append(
                [loss.detach(), *(alpha.grad for alpha in each.arch_parameters()), *each.buffers()]
            )
        assert_equal(results[1], results[0])
    # a max pool; nothing of an edge that is left with `none`
    assert calls == [3 * 5 - 2, 4] * 2
    idle = ours.cells[1]._ops[1].candidates if hasattr(ours.cells[1]._ops[1], "candidates") else None
    skipped = [p for i in (0, 2, 3) for p in idle[i].parameters() if p.requires_grad]
    assert skipped and all(p.grad is None for p in skipped)
    assert all(p.grad is not None for p in idle[1].parameters())


def test_an_argument_that_is_given_takes_the_forks_own_forward():
    network = double(Network(gallery.ExtraCell))
    ours, _ = accelerated(network)
    edges = network.cells[0]._ops[0], ours.cells[0]._ops[0]
    x, weights = torch.randn(2, 4, 6, 6, dtype=F64), torch.rand(4, dtype=F64)
    for given, named in (((), {}), ((None,), {}), ((3,), {}), ((), {"selected_idx": 3})):
        assert_equal(*(edge(x, weights, *given, **named) for edge in edges))
        assert_equal(*(edge(weights=weights, x=x, **named) for edge in edges))
    with pytest.raises(TypeError, match="selected"):
        edges[1](x, weights, selected=3)


def test_backward_through_drop_path_in_place():
    network = double(Network(gallery.CellWithDropPath))
    ours, report = accelerated(network)
    assert {"cells.0", "cells.1"} < report.replaced.keys()
    results = []
    for each in (network, ours):
        each.cell_arguments = {"drop_prob": 0.3, "epoch": 3}
        torch.manual_seed(2)
        loss = loss_of(each)
        loss.backward()
        results.append([loss.detach(), *(alpha.grad for alpha in each.arch_parameters())])
    assert_equal(results[1], results[0])


def test_an_auxiliary_skip_is_refused_or_noticed():
    network = double(Network(gallery.AuxiliarySkipCell))
    with pytest.raises(ValueError, match=r"(?s)4 of 11 .*tensors outside its operations \(skip"):
        rfdarts_fast.accelerate(network)
    ours, report = accelerated(network, strict=False)
    assert all("tensors outside" in reason for reason in report.left.values())
    assert set(report.left) == {f"cells.1._ops.{i}" for i in (0, 1, 2, 3)}
    for beta in (0.0, 0.5):
        for each in (network, ours):
            for edge in [*each.cells[0]._ops, *each.cells[1]._ops]:
                edge.beta = beta
        assert_equal(ours(images()[0]), network(images()[0]))


def test_an_optimizer_of_the_constructor_is_told_of_new_parameters():
    network = Network(gallery.Cell, optimizer=True)
    with pytest.warns(UserWarning, match=r"(?s)optimizers\['weights'\]\[0\].*add_param_group") as caught:
        report = rfdarts_fast.accelerate(network)
    assert report.optimizers == {"optimizers['weights'][0]": list(report.parameters)}
    assert report.remedy in str(report) and report.remedy in str(caught[0].message)
    assert dict(network.named_parameters()).items() >= report.parameters.items()
    exec(report.remedy, {"model": network, "report": report})
    loss_of(network.double()).backward()
    network.optimizers["weights"][0].step()
    assert sum(not torch.equal(p, torch.full_like(p, p.ndim == 0)) for p in report.parameters.values())
    again = Network(gallery.Cell)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not rfdarts_fast.accelerate(again).optimizers


def test_the_report_tells_what_is_called_and_what_has_kernels():
    network = gallery.NetworkOfEdges()
    report = rfdarts_fast.accelerate(network)
    assert report.never_called == ["edges.2"] and "never called edges.2" in str(report)
    assert not report.plain or not BUILT
    trained = gallery.NetworkOfEdges()
    report = rfdarts_fast.accelerate(trained, random_features=False)
    assert not report.kernels and set(report.plain) == {f"edges.{i}" for i in range(3)}
    assert "a convolution is trained" in str(report) or not BUILT
    asked = gallery.NetworkOfEdges()
    report = rfdarts_fast.accelerate(asked, example="no image")
    assert report.never_called is None and "example" in report.calls_unknown


@pytest.mark.parametrize(
    "inner", ["cells.0._ops.0", "cells.0._ops.1.layers.3.op.1", "cells.0._ops.0.layers.1"]
)
def test_hooks_on_inner_modules_fire(inner):
    network = double(Network(gallery.WrappedCell))
    ours, _ = accelerated(network)
    expected, calls = network(images()[0]), []
    handle = ours.get_submodule(inner).register_forward_hook(lambda *_: calls.append(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_equal(ours(images()[0]), expected)
    assert calls == [1]
    handle.remove()
    assert_equal(ours.train(False)(images()[0]), network.train(False)(images()[0]))
    assert calls == [1]


def test_messages_have_every_reason_once_and_in_full():
    network = Network(gallery.Cell)
    for cell in network.cells:
        for edge in cell._ops:
            edge._ops[3].op.append(nn.Hardswish())
        cell._ops[0]._ops[1] = nn.Conv2d(4, 4, 7)
    with pytest.raises(ValueError) as caught:
        rfdarts_fast.accelerate(network)
    message = str(caught.value)
    assert "all 10 mixed ops" in message and "strict=False" not in message
    assert message.count("Hardswish") == 2 and message.count("Conv2d(4, 4, kernel_size=(7, 7)") == 1
    assert "cells.0._ops.1 and 4 others: operation 3" in message
    unknown = nn.Module()
    unknown.candidates = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    with pytest.raises(ValueError, match=r"(?s)there are none in Module.*the model: operation 0: Linear"):
        rfdarts_fast.accelerate(unknown)
