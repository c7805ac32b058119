"""The parts of a supernet that neither its size nor its mixed ops show."""

import copy

import pytest
import torch
from torch import nn

from rfdarts_fast import ops
from rfdarts_fast.nn import NasBench201SearchNetwork, Network, SearchCell, SearchNetwork
from rfdarts_fast.nn.derived import Cell, drop_path
from rfdarts_fast.nn.random_features import freeze_random_features
from rfdarts_fast.spaces import PUBLISHED, get_space, uniform_space


def test_edge_weights_sum_to_one_at_each_node():
    network = SearchNetwork(get_space("s2"), C=2, layers=1, K=2, edge_norm=True)
    torch.nn.init.normal_(network.betas_normal)
    weights, edge_weights = network.cell_weights("normal")
    torch.testing.assert_close(weights, network.alphas_normal.softmax(dim=-1))
    for start, end in ((0, 2), (2, 5), (5, 9), (9, 14)):
        expected = network.betas_normal[start:end].softmax(dim=0)
        torch.testing.assert_close(edge_weights[start:end], expected)
    assert SearchNetwork(get_space("s2"), C=2, layers=1).cell_weights("reduce")[1] is None


def test_architecture_starts_near_zero():
    values = torch.cat([SearchNetwork(get_space("darts"), C=2, layers=1).alphas_normal for _ in range(20)])
    assert values.std().item() == pytest.approx(1e-3, rel=0.1)


@pytest.mark.parametrize(("layers", "reductions"), [(8, [2, 5]), (3, [1, 2]), (6, [2, 4])])
def test_reductions_are_at_a_third_and_two_thirds(layers, reductions):
    network = SearchNetwork(get_space("s4"), C=2, layers=layers)
    assert [i for i, cell in enumerate(network.cells) if cell.reduction] == reductions


def test_each_cell_type_uses_its_own_weights():
    network = SearchNetwork(get_space("s2"), C=2, layers=3).double()
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    inputs = {}
    for i, cell in enumerate(network.cells):
        cell.register_forward_pre_hook(lambda _, args, i=i: inputs.__setitem__(i, args[2]))
    network(images)
    cell_types = ["normal", "reduce", "reduce"]
    for i, cell_type in enumerate(cell_types):
        torch.testing.assert_close(inputs[i], getattr(network, f"alphas_{cell_type}").softmax(dim=-1))


class OtherCell(SearchCell):
    def forward(self, *args):
        self.calls.append(args)
        return super().forward(*args)


def hook_preprocessing(cell, calls):
    cell.preprocess0.register_forward_hook(lambda _, args, __: calls.append(args))


def hook_cell(cell, calls):
    cell.register_forward_pre_hook(lambda _, args: calls.append(args))


def hook_everything(cell, calls):
    def call(module, args):
        if module is cell:
            calls.append(args)

    return nn.modules.module.register_module_forward_pre_hook(call)


def override(cell, calls):
    cell.__class__, cell.calls = OtherCell, calls


def override_instance(cell, calls):
    forward = cell.forward
    cell.forward = lambda *args: (calls.append(args), forward(*args))[1]


@pytest.mark.parametrize(
    "watch", [None, hook_preprocessing, hook_cell, hook_everything, override, override_instance]
)
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_cells_share_the_reads_of_a_state_unless_watched(stem, watch, monkeypatch):
    # no skip connections, which reduce as preprocessing does
    space = uniform_space("pools", ("max_pool_3x3", "sep_conv_3x3"))
    network = SearchNetwork(space, C=4, layers=4, stem=stem).double()
    freeze_random_features(network)
    size = 8 if stem == "cifar" else 32
    x, calls, reads = torch.randn(2, 3, size, size, dtype=torch.double), [], []
    alone = copy.deepcopy(network)
    weights = {cell: alone.cell_weights(cell) for cell in ("normal", "reduce")}
    stems = [alone.stem] if stem == "cifar" else [alone.stem0, alone.stem1]
    if watch is hook_everything:
        # which leave a stem's BatchNorms to PyTorch
        stems = [nn.Sequential(*layers) for layers in stems]
    s0 = stems[0](x)
    s1 = s0 if stem == "cifar" else stems[1](s0)
    states = [s0, s1]
    for cell in alone.cells:
        states.append(cell(*states[-2:], *weights["reduce" if cell.reduction else "normal"]))
    expected = alone.classifier(alone.global_pooling(states[-1]).flatten(1))

    relu_conv_bns = ops.relu_conv_bns
    monkeypatch.setattr(
        ops, "relu_conv_bns", lambda x, layers: (reads.append(len(layers)), relu_conv_bns(x, layers))[1]
    )
    handles = [watch(cell, calls) for cell in network.cells] if watch else []
    output = network(x)
    for handle in handles:
        if handle is not None:
            handle.remove()
    assert torch.equal(output, expected)
    assert all(torch.equal(a, b) for a, b in zip(network.buffers(), alone.buffers(), strict=True))
    # each is called once, with the states as they are
    assert len(calls) == (4 if watch else 0)
    for args, s0, s1 in zip(calls, states, states[1:], strict=False):
        assert torch.equal(args[0], s0)
        assert watch is hook_preprocessing or torch.equal(args[1], s1)
    if watch is None:
        # layers that read the stem's states, and then each cell's
        assert reads == ([3, 2, 2, 1] if stem == "cifar" else [1, 2, 2, 2, 1])


def test_nasbench201_cells_share_one_table():
    network = NasBench201SearchNetwork(get_space("nasbench201"), C=2, N=1)
    assert [name for name, _ in network.named_arch_parameters().items()] == ["alphas"]
    network(torch.randn(2, 3, 8, 8)).sum().backward()
    assert network.alphas.grad.abs().sum() > 0


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    x = torch.ones(4000, 2, 3, 3)
    dropped = drop_path(x, 0.25)
    kept = dropped[:, 0, 0, 0] != 0
    assert torch.equal(dropped != 0, kept[:, None, None, None].expand_as(x))
    assert dropped[kept].unique().tolist() == pytest.approx([1 / 0.75])
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.03)


def test_drop_path_spares_identities_and_evaluation():
    genotype = PUBLISHED["DARTS_V2"]
    cell = Cell(genotype, 4, 4, 4, reduction=False, reduction_prev=False)
    assert sum(name == "skip_connect" for name, _ in genotype.normal) == 2
    x = torch.randn(2, 4, 4, 4)
    # almost surely everything that can be dropped is
    output = cell(x, x, 1 - 1e-7)
    assert output[:, :8].abs().max() == 0
    torch.testing.assert_close(output[:, 8:12], cell.preprocess0(x))
    cell.eval()
    torch.testing.assert_close(cell(x, x, 0.5), cell(x, x, 0.0))


def test_a_derived_network_reduces_where_its_inputs_enter():
    network = Network(PUBLISHED["PC_DARTS_cifar"], C=4, layers=3)
    shapes = []
    for cell in network.cells:
        cell.register_forward_hook(lambda *args: shapes.append(tuple(args[2].shape[1:])))
    network(torch.randn(2, 3, 16, 16))
    assert shapes == [(16, 16, 16), (32, 8, 8), (64, 4, 4)]
