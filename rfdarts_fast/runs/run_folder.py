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

from rfdarts_fast.runs.checkpoint import load_checkpoint, save_checkpoint
from rfdarts_fast.runs.environment import environment
from rfdarts_fast.runs.files import JsonLines, temporary, write_json

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
        if path.exists() and not path.is_dir():
            raise RunFolderError(f"out: expected a folder, got the file {path}")
        try:
            self._open({"command": command, **to_plain(config)})
        except OSError as error:
            raise RunFolderError(f"out: {path} cannot be used: {error.strerror}") from None

    def _open(self, wanted: dict[str, Any]) -> None:
        file = self.path / "config.json"
        if file.exists():
            self._refuse_other(_read_json(file), wanted)
        elif self.path.exists() and {entry.name for entry in self.path.iterdir()} - {temporary(file).name}:
            raise RunFolderError(
                f"out: expected a new folder or one of this run, got {self.path} with other files"
            )
        else:
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(file, wanted)
        starts_file = self.path / "environment.json"
        starts = _read_json(starts_file) if starts_file.exists() else []
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
                try:
                    lines.keep(lambda record: record["epoch"] < epoch)
                except (ValueError, TypeError, KeyError):
                    raise RunFolderError(f"run: {lines.path} is damaged") from None
        return state

    def save(self, state: dict[str, Any], name: str = "checkpoint.pt") -> None:
        """Writes a checkpoint; `state["epoch"]` counts the finished epochs."""
        save_checkpoint(self.path / name, state)


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise RunFolderError(f"run: {file} is damaged: {error}") from None


def read_config(path: Path, command: str) -> dict[str, Any]:
    """The config of a run's folder; RunFolderError if there is none or it is another command's."""
    file = path / "config.json"
    if not file.exists():
        raise RunFolderError(f"run: expected the folder of a {command} run, got {path} without config.json")
    config = _read_json(file)
    if not isinstance(config, dict) or config.pop("command", None) != command:
        raise RunFolderError(f"run: expected the folder of a {command} run, got another command's: {path}")
    return config
