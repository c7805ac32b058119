"""Genotypes as data: frozen dataclasses that read and write JSON and the published text forms."""

from __future__ import annotations

import ast
import json
from dataclasses import dataclass
from typing import Any

from rfdarts_fast.spaces.space import DARTS_PRIMITIVES, NASBENCH201_PRIMITIVES

Gene = tuple[str, int]

# more than any cell has; a range in a text is not expanded beyond it
_MOST_STATES = 1000

_DERIVED_PRIMITIVES = frozenset(DARTS_PRIMITIVES) - {"none"} | {"noise"}


def _items(name: str, value: object) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name}: expected a list, got {value!r}")
    return tuple(value)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _gene(name: str, value: object) -> Gene:
    match value:
        case (str(op), int(j)) if _is_int(j):
            return op, j
    raise ValueError(f"{name}: expected a pair of primitive and input, got {value!r}")


@dataclass(frozen=True)
class Genotype:
    """A cell pair of the DARTS family: two (primitive, input) genes for each node.

    Attributes:
        normal, reduce: genes in node order; gene 2i and 2i + 1 enter node i, input j < i + 2.
        normal_concat, reduce_concat: states concatenated into the cell's output.
    """

    normal: tuple[Gene, ...]
    normal_concat: tuple[int, ...]
    reduce: tuple[Gene, ...]
    reduce_concat: tuple[int, ...]

    def __post_init__(self) -> None:
        for cell in ("normal", "reduce"):
            genes = tuple(
                _gene(f"genotype.{cell}[{k}]", gene)
                for k, gene in enumerate(_items(f"genotype.{cell}", getattr(self, cell)))
            )
            concat = _items(f"genotype.{cell}_concat", getattr(self, f"{cell}_concat"))
            object.__setattr__(self, cell, genes)
            object.__setattr__(self, f"{cell}_concat", concat)
            if not genes or len(genes) % 2:
                raise ValueError(f"genotype.{cell}: expected two genes for each node, got {len(genes)} genes")
            for k, (op, j) in enumerate(genes):
                if op not in _DERIVED_PRIMITIVES:
                    raise ValueError(
                        f"genotype.{cell}[{k}]: expected a primitive out of "
                        f"{', '.join(sorted(_DERIVED_PRIMITIVES))}, got {op!r}"
                    )
                if not 0 <= j < k // 2 + 2:
                    raise ValueError(
                        f"genotype.{cell}[{k}]: expected an input from 0 to {k // 2 + 1}, got {j}"
                    )
            if not concat or not all(_is_int(j) and 0 <= j < len(genes) // 2 + 2 for j in concat):
                raise ValueError(
                    f"genotype.{cell}_concat: expected states from 0 to {len(genes) // 2 + 1}, got {concat}"
                )

    def ops(self) -> tuple[str, ...]:
        """The primitives of all genes, normal cell first."""
        return tuple(op for op, _ in self.normal + self.reduce)

    def to_dict(self) -> dict[str, Any]:
        return {
            "normal": [list(gene) for gene in self.normal],
            "normal_concat": list(self.normal_concat),
            "reduce": [list(gene) for gene in self.reduce],
            "reduce_concat": list(self.reduce_concat),
        }

    def __str__(self) -> str:
        """The literal that quark0/darts prints and reads."""
        return (
            f"Genotype(normal={list(self.normal)}, normal_concat={list(self.normal_concat)}, "
            f"reduce={list(self.reduce)}, reduce_concat={list(self.reduce_concat)})"
        )


@dataclass(frozen=True)
class CellGenotype:
    """A NAS-Bench-201 cell: one primitive on each of its six edges, 1<-0, 2<-0, 2<-1, 3<-0, 3<-1, 3<-2."""

    edges: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "edges", _items("genotype.edges", self.edges))
        if len(self.edges) != 6:
            raise ValueError(f"genotype.edges: expected 6 primitives, got {len(self.edges)}")
        for k, op in enumerate(self.edges):
            if op not in NASBENCH201_PRIMITIVES:
                raise ValueError(
                    f"genotype.edges[{k}]: expected one of {', '.join(NASBENCH201_PRIMITIVES)}, got {op!r}"
                )

    def ops(self) -> tuple[str, ...]:
        return self.edges

    def to_dict(self) -> dict[str, Any]:
        return {"edges": list(self.edges)}

    def __str__(self) -> str:
        """The cell string of the benchmark, `|op~0|+|op~0|op~1|+|op~0|op~1|op~2|`."""
        ops = iter(self.edges)
        return "+".join("|" + "".join(f"{next(ops)}~{j}|" for j in range(node)) for node in (1, 2, 3))


