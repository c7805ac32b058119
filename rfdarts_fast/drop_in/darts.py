"""quark0/darts cnn/model_search.py, frozen and fused: `from rfdarts_fast.drop_in.darts import Network`."""

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


class Cell(PublishedCell):
    __doc__ = PublishedCell.__doc__
    mixed_op = MixedOp


class Network(PublishedNetwork):
    __doc__ = PublishedNetwork.__doc__
    cell = Cell
