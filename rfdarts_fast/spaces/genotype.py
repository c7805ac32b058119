"""Genotypes as data: frozen dataclasses, whose text forms are in text.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rfdarts_fast.messages import one_line, shown

Gene = tuple[str, int]


class GenotypeError(ValueError):
    """A genotype that no network has: one line that names the field at fault."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def _items(name: str, value: object) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise GenotypeError(f"{name}: expected a list, got {shown(value)}")
    return tuple(value)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _gene(name: str, value: object) -> Gene:
    match value:
        case (str(op), int(j)) if _is_int(j):
            return op, j
    raise GenotypeError(f"{name}: expected a pair of primitive and input, got {shown(value)}")


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
                raise GenotypeError(f"genotype.{cell}: expected two genes for each node, got {len(genes)}")
            for k, (_, j) in enumerate(genes):
                if not 0 <= j < k // 2 + 2:
                    raise GenotypeError(
                        f"genotype.{cell}[{k}]: expected an input from 0 to {k // 2 + 1}, got {shown(j)}"
                    )
            if not concat or not all(_is_int(j) and 0 <= j < len(genes) // 2 + 2 for j in concat):
                top = len(genes) // 2 + 1
                raise GenotypeError(
                    f"genotype.{cell}_concat: expected states from 0 to {top}, got {shown(concat)}"
                )

    def ops(self) -> tuple[str, ...]:
        """The primitives of all genes, normal cell first."""
        return tuple(op for op, _ in self.normal + self.reduce)

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
            raise GenotypeError(f"genotype.edges: expected 6 primitives, got {len(self.edges)}")
        for k, op in enumerate(self.edges):
            if not isinstance(op, str):
                raise GenotypeError(f"genotype.edges[{k}]: expected a primitive, got {shown(op)}")

    def ops(self) -> tuple[str, ...]:
        return self.edges

    def __str__(self) -> str:
        """The cell string of the benchmark, `|op~0|+|op~0|op~1|+|op~0|op~1|op~2|`."""
        ops = iter(self.edges)
        return "+".join("|" + "".join(f"{next(ops)}~{j}|" for j in range(node)) for node in (1, 2, 3))


AnyGenotype = Genotype | CellGenotype
"""The result of a search."""
