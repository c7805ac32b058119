"""yuhuixu1993/PC-DARTS model_search.py, frozen and fused: K = 4, edge normalisation."""

from __future__ import annotations

from rfdarts_fast.drop_in.published import (
    PRIMITIVES,
    Genotype,
    PublishedCell,
    PublishedMixedOp,
    PublishedNetwork,
)

__all__ = ["PRIMITIVES", "Cell", "Genotype", "MixedOp", "Network"]


class MixedOp(PublishedMixedOp):
    __doc__ = PublishedMixedOp.__doc__
    default_K = 4


class Cell(PublishedCell):
    __doc__ = PublishedCell.__doc__
    mixed_op = MixedOp


class Network(PublishedNetwork):
    __doc__ = PublishedNetwork.__doc__
    cell = Cell
    edge_norm = True
