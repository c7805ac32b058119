"""`accelerate` on supernets of other projects."""

import copy
import re

import pytest
import torch
from torch import nn

import rfdarts_fast
from rfdarts_fast import nn as rfnn
from rfdarts_fast.drop_in.fused import UnderstoodCell, UnderstoodMixedOp
from rfdarts_fast.spaces import PUBLISHED, get_space

from . import forks
from .common import batch, copies, copy_arch, drop_in_network, foreign_network, gradients

F64 = torch.float64


def robust_network(space="s1"):
    cells = get_space(space).cells
    return forks.RobustNetwork(4, 10, 3, nn.CrossEntropyLoss(), primitives=cells)


def tiny_network():
    return forks.TinyNetwork()


def small(name, K=None):
    """Two nodes in a cell instead of four."""
    return foreign_network(name, 4, 3, K, steps=2, multiplier=2)


NETWORKS = {
    "quark0": lambda: small("darts"),
    "PC-DARTS K=4": lambda: small("pc_darts"),
    "PC-DARTS K=2": lambda: small("pc_darts", 2),
    "PC-DARTS ImageNet": lambda: small("pc_darts_imagenet"),
    "RobustDARTS S1": robust_network,
    "RobustDARTS S3": lambda: robust_network("s3"),
    "NAS-Bench-201": tiny_network,
}


def images(name):
    x, y = batch("pc_darts_imagenet" if "ImageNet" in name else "darts", F64)
    return x, y


def understood(module, as_what):
    return isinstance(vars(module).get("rfdarts"), as_what)


def arch(network):
    alphas = network.arch_parameters
    return [alphas] if isinstance(alphas, nn.Parameter) else alphas()


def to_double(network):
    network.double()
    for alpha in arch(network):
        alpha.data = torch.randn(alpha.shape, dtype=F64)
    return network


def outputs(network, x, y):
    """Logits and alpha gradients in both modes, after one more training pass."""
    collected = []
    for training in (True, True, False):
        network.train(training)
        logits = network(x)
        loss = nn.functional.cross_entropy(logits, y)
        collected += [logits.detach(), *torch.autograd.grad(loss, arch(network))]
    return collected


@pytest.mark.parametrize("name", NETWORKS)
def test_computes_the_same(name):
    original = to_double(NETWORKS[name]())
    x, y = images(name)
    with torch.no_grad():
        original(x)
    ours = copy.deepcopy(original)
    report = rfdarts_fast.accelerate(ours)
    assert report.replaced and not report.left
    expected, actual = outputs(original, x, y), outputs(ours, x, y)
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9)
    cells = [m for m in ours.modules() if understood(m, UnderstoodCell)]
    assert len(cells) == (2 if name == "NAS-Bench-201" else 3)
    preprocessing = [path for path in report.replaced if ".preprocess" in path]
    assert len(preprocessing) == (0 if name == "NAS-Bench-201" else 6)
    state = ours.state_dict()
    for key, value in original.state_dict().items():
        # a bias in front of a BatchNorm is the only thing that goes, into its running mean
        if key.endswith("op.1.bias"):
            assert key not in state
        elif name != "NAS-Bench-201" or not key.endswith("running_mean"):
            torch.testing.assert_close(state[key], value, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ["quark0", "PC-DARTS K=4", "RobustDARTS S1", "NAS-Bench-201"])
def test_shares_tensors_and_trains_batchnorm_only(name):
    network = NETWORKS[name]()
    before = {n: p for n, p in network.named_parameters() if not n.endswith("op.1.bias")}
    buffers = dict(network.named_buffers())
    types = {n: type(m) for n, m in network.named_modules()}
    sum(p.sum() for p in before.values()).backward()
    report = rfdarts_fast.accelerate(network)
    after = dict(network.named_parameters())
    assert all(after[n] is p for n, p in before.items())
    assert all(b is buffers[n] for n, b in network.named_buffers())
    for path, module in network.named_modules():
        assert isinstance(module, types[path])
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.weight.requires_grad and module.bias.requires_grad
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            assert all(not p.requires_grad and p.grad is None for p in module.parameters())
    assert report.frozen == sum(p.numel() for p in network.parameters() if not p.requires_grad)
    assert report.affine > 0 and f"{report.affine} BatchNorms" in str(report)
    # again, and nothing is left to do
    again = rfdarts_fast.accelerate(network)
    assert not again.replaced and again.affine == 0 and set(again.left.values()) == {"fused already"}


