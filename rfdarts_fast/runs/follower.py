"""The folder of a run as the processes have it that do not lead: they neither read nor write it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from rfdarts_fast.runs.config import RunConfig
from rfdarts_fast.runs.fingerprint import Fingerprint
from rfdarts_fast.runs.run_folder import RunFolder
from rfdarts_fast.runs.world import World


class FollowerFolder:
    """Takes the place of a `RunFolder` in a process that does not lead; what it is given goes nowhere."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = self.alphas = self
        self.notes: list[str] = []
        # as if saved: the first checkpoint is the leader's
        self.last_saved = f"in {path}"

    def __enter__(self) -> FollowerFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def load(self, misfit_of: Any) -> None:
        """None: the leader sends what it loads."""

    def begin(self) -> None:
        pass

    def save(self, state: dict[str, Any], name: str = "") -> None:
        pass

    def append(self, record: dict[str, Any]) -> None:
        pass


def folder_of(
    world: World, command: str, config: RunConfig, data: Fingerprint, read_only: bool
) -> AbstractContextManager[RunFolder | FollowerFolder]:
    """The folder of a run, open in the process that leads; arguments and errors as of `RunFolder`."""
    if not world.leads:
        return FollowerFolder(config.out)
    return RunFolder(config.out, command, config, data, read_only)
