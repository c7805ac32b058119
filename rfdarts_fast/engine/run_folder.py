"""A run's folder: its config, environment, metrics, checkpoints and result.

config.json        what was asked for
environment.json   where it ran, one entry for each start
metrics.jsonl      one record for each epoch
checkpoint.pt      the state to go on from
"""

from __future__ import annotations

import json
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from rfdarts_fast.engine.checkpoint import load_checkpoint, save_checkpoint
from rfdarts_fast.engine.environment import environment
from rfdarts_fast.engine.files import JsonLines, write_json

# where and how fast a run runs, not what it computes
FREE_FIELDS = frozenset(
    {
        "out",
        "config",
        "preset",
        "recipe",
        "data_root",
        "download",
        "workers",
        "checkpoint_minutes",
        "tensorboard",
    }
)


class RunFolderError(ValueError):
    """The folder cannot be used for this run."""


def to_plain(config: Any) -> dict[str, Any]:
    """A config dataclass as JSON values."""
    assert is_dataclass(config) and not isinstance(config, type)
    return json.loads(json.dumps(asdict(config), default=str))


class RunFolder:
    """Opens or resumes a run.

    Args:
        path: the folder; made if absent.
        command: "search" or "train".
        config: the run's config dataclass.

    Raises:
        RunFolderError: if the folder belongs to another command or config, or holds foreign files.
    """

    def __init__(self, path: Path, command: str, config: Any) -> None:
        self.path = path
        self.metrics = JsonLines(path / "metrics.jsonl")
        self.alphas = JsonLines(path / "alphas.jsonl")
        self._checkpoint = path / "checkpoint.pt"
        wanted = {"command": command, **to_plain(config)}
        if path.exists() and not path.is_dir():
            raise RunFolderError(f"out: expected a folder, got the file {path}")
        if (path / "config.json").exists():
            self._refuse_other(json.loads((path / "config.json").read_text()), wanted)
        elif path.exists() and any(path.iterdir()):
            raise RunFolderError(
                f"out: expected a new folder or one of this run, got {path} with other files"
            )
        else:
            path.mkdir(parents=True, exist_ok=True)
            write_json(path / "config.json", wanted)
        starts_file = path / "environment.json"
        starts = json.loads(starts_file.read_text()) if starts_file.exists() else []
        write_json(starts_file, [*starts, environment()])

    def _refuse_other(self, found: dict[str, Any], wanted: dict[str, Any]) -> None:
        differences = [
            f"{name} is {found.get(name)!r} there and {wanted.get(name)!r} here"
            for name in sorted(found.keys() | wanted.keys())
            if name not in FREE_FIELDS and found.get(name) != wanted.get(name)
        ]
        if differences:
            raise RunFolderError(f"out: {self.path} belongs to another run: {'; '.join(differences)}")

    def load(self) -> dict[str, Any] | None:
        """The last checkpoint, or None at the start. Records of epochs it does not know are dropped."""
        state = load_checkpoint(self._checkpoint) if self._checkpoint.exists() else None
        epoch = state["epoch"] if state else 0
        for lines in (self.metrics, self.alphas):
            if lines.path.exists():
                lines.keep(lambda record: record["epoch"] < epoch)
        return state

    def save(self, state: dict[str, Any], name: str = "checkpoint.pt") -> None:
        """Writes a checkpoint; `state["epoch"]` counts the finished epochs."""
        save_checkpoint(self.path / name, state)


def read_config(path: Path, command: str) -> dict[str, Any]:
    """The config of a run's folder; RunFolderError if there is none or it is another command's."""
    file = path / "config.json"
    if not file.exists():
        raise RunFolderError(f"run: expected the folder of a {command} run, got {path} without config.json")
    config = json.loads(file.read_text())
    if config.pop("command") != command:
        raise RunFolderError(f"run: expected the folder of a {command} run, got another command's: {path}")
    return config
