"""yuhuixu1993/PC-DARTS model_search_imagenet.py, frozen and fused: K = 2, edge normalisation, ImageNet stem.

The published module evaluates each mixed op twice in a forward pass, which moves the running statistics
twice; this one evaluates it once. Logits and gradients are the same.
"""

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
    default_K = 2


class Cell(PublishedCell):
    __doc__ = PublishedCell.__doc__
    mixed_op = MixedOp


class Network(PublishedNetwork):
    __doc__ = PublishedNetwork.__doc__
    cell = Cell
    edge_norm = True
    stem_type = "imagenet"
