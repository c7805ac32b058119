"""The supernet of a config, frozen as its method says."""

from __future__ import annotations

from torch import nn

from rfdarts_fast.nn import NasBench201SearchNetwork, SearchNetwork, Supernet, freeze_random_features
from rfdarts_fast.search.config import SearchConfig
from rfdarts_fast.spaces import Space, get_space


def _darts(space: Space, config: SearchConfig, num_classes: int) -> Supernet:
    return SearchNetwork(
        space,
        C=config.channels,
        num_classes=num_classes,
        layers=config.layers,
        stem=config.stem,
        K=config.partial_channels,
        edge_norm=config.edge_norm,
        affine=config.affine,
        track_running_stats=config.track_running_stats,
    )


def _nasbench201(space: Space, config: SearchConfig, num_classes: int) -> Supernet:
    return NasBench201SearchNetwork(
        space,
        C=config.channels,
        num_classes=num_classes,
        N=config.cells_per_stage,
        affine=config.affine,
        track_running_stats=config.track_running_stats,
    )


# by the name of a space's family
SUPERNETS = {"darts": _darts, "nasbench201": _nasbench201}


def build_supernet(config: SearchConfig, num_classes: int) -> Supernet:
    """The supernet at its initial values, drawn from the global random state."""
    space = get_space(config.space)
    network = SUPERNETS[space.family.name](space, config, num_classes)
    if config.random_features:
        freeze_random_features(network, config.conv_init, config.gamma_init, config.train_classifier)
    return network


def weight_groups(network: nn.Module, config: SearchConfig) -> list[dict]:
    """Optimiser groups of the trainable weights; gamma and beta stand apart only if they are not decayed."""
    trainable = {p for p in network.parameters() if p.requires_grad}
    if config.bn_weight_decay:
        return [{"params": [p for p in network.parameters() if p in trainable]}]
    affine = {
        p for m in network.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters(recurse=False)
    }
    groups: list[dict] = [
        {"params": [p for p in network.parameters() if p in trainable - affine]},
        {"params": [p for p in network.parameters() if p in trainable & affine], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
