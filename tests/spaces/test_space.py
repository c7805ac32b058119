"""The spaces themselves, against the tables of their sources."""

import pytest

from rfdarts_fast.spaces import SPACES, get_space

# RobustDARTS src/spaces.py, edge by edge: normal cell, reduction cell
S1 = """
skip dil3 | max avg
skip dil5 | max dil3
skip dil5 | max avg
skip sep3 | max avg
skip dil3 | skip dil5
max skip  | max avg
skip sep3 | max sep3
skip sep3 | skip dil3
skip dil3 | skip dil5
skip sep3 | max avg
max skip  | max avg
skip dil3 | skip dil5
dil3 dil5 | skip dil5
dil3 dil5 | skip dil5
"""
LONG = {
    "skip": "skip_connect", "max": "max_pool_3x3", "avg": "avg_pool_3x3",
    "sep3": "sep_conv_3x3", "dil3": "dil_conv_3x3", "dil5": "dil_conv_5x5",
}  # fmt: skip

UNIFORM = {
    "darts": "none max_pool_3x3 avg_pool_3x3 skip_connect "
    "sep_conv_3x3 sep_conv_5x5 dil_conv_3x3 dil_conv_5x5",
    "s2": "skip_connect sep_conv_3x3",
    "s3": "none skip_connect sep_conv_3x3",
    "s4": "noise sep_conv_3x3",
}


@pytest.mark.parametrize("name", UNIFORM)
def test_uniform_spaces(name):
    edges = (tuple(UNIFORM[name].split()),) * 14
    assert get_space(name).cells == {"normal": edges, "reduce": edges}


def test_s1():
    rows = [line.split("|") for line in S1.strip().splitlines()]
    for column, cell in enumerate(("normal", "reduce")):
        expected = tuple(tuple(LONG[word] for word in row[column].split()) for row in rows)
        assert get_space("s1").cells[cell] == expected


def test_nasbench201():
    space = get_space("nasbench201")
    primitives = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
    assert space.cells == {"cell": (primitives,) * 6}
    assert (space.inputs, space.nodes, space.num_edges) == (1, 3, 6)


@pytest.mark.parametrize("name", [name for name in SPACES if name != "nasbench201"])
def test_edges_of_each_node(name):
    space = get_space(name)
    assert space.num_edges == 14
    assert [(s.start, s.stop) for s in space.node_slices()] == [(0, 2), (2, 5), (5, 9), (9, 14)]


def test_unknown_name():
    with pytest.raises(ValueError, match="space: expected one of darts, s1"):
        get_space("s5")
