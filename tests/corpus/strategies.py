"""Hypothesis strategies: for each parser, inputs that are nearly right."""

import gzip
import json

import numpy as np
import yaml
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from rfdarts_fast.runs.config import type_hints
from rfdarts_fast.search.config import SearchConfig
from rfdarts_fast.spaces import DARTS_PRIMITIVES

from . import archives, texts
from .parsers import SEEDS

FIELDS = sorted(type_hints(SearchConfig))

numbers = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from([0, 1, -1, 2**31, 2**63, 10**400, 1e-320, float("nan"), float("inf")]),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=20))
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def damaged(draw, contents):
    """Some of `contents`, a few bytes of which are replaced, dropped or repeated."""
    content = bytearray(draw(contents))
    for _ in range(draw(st.integers(0, 6))):
        start = draw(st.integers(0, len(content)))
        stop = min(len(content), start + draw(st.integers(0, 8)))
        content[start:stop] = draw(st.one_of(st.binary(max_size=8), st.just(content[start:stop] * 2)))
    return bytes(content)


genes = st.tuples(st.sampled_from([*DARTS_PRIMITIVES, "evil"]), st.integers(-1, 6) | st.just(True)).map(list)
genotype_fields = st.fixed_dictionaries(
    {
        **{cell: st.lists(genes, min_size=1, max_size=9) | values for cell in ("normal", "reduce")},
        **{
            f"{cell}_concat": st.lists(st.integers(-1, 6), max_size=5) | values
            for cell in ("normal", "reduce")
        },
    }
)
genotypes = st.one_of(
    genotype_fields.map(json.dumps),
    genotype_fields.map(lambda changes: texts.literal(**changes)),
    st.dictionaries(st.sampled_from([*texts.FIELDS, "edges", "text"]), values).map(json.dumps),
    st.lists(st.sampled_from(["|", "+", "~", "0", "1", "none", "nor_conv_1x1", "|none~0|"]), max_size=20).map(
        "".join
    ),
).map(lambda text: text.encode("utf-8", "surrogateescape"))

yaml_files = st.one_of(
    st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=8), values, max_size=6).map(
        lambda options: yaml.safe_dump(options, allow_unicode=True).encode("utf-8", "surrogatepass")
    ),
    st.lists(
        st.sampled_from(
            [
                "seed",
                "epochs",
                ": ",
                "- ",
                "\n",
                "  ",
                "&a ",
                "*a",
                "!!int ",
                "[",
                "]",
                "{",
                "}",
                "'",
                "|\n",
                "3",
                "---\n",
            ]
        ),
        max_size=25,
    ).map(lambda parts: "".join(parts).encode()),
)

split_entries = st.tuples(
    st.sampled_from(["int", "str"]), st.lists(st.integers(-1, 7) | scalars, max_size=5)
).map(list)
split_files = st.one_of(
    st.dictionaries(st.sampled_from(["train", "valid", "test"]), split_entries | values, max_size=3)
    .map(json.dumps).map(str.encode).flatmap(lambda text: st.sampled_from([text, gzip.compress(text)])),
)  # fmt: skip

arrays = npst.arrays(
    st.sampled_from([np.uint8, np.int64, np.float32, np.bool_, "<U2", "M8[s]", "c8"]),
    npst.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4),
)
npz_files = st.dictionaries(st.sampled_from([*archives.GOOD, "class_names"]), arrays, max_size=5).map(
    lambda changes: archives.archive(archives.members(**changes))
)

option_words = st.one_of(
    st.sampled_from([f"--{name.replace('_', '-')}" for name in FIELDS] + ["--no-affine", "--", "--epochs=3"]),
    st.sampled_from(["nan", "-1", "0", "None", "True", "rf-darts", "１", "1e400", ""]),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8),
)
command_lines = st.lists(option_words.filter(lambda word: word not in ("--help", "-h")), max_size=6).map(
    lambda words: "\0".join(words).encode()
)

configs = st.dictionaries(st.sampled_from([*FIELDS, "command"]), values, max_size=6).map(
    lambda changes: json.dumps({"command": "search", **changes}).encode()
)

STRATEGIES = {
    "genotype": genotypes,
    "options": command_lines,
    "yaml": yaml_files,
    "split": split_files,
    "npz": npz_files,
    "config": configs,
}
"""Bytes for each parser that takes a text or an archive."""
INPUTS = {
    parser: st.one_of(STRATEGIES.get(parser, st.nothing()), damaged(st.sampled_from(seeds)))
    for parser, seeds in SEEDS.items()
}
"""Bytes for every parser: those of its strategy, and damaged good ones."""
