"""Genotypes as text: published names, JSON, the literal of quark0/darts, the cell string of NAS-Bench-201."""

from __future__ import annotations

import ast
import json
from dataclasses import asdict, fields
from typing import Any

from rfdarts_fast.messages import shown
from rfdarts_fast.spaces.derive import GenotypeRule
from rfdarts_fast.spaces.genotype import AnyGenotype, CellGenotype, Gene, Genotype, GenotypeError
from rfdarts_fast.spaces.space import SHORT_NAMES, SPACES

# more than any cell has; a range in a text is not expanded beyond it
_MOST_STATES = 1000
MOST_CHARACTERS = 200_000


def to_json(genotype: AnyGenotype, rule: GenotypeRule | None = None) -> str:
    """JSON text that `parse` reads back; for readers, the literal and the rule are beside the fields."""
    derived = {} if rule is None else {"rule": rule}
    return json.dumps({**asdict(genotype), "text": str(genotype), **derived}, indent=2)


def parse(text: str) -> AnyGenotype:
    """A genotype from a published name, JSON, the namedtuple literal or a NAS-Bench-201 cell string.

    Nothing is evaluated. Raises GenotypeError that names the field at fault; so does a primitive that no
    registered space has.
    """
    if len(text) > MOST_CHARACTERS:
        raise GenotypeError(f"genotype: expected at most {MOST_CHARACTERS} characters, got {len(text)}")
    text = text.strip()
    if text in PUBLISHED:
        return PUBLISHED[text]
    readers = {"{": _from_json, "|": _from_cell_string, "Genotype(": _from_literal}
    for start, read in readers.items():
        if text.startswith(start):
            genotype = read(text)
            _check_primitives(genotype)
            return genotype
    raise GenotypeError(
        f"genotype: expected one of {', '.join(PUBLISHED)}, JSON, 'Genotype(normal=...)' or a NAS-Bench-201 "
        f"cell string, got {shown(text)}"
    )


def _check_primitives(genotype: AnyGenotype) -> None:
    spaces = [space for space in SPACES.values() if space.family.genotype is type(genotype)]
    known = dict.fromkeys(name for space in spaces for name in space.primitives())
    if isinstance(genotype, Genotype):
        known.pop("none", None)
    for field in fields(genotype):
        for k, gene in enumerate(getattr(genotype, field.name)):
            name = gene[0] if isinstance(gene, tuple) else gene
            if isinstance(name, str) and name not in known:
                names = ", ".join(known)
                raise GenotypeError(
                    f"genotype.{field.name}[{k}]: expected a primitive out of {names}, got {shown(name)}"
                )


def _from_json(text: str) -> AnyGenotype:
    try:
        values = json.loads(text, object_pairs_hook=_named_once)
    except GenotypeError:
        raise
    # ValueError: an integer of more digits than Python reads, too
    except (ValueError, RecursionError) as error:
        raise GenotypeError(f"genotype: expected JSON, got an error: {error}") from None
    for name in ("text", "rule"):
        values.pop(name, None)
    return _from_fields(values)


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise GenotypeError(f"genotype: expected every field once, got {shown([name for name, _ in pairs])}")
    return values


def _from_fields(values: dict[str, Any]) -> AnyGenotype:
    genotype_class = CellGenotype if "edges" in values else Genotype
    expected = {field.name for field in fields(genotype_class)}
    if set(values) != expected:
        raise GenotypeError(f"genotype: expected the fields {sorted(expected)}, got {shown(sorted(values))}")
    return genotype_class(**values)


def _from_cell_string(text: str) -> CellGenotype:
    nodes = text.split("+")
    edges = []
    for i, node in enumerate(nodes):
        genes = [gene.split("~") for gene in node.strip("|").split("|")]
        if [gene[1:] for gene in genes] != [[str(j)] for j in range(i + 1)]:
            raise GenotypeError(f"genotype: expected inputs 0 to {i} at node {i + 1}, got {shown(node)}")
        edges += [gene[0] for gene in genes]
    return CellGenotype(tuple(edges))


def _from_literal(text: str) -> AnyGenotype:
    try:
        call = ast.parse(text, mode="eval").body
    # ValueError: a null byte; the last two: brackets nested too deep
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise GenotypeError(
            f"genotype: expected Genotype(normal=..., ...), got a syntax error: {error}"
        ) from None
    names = [k.arg for k in call.keywords] if isinstance(call, ast.Call) else []
    if (
        not isinstance(call, ast.Call)
        or not isinstance(call.func, ast.Name)
        or call.args
        or None in names
        or len(set(names)) < len(names)
    ):
        raise GenotypeError("genotype: expected Genotype(...) with named fields only, each once")
    return _from_fields({str(k.arg): _literal(text, str(k.arg), k.value) for k in call.keywords})


def _literal(text: str, field: str, node: ast.expr) -> Any:
    try:
        # quark0/darts prints the concat fields as range(2, 6)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range":
            states = range(*(ast.literal_eval(arg) for arg in node.args))
            if len(states) > _MOST_STATES or node.keywords:
                raise ValueError
            return tuple(states)
        return ast.literal_eval(node)
    except (ValueError, TypeError, OverflowError, RecursionError, MemoryError):
        source = ast.get_source_segment(text, node)
        raise GenotypeError(f"genotype.{field}: expected a literal, got {shown(source)}") from None


def _published(normal: str, reduce: str) -> Genotype:
    def genes(text: str) -> tuple[Gene, ...]:
        return tuple((SHORT_NAMES[word[:-1]], int(word[-1])) for word in text.split())

    return Genotype(genes(normal), (2, 3, 4, 5), genes(reduce), (2, 3, 4, 5))


# quark0/darts cnn/genotypes.py and yuhuixu1993/PC-DARTS genotypes.py; the last digit is the input
PUBLISHED: dict[str, Genotype] = {
    "DARTS_V1": _published(
        "sep31 sep30 skip0 sep31 skip0 sep31 sep30 skip2",
        "max0 max1 skip2 max0 max0 skip2 skip2 avg0",
    ),
    "DARTS_V2": _published(
        "sep30 sep31 sep30 sep31 sep31 skip0 skip0 dil32",
        "max0 max1 skip2 max1 max0 skip2 skip2 max1",
    ),
    "PC_DARTS_cifar": _published(
        "sep31 skip0 sep30 dil31 sep50 sep31 avg0 dil31",
        "sep51 max0 sep51 sep52 sep30 sep33 sep31 sep32",
    ),
    "PC_DARTS_image": _published(
        "skip1 sep30 sep30 skip1 sep31 sep33 sep31 dil54",
        "sep30 skip1 dil52 max1 sep32 sep31 sep50 sep33",
    ),
}
"""Published genotypes by name."""
