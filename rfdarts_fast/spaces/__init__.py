"""Search spaces, genotypes and how one is derived from the other. Imports nothing else of the package."""

from rfdarts_fast.spaces.derive import derive
from rfdarts_fast.spaces.genotype import PUBLISHED, AnyGenotype, CellGenotype, Genotype, parse, to_json
from rfdarts_fast.spaces.space import (
    DARTS_PRIMITIVES,
    NASBENCH201_PRIMITIVES,
    PARAMETER_FREE,
    SPACES,
    Space,
    get_space,
)

__all__ = [
    "DARTS_PRIMITIVES",
    "NASBENCH201_PRIMITIVES",
    "PARAMETER_FREE",
    "PUBLISHED",
    "SPACES",
    "AnyGenotype",
    "CellGenotype",
    "Genotype",
    "Space",
    "derive",
    "get_space",
    "parse",
    "to_json",
]
