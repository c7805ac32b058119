"""Verification of a run's folder: every file of it, and the position from which the run would go on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from rfdarts_fast.data import DataError
from rfdarts_fast.runs.checkpoint import CheckpointError, load_checkpoint
from rfdarts_fast.runs.config import ConfigError, RunConfig
from rfdarts_fast.runs.lock import HOLDER, describe
from rfdarts_fast.runs.run import Run
from rfdarts_fast.runs.run_folder import (
    KEPT,
    LAST,
    PREVIOUS,
    RunFolderError,
    check_config,
    position,
    read_config,
    read_json,
    to_plain,
)

# a run's config class, and its `opened`
Command = tuple[type[RunConfig], Callable[..., AbstractContextManager[Run]]]
# where a run ran, and what it looked at besides; the folder is verified here
_HERE = {
    "table": None,
    "device": "cpu",
    "backend": "auto",
    "cuda_graph": "auto",
    "download": False,
    "restart": False,
}


class Report:
    """The findings, a line each: `rows` of (file, text); `sound` if none is a damage."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str]] = []
        self.sound = True

    def add(self, name: str, text: str) -> None:
        self.rows.append((name, text))

    def damage(self, name: str, error: Exception | str) -> None:
        self.sound = False
        self.add(name, f"DAMAGED  {error}")

    def __str__(self) -> str:
        return "\n".join(f"{name:23} {text}" for name, text in self.rows)


def check_folder(path: Path, commands: Mapping[str, Command], data_root: Path | None = None) -> Report:
    """The report on a run's folder, which stays as it is.

    Args:
        path: the folder.
        commands: by name, as in config.json.
        data_root: the place of the data, if it has moved.

    Raises:
        RunFolderError: if it is no run's folder, or config.json cannot be read.
    """
    report = Report()
    file = path / "config.json"
    values = read_json(file) if file.exists() else {}
    command = values.get("command") if isinstance(values, dict) else None
    if not isinstance(command, str) or command not in commands:
        raise RunFolderError(f"run: expected a folder of {' or '.join(commands)}, got {path}")
    config_class, opened = commands[command]
    stored = read_config(path, command, config_class)
    report.add("config.json", f"ok       {command}, seed {stored.seed}")
    if (path / HOLDER).exists():
        report.add(".lock", f"in use   by {describe(path)}, if that still runs")
    states = _checkpoints(report, path, command, to_plain(stored))
    names = {field.name for field in dataclasses.fields(config_class)}
    changes: dict[str, Any] = {name: value for name, value in _HERE.items() if name in names}
    config = dataclasses.replace(
        stored, **{**changes, "out": path, "data_root": data_root or stored.data_root}
    )
    try:
        with opened(config, read_only=True) as run:
            _compare(report, states, run)
            _resumable(report, run)
    except DataError as error:
        report.damage("data", error)
    except (ConfigError, RunFolderError, CheckpointError) as error:
        report.damage("resume", error)
    return report


def _checkpoints(report: Report, path: Path, command: str, config: dict[str, Any]) -> dict[str, Any]:
    """The states of the folder's checkpoints that can be read, by file name."""
    states = {}
    kept = sorted(file.name for file in path.iterdir() if KEPT.fullmatch(file.name))
    for name in (LAST, PREVIOUS, "best.pt", *kept):
        file = path / name
        if not file.exists():
            continue
        try:
            state = load_checkpoint(file)
            check_config(file, state, command, config)
        except CheckpointError as error:
            report.damage(name, error)
        else:
            states[name] = state
    return states


def _compare(report: Report, states: Mapping[str, Any], run: Run) -> None:
    """Adds whether the checkpoints fit the run."""
    for name, state in states.items():
        wrong = run.misfit(state)
        if wrong:
            report.damage(name, wrong)
        else:
            checked = "" if "version" in state else ", of 0.1.0, without a checksum"
            report.add(name, f"ok       {position(state)} of {len(run.batches)}{checked}")


def _resumable(report: Report, run: Run) -> None:
    """Adds the histories, the data and the position of a run that could be opened, so that they are sound."""
    folder = run.folder
    for history in folder.histories:
        report.add(history.path.name, f"ok       {len(history.lines())} epochs")
    noted = (folder.path / "data.json").exists()
    report.add("data.json", "ok       the data are those of the run" if noted else "none yet")
    for note in folder.notes:
        report.damage("note", note)
    if folder.last_saved is None:
        report.add("resume", "from the start: nothing is saved yet")
    elif run.epoch < run.epochs:
        report.add("resume", f"from {folder.last_saved} of {len(run.batches)}, {run.epochs} epochs in all")
    else:
        missing = [name for name in run.results if not (folder.path / name).exists()]
        for name in missing:
            report.damage(name, "is missing; the same command writes it")
        if not missing:
            report.add("resume", f"nothing is left to do: {run.epochs} epochs are done")
