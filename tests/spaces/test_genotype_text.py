"""Genotypes as text: every published form is read back, anything else is refused without being evaluated."""

import csv
import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rfdarts_fast.spaces import NASBENCH201_PRIMITIVES, PUBLISHED, CellGenotype, Genotype, parse, to_json

DERIVED = ("max_pool_3x3", "avg_pool_3x3", "skip_connect", "sep_conv_3x3", "dil_conv_5x5", "noise")


@st.composite
def genotypes(draw):
    def genes():
        return [(draw(st.sampled_from(DERIVED)), draw(st.integers(0, k // 2 + 1))) for k in range(8)]

    concat = st.lists(st.integers(0, 5), min_size=1, max_size=6)
    return Genotype(tuple(genes()), tuple(draw(concat)), tuple(genes()), tuple(draw(concat)))


cell_genotypes = st.builds(
    CellGenotype, st.lists(st.sampled_from(NASBENCH201_PRIMITIVES), min_size=6, max_size=6).map(tuple)
)


@given(st.one_of(genotypes(), cell_genotypes))
def test_json_and_text_are_read_back(genotype):
    assert parse(to_json(genotype)) == genotype
    assert parse(str(genotype)) == genotype
    assert json.loads(to_json(genotype))["text"] == str(genotype)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_names(name):
    genotype = parse(f" {name}\n")
    assert genotype == PUBLISHED[name]
    assert genotype.normal_concat == genotype.reduce_concat == (2, 3, 4, 5)


# copied from quark0/darts cnn/genotypes.py and PC-DARTS genotypes.py
LITERALS = {
    "DARTS_V1": "Genotype(normal=[('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('skip_connect', 0), ('sep_conv_3x3', 1), ('skip_connect', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('skip_connect', 2)], normal_concat=[2, 3, 4, 5], reduce=[('max_pool_3x3', 0), ('max_pool_3x3', 1), ('skip_connect', 2), ('max_pool_3x3', 0), ('max_pool_3x3', 0), ('skip_connect', 2), ('skip_connect', 2), ('avg_pool_3x3', 0)], reduce_concat=[2, 3, 4, 5])",  # noqa: E501
    "DARTS_V2": "Genotype(normal=[('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 1), ('skip_connect', 0), ('skip_connect', 0), ('dil_conv_3x3', 2)], normal_concat=[2, 3, 4, 5], reduce=[('max_pool_3x3', 0), ('max_pool_3x3', 1), ('skip_connect', 2), ('max_pool_3x3', 1), ('max_pool_3x3', 0), ('skip_connect', 2), ('skip_connect', 2), ('max_pool_3x3', 1)], reduce_concat=[2, 3, 4, 5])",  # noqa: E501
    "PC_DARTS_cifar": "Genotype(normal=[('sep_conv_3x3', 1), ('skip_connect', 0), ('sep_conv_3x3', 0), ('dil_conv_3x3', 1), ('sep_conv_5x5', 0), ('sep_conv_3x3', 1), ('avg_pool_3x3', 0), ('dil_conv_3x3', 1)], normal_concat=range(2, 6), reduce=[('sep_conv_5x5', 1), ('max_pool_3x3', 0), ('sep_conv_5x5', 1), ('sep_conv_5x5', 2), ('sep_conv_3x3', 0), ('sep_conv_3x3', 3), ('sep_conv_3x3', 1), ('sep_conv_3x3', 2)], reduce_concat=range(2, 6))",  # noqa: E501
    "PC_DARTS_image": "Genotype(normal=[('skip_connect', 1), ('sep_conv_3x3', 0), ('sep_conv_3x3', 0), ('skip_connect', 1), ('sep_conv_3x3', 1), ('sep_conv_3x3', 3), ('sep_conv_3x3', 1), ('dil_conv_5x5', 4)], normal_concat=range(2, 6), reduce=[('sep_conv_3x3', 0), ('skip_connect', 1), ('dil_conv_5x5', 2), ('max_pool_3x3', 1), ('sep_conv_3x3', 2), ('sep_conv_3x3', 1), ('sep_conv_5x5', 0), ('sep_conv_3x3', 3)], reduce_concat=range(2, 6))",  # noqa: E501
}


@pytest.mark.parametrize("name", LITERALS)
def test_published_literals(name):
    assert parse(LITERALS[name]) == PUBLISHED[name]


GENES = "[('skip_connect', 0), ('skip_connect', 1)]"
FIELDS = f"normal={GENES}, normal_concat=[2], reduce={GENES}"


def test_the_smallest_literal_is_read():
    assert parse(f"Genotype({FIELDS}, reduce_concat=[2])").reduce_concat == (2,)


def as_json(**changes):
    genes = [["skip_connect", 0], ["skip_connect", 1]]
    fields = {"normal": genes, "normal_concat": [2], "reduce": genes, "reduce_concat": [2]}
    return json.dumps({**fields, **changes})


REFUSED = {
    "nothing": ("", "expected one of DARTS_V1"),
    "unknown name": ("DARTS_V3", "expected one of DARTS_V1"),
    "code": ("__import__('os').system('false')", "expected one of DARTS_V1"),
    "code in a field": (f"Genotype({FIELDS}, reduce_concat=__import__('os').getpid())", "reduce_concat"),
    "code around": (f"Genotype({FIELDS}, reduce_concat=[2]).__class__", "named fields only"),
    "call of a call": (f"Genotype()({FIELDS}, reduce_concat=[2])", "named fields only"),
    "code in a range": (f"Genotype({FIELDS}, reduce_concat=range(exit()))", "reduce_concat"),
    "endless range": (f"Genotype({FIELDS}, reduce_concat=range(2, 10**12))", "reduce_concat"),
    "huge range": (f"Genotype({FIELDS}, reduce_concat=range(100000))", "reduce_concat: expected a literal"),
    "range of text": (f"Genotype({FIELDS}, reduce_concat=range('a'))", "reduce_concat"),
    "range of nothing": (f"Genotype({FIELDS}, reduce_concat=range(2, 6, 0))", "reduce_concat"),
    "positional": (f"Genotype({GENES}, [2], {GENES}, [2])", "named fields only"),
    "unpacked": ("Genotype(**{'normal': []})", "named fields only"),
    "twice": (f"Genotype({FIELDS}, reduce_concat=[2], reduce_concat=[2])", "each once"),
    "missing field": (f"Genotype({FIELDS})", "expected the fields"),
    "other field": (f"Genotype({FIELDS}, reduce_concat=[2], hidden=1)", "expected the fields"),
    "not closed": (f"Genotype({FIELDS}", "syntax error"),
    "null byte": (f"Genotype({FIELDS}, reduce_concat=[2])\0", "syntax error"),
    "deep brackets": ("Genotype(normal=" + "[" * 5000 + "]" * 5000 + ")", "genotype"),
    "deep sums": ("Genotype(normal=" + "+".join("1" * 5000) + ")", "genotype"),
    "text for genes": (as_json(normal="skip"), "genotype.normal: expected a list"),
    "number for genes": (as_json(normal=3), "genotype.normal: expected a list"),
    "three in a gene": (as_json(normal=[["skip_connect", 0, 1]] * 2), r"normal\[0\]: expected a pair"),
    "text for a gene": (as_json(reduce=["sk", "ip"]), r"genotype.reduce\[0\]: expected a pair"),
    "fraction": (as_json(normal=[["skip_connect", 0], ["skip_connect", 1.5]]), r"genotype.normal\[1\]"),
    "truth": (as_json(normal=[["skip_connect", 0], ["skip_connect", True]]), r"genotype.normal\[1\]"),
    "none": (as_json(normal=[["none", 0], ["skip_connect", 1]]), "expected a primitive"),
    "unknown primitive": (as_json(normal=[["eval", 0], ["skip_connect", 1]]), "expected a primitive"),
    "later input": (as_json(normal=[["skip_connect", 0], ["skip_connect", 2]]), "an input from 0 to 1"),
    "negative input": (as_json(normal=[["skip_connect", 0], ["skip_connect", -1]]), "expected an input"),
    "odd": (as_json(normal=[["skip_connect", 0]] * 3), "two genes for each node"),
    "empty": (as_json(normal=[]), "two genes for each node"),
    "concat of what is not": (as_json(normal_concat=[3]), "normal_concat: expected states from 0 to 2"),
    "concat of text": (as_json(normal_concat=["2"]), "normal_concat: expected states"),
    "concat of nothing": (as_json(reduce_concat=[]), "reduce_concat: expected states"),
    "broken json": ('{"normal": ', "expected JSON"),
    "deep json": ('{"normal": ' + "[" * 100_000, "expected JSON"),
    "edges as text": ('{"edges": "abcdef"}', "genotype.edges: expected a list"),
    "five edges": (json.dumps({"edges": ["none"] * 5}), "expected 6 primitives"),
    "edge of DARTS": (json.dumps({"edges": ["sep_conv_3x3"] * 6}), r"genotype.edges\[0\]"),
    "edge of lists": (json.dumps({"edges": [["none"]] * 6}), r"genotype.edges\[0\]"),
    "cell string, wrong input": ("|none~1|+|none~0|none~1|+|none~0|none~1|none~2|", "expected inputs 0 to 0"),
    "cell string, no input": ("|none|+|none~0|none~1|+|none~0|none~1|none~2|", "expected inputs 0 to 0"),
    "cell string, two nodes": ("|none~0|+|none~0|none~1|", "expected 6 primitives"),
    "cell string, unknown": ("|evil~0|+|none~0|none~1|+|none~0|none~1|none~2|", "a primitive out of none"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_other_text_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_genotypes_do_not_change():
    with pytest.raises(AttributeError):
        PUBLISHED["DARTS_V1"].normal = ()
    assert hash(parse("DARTS_V2")) == hash(PUBLISHED["DARTS_V2"])


def test_cells_of_the_nasbench201_table(shared_data):
    with gzip.open(shared_data("nb201.csv.gz"), "rt") as file:
        rows = list(csv.DictReader(file))
    cells = [parse(row["arch"]) for row in rows]
    assert len(set(cells)) == 5**6
    assert [str(cell) for cell in cells] == [row["arch"] for row in rows]
    skips = rows[cells.index(CellGenotype(("skip_connect",) * 6))]
    tests = ("cifar10_test", "cifar100_test", "imagenet16_test")
    assert [round(float(skips[name]), 2) for name in tests] == [54.30, 15.61, 16.32]
    assert cells[9930].edges == ("nor_conv_3x3",) * 3 + ("skip_connect",) + ("nor_conv_3x3",) * 2
    assert round(float(rows[9930]["nats_cifar10_test"]), 2) == 94.36