def test_equals_the_drop_in_network():
    theirs = to_double(small("pc_darts"))
    ours = drop_in_network("pc_darts", 4, 3, steps=2, multiplier=2).double()
    ours.load_state_dict(theirs.state_dict())
    rfdarts_fast.accelerate(theirs)
    copy_arch(theirs, ours)
    x, y = batch("pc_darts")
    expected, actual = gradients(ours, x, y), gradients(theirs, x, y)
    assert actual[2].keys() == expected[2].keys()
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def test_random_features_can_be_left_alone():
    network = small("darts")
    before = {n: p.requires_grad for n, p in network.named_parameters()}
    report = rfdarts_fast.accelerate(network, random_features=False)
    assert {n: p.requires_grad for n, p in network.named_parameters()} == before
    assert report.frozen == report.affine == 0 and report.replaced
    network = small("darts")
    rfdarts_fast.accelerate(network, train_classifier=True)
    assert network.classifier.weight.requires_grad


@pytest.mark.parametrize("name", ["PC-DARTS K=4", "NAS-Bench-201"])
def test_copies_and_pickles(name, tmp_path):
    network = NETWORKS[name]()
    rfdarts_fast.accelerate(network)
    network.eval()
    x = images(name)[0].float()
    for other in copies(network, tmp_path):
        assert [type(m) for m in other.modules()] == [type(m) for m in network.modules()]
        assert torch.equal(other(x), network(x))


def test_drop_path_takes_the_foreign_forward():
    network = robust_network()
    ours = copy.deepcopy(network)
    rfdarts_fast.accelerate(ours)
    x = images("")[0].float()
    for drop in (0.0, 0.5):
        network.drop_path_prob = ours.drop_path_prob = drop
        results = []
        for each in (network, ours):
            torch.manual_seed(5)
            results.append(each(x))
        torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(network(x), network(x))


class OtherCell(forks.Cell):
    """Scales its output."""

    def forward(self, s0, s1, weights, weights2=None):
        return 2 * super().forward(s0, s1, weights, weights2)


class CellWithDropPath(forks.Cell):
    """A setting that only some epochs change."""

    def __init__(self, *args):
        super().__init__(*args)
        self.drop = 0.0

    def forward(self, s0, s1, weights):
        return (1 - self.drop) * super().forward(s0, s1, weights)


class CellWithScale(forks.Cell):
    """A parameter beside its mixed ops."""

    def __init__(self, *args):
        super().__init__(*args)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, s0, s1, weights):
        return self.scale * super().forward(s0, s1, weights)


class CellThatCounts(forks.Cell):
    """A forward with a side effect."""

    def forward(self, s0, s1, weights):
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(s0, s1, weights)


def network_of(cell_class):
    class Network(forks.Network):
        cell = cell_class

    return to_double(Network(4, 10, 3, None, 2, 2))


def test_a_changed_setting_takes_the_foreign_forward():
    network = network_of(CellWithDropPath)
    ours = copy.deepcopy(network)
    report = rfdarts_fast.accelerate(ours)
    assert {"cells.0", "cells.1", "cells.2"} < report.replaced.keys() and not report.left
    x, _ = images("")
    for drop in (0.0, 0.5):
        for each in (network, ours):
            each.cells[1].drop = drop
        torch.testing.assert_close(ours(x), network(x), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    "cell, why",
    [
        (OtherCell, "its forward is not the published.*it computes something else"),
        (CellWithScale, r"it has tensors of its own \(scale\)"),
        (CellThatCounts, r"forward changes attributes \(calls\)"),
    ],
)
def test_other_cells_keep_their_forward(cell, why):
    network = network_of(cell)
    ours = copy.deepcopy(network)
    report = rfdarts_fast.accelerate(ours)
    assert set(report.left) == {"cells.0", "cells.1", "cells.2"}
    assert all(type(m) is cell for m in ours.cells)
    assert all(understood(edge, UnderstoodMixedOp) for m in ours.cells for edge in m._ops)
    assert re.search(f"{why}.*one by one", report.left["cells.0"]) and "left cells.0" in str(report)
    x, _ = images("")
    torch.testing.assert_close(ours(x), network(x), rtol=1e-8, atol=1e-9)


