"""Weights as safetensors, with what is needed to build their network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from rfdarts_fast.messages import one_line, reason, shown, thing_at
from rfdarts_fast.retrain import TrainConfig
from rfdarts_fast.retrain.run import build_network, read_genotype
from rfdarts_fast.runs.config import ConfigError, require_package
from rfdarts_fast.runs.files import write_atomic

# the options of a training that its network is built from
_SHAPE = ("channels", "layers", "cells_per_stage", "stem")
_AUXILIARY = "auxiliary_head."


def save_weights(network: nn.Module, config: TrainConfig, path: Path) -> None:
    """Writes the state of a trained network, without its auxiliary head, and what it is built from.

    Raises ConfigError without the package safetensors, WriteError if the file cannot be written.
    """
    state = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in network.state_dict().items()
        if not name.startswith(_AUXILIARY)
    }
    facts = {name: str(getattr(config, name)) for name in ("genotype", "dataset", "image_size", *_SHAPE)}
    facts["num_classes"] = str(len(state["classifier.bias"]))
    library = require_package("safetensors", "safetensors", "export", "safetensors.torch")
    write_atomic(path, library.torch.save(state, {"format": "pt", **facts}))


def load_weights(path: Path) -> nn.Module:
    """The network of a file of `save_weights`, in evaluation mode; its `forward` returns (logits, None).

    Raises ConfigError without the package safetensors, and for a file that is damaged or of another kind.
    """
    there = thing_at(path)
    if there != "a file":
        raise ConfigError(f"weights: expected a safetensors file, got {there} at {path}")
    library = require_package("safetensors", "safetensors", "export")
    try:
        with library.safe_open(str(path), "pt") as file:
            facts: dict[str, Any] = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (library.SafetensorError, OSError, ValueError) as error:
        raise ConfigError(f"weights: {path} cannot be read: {one_line(reason(error))}") from None
    try:
        shape: dict[str, Any] = {n: facts[n] if n == "stem" else int(facts[n]) for n in _SHAPE}
        config = TrainConfig(out=path.parent, genotype=facts["genotype"], auxiliary=False, **shape)
        config.check()
        classes = int(facts["num_classes"])
        # built without memory: the numbers are a stranger's
        with torch.device("meta"):
            network = build_network(config, read_genotype(config.genotype), classes)
        network.load_state_dict(state, assign=True)
    except (KeyError, ValueError, RuntimeError) as error:
        raise ConfigError(f"weights: {path} is of another kind: {shown(reason(error), 300)}") from None
    return network.eval()
