"""A run's folder: its config, environment, metrics, checkpoints and result.

config.json        the options of the run
environment.json   the machine and the versions, one entry for each start
metrics.jsonl      one record for each epoch
checkpoint.pt      the state to go on from
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import torch

from rfdarts_fast.runs.checkpoint import ANOTHER_VERSION, load_checkpoint, restoring, save_checkpoint
from rfdarts_fast.runs.config import ConfigError, RunConfig, from_plain
from rfdarts_fast.runs.environment import environment
from rfdarts_fast.runs.files import JsonLines, temporary, write_json

# where and how fast a run runs, not what it computes
FREE_FIELDS = frozenset(
    {"out", "config", "preset", "data_root", "download", "workers", "checkpoint_minutes", "tensorboard"}
)


def _compiled_backend(values: dict[str, Any]) -> str:
    """The name of what was `native`: compiled C++, for the CPU or for GPUs."""
    device = values.get("device", RunConfig.device)
    on_gpu = torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
    return "cuda" if on_gpu else "cpu"


# (command, option) or (command, option, value) of an earlier version -> the option or value of this one; a
# function makes it of the folder's other options
RENAMED: dict[tuple[str, ...], str | Callable[[dict[str, Any]], str]] = {
    # 0.1.0
    ("train", "recipe"): "preset",
    ("search", "backend", "native"): _compiled_backend,
}

Config = TypeVar("Config", bound=RunConfig)


class RunFolderError(ValueError):
    """The folder cannot be used for this run."""


def to_plain(config: RunConfig) -> dict[str, Any]:
    """A config as JSON values."""
    return json.loads(json.dumps(asdict(config), default=str))


class RunFolder:
    """Opens or resumes a run.

    Args:
        path: the folder; made if absent.
        command: "search" or "train".
        config: the run's config.

    Raises:
        RunFolderError: if the folder belongs to another command or config, or holds foreign files.
    """

    def __init__(self, path: Path, command: str, config: RunConfig) -> None:
        self.path = path
        self.metrics = JsonLines(path / "metrics.jsonl")
        self.alphas = JsonLines(path / "alphas.jsonl")
        self.checkpoint = path / "checkpoint.pt"
        if path.exists() and not path.is_dir():
            raise RunFolderError(f"out: expected a folder, got the file {path}")
        try:
            self._open(command, config)
        except OSError as error:
            raise RunFolderError(f"out: {path} cannot be used: {error.strerror}") from None

    def _open(self, command: str, config: RunConfig) -> None:
        file = self.path / "config.json"
        if file.exists():
            self._refuse_other(to_plain(read_config(self.path, command, type(config))), to_plain(config))
        elif self.path.exists() and {entry.name for entry in self.path.iterdir()} - {temporary(file).name}:
            raise RunFolderError(
                f"out: expected a new folder or one of this run, got {self.path} with other files"
            )
        else:
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(file, {"command": command, **to_plain(config)})
        starts_file = self.path / "environment.json"
        starts = _read_json(starts_file) if starts_file.exists() else []
        write_json(starts_file, [*starts, environment()])

    def _refuse_other(self, there: dict[str, Any], here: dict[str, Any]) -> None:
        differences = [
            f"{name} is {there[name]!r} there and {here[name]!r} here"
            for name in sorted(here.keys() - FREE_FIELDS)
            if there[name] != here[name]
        ]
        if differences:
            raise RunFolderError(f"out: {self.path} belongs to another run: {'; '.join(differences)}")

    def load(self) -> dict[str, Any] | None:
        """The last checkpoint, or None at the start. Records of epochs it does not know are dropped."""
        state = load_checkpoint(self.checkpoint) if self.checkpoint.exists() else None
        with restoring(self.checkpoint):
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


def read_config(path: Path, command: str, config_class: type[Config]) -> Config:
    """The config of a run's folder.

    One that an earlier version wrote gets this version's names, see `RENAMED`, and the defaults of options
    that it lacks.

    Raises:
        RunFolderError: if there is none, if it is another command's, or for an option or value that this
            version does not have.
    """
    file = path / "config.json"
    if not file.exists():
        raise RunFolderError(f"run: expected the folder of a {command} run, got {path} without config.json")
    values = _read_json(file)
    wrote = values.pop("command", None) if isinstance(values, dict) else None
    if wrote != command:
        raise RunFolderError(
            f"run: {path} is another command's: command is {wrote!r} there and {command!r} here"
        )
    for (of_command, name, *value), new in RENAMED.items():
        if of_command != command or name not in values:
            continue
        if not value:
            values[new] = values.pop(name)
        elif values[name] == value[0]:
            values[name] = new(values) if callable(new) else new
    unknown = sorted(values.keys() - {field.name for field in fields(config_class)})
    if unknown:
        options = ", ".join(f"{name} ({values[name]!r} there)" for name in unknown)
        raise RunFolderError(
            f"run: {path} has options that this version does not: {options}; {ANOTHER_VERSION}"
        )
    try:
        return config_class(**{"out": path, **from_plain(values, config_class)})
    except ConfigError as error:
        raise RunFolderError(
            f"run: {path} has a value that this version does not take: {error}; {ANOTHER_VERSION}"
        ) from None