class OtherMixedOp(forks.MixedOp):
    """Skips the first operation, which no structure shows."""

    def forward(self, x, weights):
        return sum(w * op(x) for w, op in zip(weights[2:], self._ops[2:], strict=True))


class Dropping(nn.Sequential):
    """P-DARTS puts dropout behind a skip connection."""


def with_other_forward(edge):
    edge.__class__ = OtherMixedOp


def with_dropout(edge):
    edge._ops[3] = Dropping(forks.Identity(), nn.Dropout(0.5))


def with_wide_kernel(edge):
    edge._ops[4].op[1] = nn.Conv2d(4, 4, 7, padding=3, groups=4, bias=False)


def with_sync_batchnorm(edge):
    edge._ops[4].op[3] = nn.SyncBatchNorm(4)


def with_inplace_relu(edge):
    edge._ops[4].op[0] = nn.ReLU(inplace=True)


def without_forward(edge):
    edge.__class__ = type("MixedOp", (nn.Module,), {})


@pytest.mark.parametrize(
    "change, why",
    [
        (with_other_forward, "its forward is not the weighted sum"),
        (with_dropout, "operation 3: Dropping.*is none of the registered primitives"),
        (with_wide_kernel, "operation 4: SepConv"),
        (with_sync_batchnorm, "operation 4: SepConv"),
        (with_inplace_relu, "operation 4: SepConv"),
        (without_forward, r"expected MixedOp to have a forward\(x, weights\)"),
    ],
)
def test_all_or_nothing(change, why):
    network = small("darts")
    change(network.cells[0]._ops[3])
    types = [type(m) for m in network.modules()]
    state = {n: v.clone() for n, v in network.state_dict().items()}
    trainable = [p.requires_grad for p in network.parameters()]
    with pytest.raises(ValueError, match=rf"(?s)1 of 17 mixed ops.*cells\.0\._ops\.3: .*{why}"):
        rfdarts_fast.accelerate(network)
    assert [type(m) for m in network.modules()] == types
    assert [p.requires_grad for p in network.parameters()] == trainable
    assert all(torch.equal(v, state[n]) for n, v in network.state_dict().items())
    if change not in (with_other_forward, with_dropout):
        return
    network.eval()
    x = images("")[0].float()
    expected = network(x)
    report = rfdarts_fast.accelerate(network, strict=False)
    assert list(report.left) == ["cells.0._ops.3"] and len(report.replaced) == 20
    torch.testing.assert_close(network(x), expected, rtol=1e-4, atol=1e-5)


def test_mixed_op_alone():
    for K, make in ((1, lambda: forks.MixedOp(8, 2)), (4, lambda: forks.MixedOp(8, 1, k=4))):
        edge = make().double()
        ours = nn.ModuleDict({"edge": copy.deepcopy(edge)})
        rfdarts_fast.accelerate(ours)
        [edge_of_ours] = ours["edge"].rfdarts.edges
        assert (edge_of_ours.K, edge_of_ours.channels) == (K, 8)
        x, weights = torch.randn(2, 8, 6, 6, dtype=F64), torch.rand(8, dtype=F64)
        torch.testing.assert_close(ours["edge"](x, weights), edge(x, weights), rtol=1e-9, atol=1e-9)


def test_names_what_is_wrong_with_the_model():
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got dict"):
        rfdarts_fast.accelerate({})
    derived = rfnn.Network(next(iter(PUBLISHED.values())), 4, 10, 3)
    for network in (nn.Conv2d(3, 3, 3), derived):
        with pytest.raises(ValueError, match="model: expected a supernet with mixed ops"):
            rfdarts_fast.accelerate(network)
    with pytest.raises(ValueError, match="wrapped in DataParallel"):
        rfdarts_fast.accelerate(nn.DataParallel(small("darts")))


def test_leaves_the_random_numbers_and_hooks_alone():
    network = robust_network("s4")
    calls = []
    for module in (network.cells[0], network.cells[0]._ops[0]._ops[1]):
        module.register_forward_hook(lambda *_: calls.append(1))
    state = torch.get_rng_state()
    rfdarts_fast.accelerate(network)
    assert torch.equal(torch.get_rng_state(), state) and not calls
    network(torch.randn(2, 3, 8, 8))
    assert calls
