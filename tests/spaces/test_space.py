"""The spaces themselves, against the tables of their sources."""

import pytest

from rfdarts_fast.spaces import NASBENCH201, SPACES, Space, get_space, register_space, uniform_space

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


EDGES = (("skip_connect", "noise"),) * 2
BAD = {
    "taken": (lambda: uniform_space("s1", ("noise",)), "space: expected a new name, got 's1'"),
    "no-name": (lambda: uniform_space("a b", ("noise",)), "space 'a b': expected a name of letters"),
    "no-node": (lambda: Space("a", 0, {}), "space 'a': expected 1 nodes, got 0"),
    "fixed-nodes": (lambda: Space("a", 4, {}, NASBENCH201), "expected 3 nodes, got 4"),
    "one-cell": (lambda: Space("a", 1, {"normal": EDGES}), "expected the cells normal, reduce, got normal"),
    "edges": (
        lambda: Space("a", 2, {"normal": EDGES, "reduce": EDGES}),
        r"5 edges in cells\['normal'\], got 2",
    ),
    "text": (lambda: uniform_space("a", "noise"), "tuples of 5 different primitives .* got 'noise'"),
    "twice": (lambda: uniform_space("a", ("noise", "noise")), "tuples of 2 different primitives"),
    "none-alone": (lambda: uniform_space("a", ("none",)), "not `none` alone"),
    "uneven": (
        lambda: Space("a", 1, {"normal": EDGES, "reduce": (("noise",), ("noise", "none"))}),
        r"tuples of 1 different primitives in cells\['reduce'\], .* got \('noise', 'none'\)",
    ),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD.keys())
def test_bad_spaces_are_refused(make, message):
    before = dict(SPACES)
    with pytest.raises(ValueError, match=message):
        register_space(make())
    assert before == SPACES


def test_unknown_name():
    with pytest.raises(ValueError, match="space: expected one of darts, s1"):
        get_space("s5")
