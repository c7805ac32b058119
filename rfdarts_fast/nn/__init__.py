"""Networks: primitives, supernets, derived networks and random features."""

from rfdarts_fast.nn.derived import AuxiliaryHead, Cell, Network, drop_path
from rfdarts_fast.nn.nasbench201 import NasBench201Network, NasBench201SearchNetwork
from rfdarts_fast.nn.primitives import PRIMITIVES, Primitive, make_primitive, register_primitive
from rfdarts_fast.nn.random_features import ConvInit, GammaInit, freeze_random_features
from rfdarts_fast.nn.supernet import MixedOp, SearchCell, SearchNetwork, Supernet

__all__ = [
    "PRIMITIVES",
    "AuxiliaryHead",
    "Cell",
    "ConvInit",
    "GammaInit",
    "MixedOp",
    "NasBench201Network",
    "NasBench201SearchNetwork",
    "Network",
    "Primitive",
    "SearchCell",
    "SearchNetwork",
    "Supernet",
    "drop_path",
    "freeze_random_features",
    "make_primitive",
    "register_primitive",
]
