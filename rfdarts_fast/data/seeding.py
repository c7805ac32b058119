"""Random numbers that depend only on named integers, never on what was drawn before."""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch


class Purpose(IntEnum):
    """Keeps the uses of one seed independent of each other. The numbers are part of what a run reproduces."""

    ORDER = 0
    BATCH = 1
    PHOTO = 2
    STEP = 3


def torch_generator(seed: int, purpose: Purpose, *keys: int) -> torch.Generator:
    """A CPU generator for (seed, purpose, keys); on the CPU so that every device draws the same."""
    state = _sequence(seed, purpose, keys).generate_state(1, np.uint64)[0]
    # manual_seed takes what fits a signed 64-bit integer
    return torch.Generator().manual_seed(int(state) >> 1)


def numpy_generator(seed: int, purpose: Purpose, *keys: int) -> np.random.Generator:
    """The numpy counterpart, cheap enough to make one per image."""
    return np.random.Generator(np.random.PCG64(_sequence(seed, purpose, keys)))


def _sequence(seed: int, purpose: Purpose, keys: tuple[int, ...]) -> np.random.SeedSequence:
    return np.random.SeedSequence(seed, spawn_key=(int(purpose), *keys))
