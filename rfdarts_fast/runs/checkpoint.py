"""Checkpoints: everything a run needs to go on bit by bit as if it had not stopped."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rfdarts_fast.runs.files import write_atomic

# the way out of a folder that this version cannot read
ANOTHER_VERSION = (
    "go on with the version of rfdarts_fast that wrote it (its environment.json names it), or start anew in "
    "another folder"
)


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or holds the state of another version."""


def rng_state() -> dict[str, Any]:
    """The states of the global random generators of Python, NumPy and PyTorch."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": (version, list(internal), gauss),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    # a run may move to a machine with another number of GPUs; the data order does not depend on these
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    write_atomic(path, lambda file: torch.save(state, file))


def load_checkpoint(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """The state that `save_checkpoint` wrote; CheckpointError that names the file if it cannot be read."""
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    # whatever the bytes may make of the unpickler
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"checkpoint: {path} cannot be read: {reason}") from None


@contextmanager
def restoring(path: Path) -> Iterator[None]:
    """Puts state from the checkpoint `path` back inside; CheckpointError that names a part that does not fit.

    A part that a version adds is to be read with a default, or it refuses the checkpoints of earlier ones.
    """
    try:
        yield
    except (KeyError, RuntimeError, ValueError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise CheckpointError(
            f"checkpoint: {path} does not fit this version: {reason}; {ANOTHER_VERSION}"
        ) from None