AnyGenotype = Genotype | CellGenotype


def to_json(genotype: AnyGenotype) -> str:
    """JSON text that `parse` reads back; the published literal is kept beside the fields for readers."""
    return json.dumps({**genotype.to_dict(), "text": str(genotype)}, indent=2)


def parse(text: str) -> AnyGenotype:
    """A genotype from a published name, JSON, the namedtuple literal or a NAS-Bench-201 cell string.

    Nothing is evaluated. Raises ValueError that names the field at fault.
    """
    text = text.strip()
    if text in PUBLISHED:
        return PUBLISHED[text]
    if text.startswith("{"):
        return _from_json(text)
    if text.startswith("|"):
        return _from_cell_string(text)
    if text.startswith("Genotype("):
        return _from_literal(text)
    raise ValueError(
        f"genotype: expected one of {', '.join(PUBLISHED)}, JSON, 'Genotype(normal=...)' or a NAS-Bench-201 "
        f"cell string, got {text[:60]!r}"
    )


def _from_json(text: str) -> AnyGenotype:
    try:
        fields = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"genotype: expected JSON, got an error: {error}") from None
    fields.pop("text", None)
    return _from_fields(fields)


def _from_fields(fields: dict[str, Any]) -> AnyGenotype:
    kind = CellGenotype if "edges" in fields else Genotype
    expected = set(kind.__dataclass_fields__)
    if set(fields) != expected:
        raise ValueError(f"genotype: expected the fields {sorted(expected)}, got {sorted(fields)}")
    return kind(**fields)


def _from_cell_string(text: str) -> CellGenotype:
    nodes = text.split("+")
    edges = []
    for i, node in enumerate(nodes):
        genes = [gene.split("~") for gene in node.strip("|").split("|")]
        if [gene[1:] for gene in genes] != [[str(j)] for j in range(i + 1)]:
            raise ValueError(f"genotype: expected inputs 0 to {i} at node {i + 1}, got {node!r}")
        edges += [gene[0] for gene in genes]
    return CellGenotype(tuple(edges))


def _from_literal(text: str) -> AnyGenotype:
    try:
        call = ast.parse(text, mode="eval").body
    # ValueError: a null byte; the last two: brackets nested too deep
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(
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
        raise ValueError("genotype: expected Genotype(...) with named fields only, each once")
    return _from_fields({str(k.arg): _literal(str(k.arg), k.value) for k in call.keywords})


def _literal(field: str, node: ast.expr) -> Any:
    try:
        # quark0/darts prints the concat fields as range(2, 6)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range":
            states = range(*(ast.literal_eval(arg) for arg in node.args))
            if len(states) > _MOST_STATES or node.keywords:
                raise ValueError
            return tuple(states)
        return ast.literal_eval(node)
    except (ValueError, TypeError, OverflowError, RecursionError, MemoryError):
        raise ValueError(f"genotype.{field}: expected a literal, got {ast.unparse(node)[:60]!r}") from None


def _published(normal: str, reduce: str) -> Genotype:
    short = {
        "sep3": "sep_conv_3x3",
        "sep5": "sep_conv_5x5",
        "dil3": "dil_conv_3x3",
        "dil5": "dil_conv_5x5",
        "max": "max_pool_3x3",
        "avg": "avg_pool_3x3",
        "skip": "skip_connect",
    }

    def genes(text: str) -> tuple[Gene, ...]:
        return tuple((short[word[:-1]], int(word[-1])) for word in text.split())

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
