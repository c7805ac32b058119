"""Search spaces, genotypes and the rules from one to the other. Imports no other folder of the package."""

from rfdarts_fast.spaces.derive import GenotypeRule, derive
from rfdarts_fast.spaces.genotype import AnyGenotype, CellGenotype, Genotype, GenotypeError
from rfdarts_fast.spaces.space import (
    DARTS,
    DARTS_PRIMITIVES,
    NASBENCH201,
    NASBENCH201_PRIMITIVES,
    SPACES,
    Family,
    Space,
    get_space,
    register_space,
    uniform_space,
)
from rfdarts_fast.spaces.text import PUBLISHED, parse, to_json

__all__ = [
    "DARTS",
    "DARTS_PRIMITIVES",
    "NASBENCH201",
    "NASBENCH201_PRIMITIVES",
    "PUBLISHED",
    "SPACES",
    "AnyGenotype",
    "CellGenotype",
    "Family",
    "Genotype",
    "GenotypeError",
    "GenotypeRule",
    "Space",
    "derive",
    "get_space",
    "parse",
    "register_space",
    "to_json",
    "uniform_space",
]
