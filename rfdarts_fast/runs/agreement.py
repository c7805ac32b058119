"""The options, versions and data that all processes of a run share, compared before anything is written."""

from __future__ import annotations

from typing import Any

import torch

import rfdarts_fast
from rfdarts_fast.messages import shown
from rfdarts_fast.runs.config import RunConfig
from rfdarts_fast.runs.environment import commit
from rfdarts_fast.runs.fingerprint import Fingerprint, changes
from rfdarts_fast.runs.run_folder import to_plain
from rfdarts_fast.runs.world import World

# where things lie on each machine; what lies there is compared by its fingerprint
_PLACES = frozenset({"config", "data_root", "download", "split_file", "table"})


def refuse_different_runs(world: World, config: RunConfig) -> None:
    """ConfigError that names the first option, or version, of which two processes have different values.

    Process 0 raises it, the others OtherFailed. Paths of data may differ: the data are compared later.
    """
    if world.alone:
        return
    values = {"rfdarts_fast": rfdarts_fast.__version__, "commit": commit(), "torch": torch.__version__}
    values |= {name: value for name, value in to_plain(config).items() if name not in _PLACES}
    world.refuse_different(values, "options", _first_different)


def _first_different(there: dict[str, Any], other: dict[str, Any]) -> str:
    # a process of another version may have other options, too
    name = next(name for name in [*there, *other] if there.get(name) != other.get(name))
    return f"{name} is {shown(other.get(name))} and in process 0 {shown(there.get(name))}"


def refuse_different_data(world: World, data: Fingerprint) -> None:
    """ConfigError, in process 0, that names the part of the data which is another one in another process."""
    world.refuse_different(data, "data", lambda there, other: " and ".join(changes(there, other)))
