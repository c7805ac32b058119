"""Derivation against literal ports of the published rules, on random weights with many ties."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rfdarts_fast.nn import NasBench201SearchNetwork, SearchNetwork
from rfdarts_fast.spaces import DARTS, NASBENCH201_PRIMITIVES, SPACES, derive, get_space

FAMILY = [name for name, space in SPACES.items() if space.family is DARTS]
# few values, so that edges and primitives tie
LEVELS = st.sampled_from([-1.0, 0.0, 0.5, 1.0])


def quark0_parse(weights, primitives):
    """quark0/darts model_search.py `_parse`; RobustDARTS's candidates per edge."""
    gene = []
    n = 2
    start = 0
    for i in range(4):
        end = start + n
        W = weights[start:end].copy()
        names = primitives[start:end]
        edges = sorted(
            range(i + 2), key=lambda x: -max(W[x][k] for k in range(len(W[x])) if names[x][k] != "none")
        )[:2]
        for j in edges:
            k_best = None
            for k in range(len(W[j])):
                if names[j][k] != "none" and (k_best is None or W[j][k] > W[j][k_best]):
                    k_best = k
            gene.append((names[j][k_best], j))
        start = end
        n += 1
    return gene


def softmax(x):
    return torch.softmax(torch.tensor(x, dtype=torch.float32), dim=-1).numpy()


def pc_darts_parse(alphas, betas, primitives):
    """PC-DARTS model_search.py `genotype`: betas normalised over each node's edges, then a product."""
    weights2 = softmax(betas[0:2])
    n, start = 3, 2
    for _ in range(3):
        end = start + n
        weights2 = np.concatenate([weights2, softmax(betas[start:end])])
        start = end
        n += 1
    W = softmax(alphas)
    for j in range(14):
        W[j, :] = W[j, :] * weights2[j]
    return quark0_parse(W, primitives)


def nasbench201_genotype(alphas):
    """AutoDL-Projects `genotype` and `Structure.tostr`: an edge's row is its place among the sorted names."""
    edge2index = {f"{i}<-{j}": None for i in range(1, 4) for j in range(i)}
    edge2index = {key: k for k, key in enumerate(sorted(edge2index))}
    nodes = []
    for i in range(1, 4):
        ops = [NASBENCH201_PRIMITIVES[np.argmax(alphas[edge2index[f"{i}<-{j}"]])] for j in range(i)]
        nodes.append("|" + "|".join(f"{op}~{j}" for j, op in enumerate(ops)) + "|")
    return "+".join(nodes)


def tables(rows, columns):
    row = st.lists(LEVELS, min_size=columns, max_size=columns)
    return st.lists(row, min_size=rows, max_size=rows)


@pytest.mark.parametrize("name", FAMILY)
@given(data=st.data())
@settings(max_examples=50)
def test_darts_rule(name, data):
    space = get_space(name)
    columns = len(space.cells["normal"][0])
    alphas = {cell: np.array(data.draw(tables(14, columns))) for cell in ("normal", "reduce")}
    genotype = derive(space, {cell: table.tolist() for cell, table in alphas.items()})
    assert list(genotype.normal) == quark0_parse(alphas["normal"], space.cells["normal"])
    assert list(genotype.reduce) == quark0_parse(alphas["reduce"], space.cells["reduce"])
    assert genotype.normal_concat == genotype.reduce_concat == (2, 3, 4, 5)


@pytest.fixture(scope="module")
def pc_network():
    return SearchNetwork(get_space("darts"), C=2, layers=1, K=2, edge_norm=True)


@given(data=st.data())
@settings(max_examples=50)
def test_pc_darts_rule(pc_network, data):
    primitives = pc_network.space.cells["normal"]
    expected = {}
    for cell in ("normal", "reduce"):
        alphas = data.draw(tables(14, 8))
        betas = data.draw(st.lists(LEVELS, min_size=14, max_size=14))
        getattr(pc_network, f"alphas_{cell}").data = torch.tensor(alphas)
        getattr(pc_network, f"betas_{cell}").data = torch.tensor(betas)
        expected[cell] = pc_darts_parse(alphas, betas, primitives)
    genotype = pc_network.genotype()
    assert list(genotype.normal) == expected["normal"]
    assert list(genotype.reduce) == expected["reduce"]


@given(data=st.data())
@settings(max_examples=50)
def test_nasbench201_rule(nasbench201_network, data):
    alphas = data.draw(tables(6, 5))
    nasbench201_network.alphas.data = torch.tensor(alphas)
    assert str(nasbench201_network.genotype()) == nasbench201_genotype(np.array(alphas))


@pytest.fixture(scope="module")
def nasbench201_network():
    return NasBench201SearchNetwork(get_space("nasbench201"), C=2, N=1)


def test_edge_weights_can_change_the_edges():
    network = SearchNetwork(get_space("s2"), C=2, layers=1, K=2, edge_norm=True)
    for cell in ("normal", "reduce"):
        getattr(network, f"alphas_{cell}").data.zero_()
        getattr(network, f"betas_{cell}").data.zero_()
    assert [j for _, j in network.genotype().normal] == [0, 1] * 4
    # node 5 takes the edges 9 to 13
    network.betas_normal.data[13] = 5.0
    network.betas_normal.data[11] = 4.0
    assert [j for _, j in network.genotype().normal] == [0, 1] * 3 + [4, 2]
    assert [j for _, j in network.genotype().reduce] == [0, 1] * 4
