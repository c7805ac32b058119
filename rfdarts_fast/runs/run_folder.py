"""A run's folder: its config, environment, data, metrics, checkpoints and result.

config.json             the options of the run
environment.json        the machine and the versions, one entry for each start
data.json               hashes of the data set and its split
metrics.jsonl           one record for each epoch; alphas.jsonl likewise, of searches
checkpoint.pt           the state to go on from; checkpoint.previous.pt the one before; checkpoint.epoch-N.pt
                        those of the last epochs, if asked for
.lock, .lock.json       the lock of the process that runs, and its name
before-restart-1, ...   what the folder held when a run was begun anew in it
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import torch

from rfdarts_fast.messages import reason
from rfdarts_fast.runs import schema
from rfdarts_fast.runs.checkpoint import (
    ANOTHER_VERSION,
    DamagedError,
    load_checkpoint,
    misfit,
    save_checkpoint,
)
from rfdarts_fast.runs.config import ConfigError, RunConfig, from_plain
from rfdarts_fast.runs.environment import environment
from rfdarts_fast.runs.files import (
    JsonLines,
    WriteError,
    link_or_copy,
    read_bytes,
    temporary,
    write_json,
    writing,
)
from rfdarts_fast.runs.fingerprint import Fingerprint, changes
from rfdarts_fast.runs.lock import HOLDER, LOCK, FolderLock, InUse

# where and how fast a run runs, not what it computes
FREE_FIELDS = frozenset(
    {"out", "config", "preset", "data_root", "download", "workers", "checkpoint_minutes", "tensorboard"}
    | {"restart", "cuda_graph", "table", "diagnose_every", "diagnose_images", "diagnose_cells"}
    | {"keep_checkpoints", "time_limit_minutes", "cache_on", "max_multiply_adds", "auto_width"}
    | {"memory_budget"}
)
# without one of them base_batch_size has no meaning, and folders of earlier versions have none
_SCALINGS = ("learning_rate_scaling", "arch_learning_rate_scaling")


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

KEPT = re.compile(r"checkpoint\.epoch-(\d{1,9})\.pt")
LAST, PREVIOUS, DAMAGED = "checkpoint.pt", "checkpoint.previous.pt", "checkpoint.damaged.pt"
HISTORY = ("metrics.jsonl", "alphas.jsonl")
_RESULTS = ("split.json", "best.pt", "genotype.json", "result.json", "tensorboard")
# config.json goes last: without it the rest would be foreign files
_OWN = (LAST, PREVIOUS, DAMAGED, *HISTORY, *_RESULTS, "environment.json", "data.json", "config.json")
_ASIDE = "before-restart-"


class RunFolderError(ValueError):
    """The folder cannot be used for this run."""


def to_plain(config: RunConfig) -> dict[str, Any]:
    """A config as JSON values."""
    return json.loads(json.dumps(asdict(config), default=str))


def fixed(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a run keeps all its life."""
    scaled = any(values.get(name, "none") != "none" for name in _SCALINGS)
    free = FREE_FIELDS if scaled else FREE_FIELDS | {"base_batch_size"}
    return {name: value for name, value in values.items() if name not in free}


class RunFolder:
    """Opens or resumes a run. Until `begin`, nothing of a run that is there is changed; a context ends it.

    Args:
        path: the folder; made if absent.
        command: "search" or "train".
        config: the run's config. With `config.restart` the folder's run is moved aside first.
        data: the fingerprint of the run's data, compared with the folder's.
        read_only: look at an existing run without a lock and without a change.

    Attributes:
        histories: metrics and, of searches, alphas.
        notes: lines to tell the user at the start.
        last_saved: the last good state in words.

    Raises:
        RunFolderError: if the folder belongs to another command, config or data, is in use, holds foreign
            files or cannot be written.
    """

    def __init__(
        self,
        path: Path,
        command: str,
        config: RunConfig,
        data: Fingerprint | None = None,
        read_only: bool = False,
    ) -> None:
        self.path = path
        self.metrics, self.alphas = (JsonLines(path / name) for name in HISTORY)
        self.histories = [self.metrics, self.alphas] if command == "search" else [self.metrics]
        self.checkpoint = path / LAST
        self.notes: list[str] = []
        self.last_saved: str | None = None
        self._command = command
        self._config = to_plain(config)
        self._data = data
        self._read_only = read_only
        # of the state that `load` gave
        self._epoch = 0
        self._damaged = False
        self._lock: FolderLock | None = None
        if path.exists() and not path.is_dir():
            raise RunFolderError(f"out: expected a folder, got the file {path}")
        try:
            self._refuse_foreign()
            if not read_only:
                path.mkdir(parents=True, exist_ok=True)
                self._lock = FolderLock(path)
                # it may have changed before the lock was had
                self._refuse_foreign()
            self._open(command, config)
        except OSError as error:
            self.close()
            raise RunFolderError(f"out: {path} cannot be used: {reason(error)}") from None
        except (InUse, WriteError) as error:
            self.close()
            raise RunFolderError(str(error)) from None
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets other processes have the folder."""
        if self._lock is not None:
            self._lock.release()

    def _refuse_foreign(self) -> None:
        file = self.path / "config.json"
        if file.exists() or not self.path.exists():
            return
        names = {entry.name for entry in self.path.iterdir() if not entry.name.startswith(_ASIDE)}
        if names - {temporary(file).name, LOCK, f"{LOCK}.soft", HOLDER, temporary(self.path / HOLDER).name}:
            raise RunFolderError(
                f"out: expected a new folder or one of this run, got {self.path} with other files"
            )

    def _open(self, command: str, config: RunConfig) -> None:
        file = self.path / "config.json"
        if config.restart and file.exists() and not self._read_only:
            self._set_aside()
        if file.exists():
            there = to_plain(read_config(self.path, command, type(config)))
            differences = differences_of(there, self._config, "there", "here")
            if self._read_only:
                self._config = there
            elif differences:
                raise RunFolderError(
                    f"out: {self.path} belongs to another run: {differences} (--restart sets that aside)"
                )
            self._starts()
            if self._data is not None:
                refuse_other_data(self.path, self._data)
        else:
            write_json(file, {"command": command, **self._config})

    def _set_aside(self) -> None:
        """Moves the run that is there to a folder of its own; only now is the folder free for another."""
        names = (self.path / f"{_ASIDE}{n}" for n in itertools.count(1))
        aside = next(path for path in names if not path.exists())
        aside.mkdir()
        for path in [*self._kept_checkpoints().values(), *(self.path / name for name in _OWN)]:
            if path.exists():
                path.replace(aside / path.name)
        self.notes.append(f"beginning anew; the run that was here is now in {aside}")

    def _starts(self) -> list[dict[str, Any]]:
        file = self.path / "environment.json"
        starts = read_json(file) if file.exists() else []
        if not isinstance(starts, list) or not all(isinstance(start, dict) for start in starts):
            raise RunFolderError(f"run: {file} is damaged: expected a list of starts")
        return starts

    def load(self, misfit_of: Callable[[dict[str, Any]], str | None]) -> dict[str, Any] | None:
        """The last checkpoint, or the one before if that is damaged; None at the start. Changes nothing.

        Args:
            misfit_of: the first part of a state that does not fit the run, in words; None if all does.

        Raises:
            CheckpointError: for one that does not fit the run, and if all there are are damaged.
            RunFolderError: if the history does not fit it, or is there without any checkpoint.
        """
        try:
            found = read_last(self.path)
        except DamagedError as error:
            raise DamagedError(f"{error}; --restart sets the run aside and begins anew") from None
        if found is None:
            written = [name for name in (*HISTORY, "best.pt") if (self.path / name).exists()]
            if written:
                raise RunFolderError(
                    f"run: {self.path} has {' and '.join(written)} but no {LAST} to go on from; --restart "
                    "sets them aside and begins anew"
                )
            return None
        file, state, damage = found
        check_config(file, state, self._command, self._config)
        wrong = misfit_of(state)
        if wrong:
            raise misfit(file, wrong)
        self._check_history(file, state)
        self._epoch = state["epoch"]
        if file.name == PREVIOUS:
            self._damaged = damage is not None
            what = f"{damage} (kept as {DAMAGED})" if damage else f"run: {self.checkpoint} is missing"
            self.notes.append(f"{what}; going on from {file.name}, {position(state)}")
        self.last_saved = f"{file}, {position(state)}"
        return state

    def _check_history(self, file: Path, state: Mapping[str, Any]) -> None:
        """RunFolderError unless the records are those of the epochs that the checkpoint has finished."""
        epoch, digests = state["epoch"], state.get("history", {})
        if not isinstance(digests, dict):
            raise misfit(file, f"history: expected named parts, got {digests!r}")
        for history in self.histories:
            try:
                lines = history.lines()
            except OSError as error:
                raise RunFolderError(f"run: {history.path} cannot be read: {reason(error)}") from None
            damage = schema.records_misfit(lines)
            if damage:
                raise RunFolderError(f"run: {history.path} is damaged: {damage}")
            if len(lines) < epoch:
                raise RunFolderError(
                    f"run: {history.path} is damaged: it has {len(lines)} records, but {file.name} is from "
                    f"after {epoch} epochs"
                )
            digest = _digest(lines[:epoch])
            if digests.get(history.path.name, digest) != digest:
                raise RunFolderError(
                    f"run: {history.path} was changed: its first {epoch} records are not those that "
                    f"{file.name} was saved with"
                )

    def begin(self) -> None:
        """Takes the folder for the state that `load` gave: only now records behind it are dropped.

        Raises RunFolderError if it cannot be written.
        """
        if self._read_only:
            return
        try:
            if self._damaged:
                self.checkpoint.replace(self.path / DAMAGED)
            for history in self.histories:
                history.keep(self._epoch)
            write_json(self.path / "environment.json", [*self._starts(), environment()])
            if self._data is not None and not (self.path / "data.json").exists():
                write_json(self.path / "data.json", self._data)
        except OSError as error:
            raise RunFolderError(f"out: {self.path} cannot be used: {reason(error)}") from None
        except WriteError as error:
            raise RunFolderError(f"out: {error}") from None

    def save(self, state: dict[str, Any], name: str = LAST) -> None:
        """Writes a checkpoint; `state["epoch"]` counts the finished epochs. Raises WriteError."""
        epoch = state["epoch"]
        digests = {h.path.name: _digest(h.lines()[:epoch]) for h in self.histories if h.path.exists()}
        save_checkpoint(
            self.path / name,
            {**state, "config": fixed(self._config), "history": digests},
            self.path / PREVIOUS if name == LAST else None,
        )
        if name == LAST:
            self.last_saved = f"{self.path / name}, {position(state)}"
            if epoch and not state["step"]:
                self._rotate(epoch)

    def _kept_checkpoints(self) -> dict[int, Path]:
        """The kept checkpoints of epochs, by the number of epochs done."""
        paths = ((KEPT.fullmatch(path.name), path) for path in self.path.iterdir())
        return {int(match[1]): path for match, path in paths if match}

    def _rotate(self, epoch: int) -> None:
        """Keeps the last checkpoint, which is from after `epoch` epochs; drops those that are too old."""
        wanted = self._config.get("keep_checkpoints", 0)
        if not wanted:
            return
        path = self.path / f"checkpoint.epoch-{epoch}.pt"
        with writing(path):
            link_or_copy(self.checkpoint, path)
            for there, old in self._kept_checkpoints().items():
                if there <= epoch - wanted:
                    old.unlink()


def read_last(path: Path) -> tuple[Path, dict[str, Any], DamagedError | None] | None:
    """The last checkpoint of the run in `path`, its state and None; None if there is no checkpoint.

    The one before stands in for one that is damaged, with the damage, or missing. Raises DamagedError if all
    there are are damaged, CheckpointError for one that this version cannot read.
    """
    damage: DamagedError | None = None
    for file in (path / LAST, path / PREVIOUS):
        if file.exists():
            try:
                return file, load_checkpoint(file), damage
            except DamagedError as error:
                damage = damage or error
    if damage:
        raise damage
    return None


def position(state: Mapping[str, Any]) -> str:
    """Where a checkpoint is, in words."""
    return f"epoch {state['epoch']}, step {state['step']}"


def check_config(file: Path, state: Mapping[str, Any], command: str, config: dict[str, Any]) -> None:
    """CheckpointError if the checkpoint `file` was saved with other options than those of config.json."""
    saved = state.get("config", {})
    if not isinstance(saved, dict):
        raise misfit(file, f"config: expected named options, got {saved!r}")
    differences = differences_of(renamed(saved, command), config, "in the checkpoint", "in config.json")
    if differences:
        raise misfit(file, differences)


def refuse_other_data(path: Path, data: Fingerprint) -> None:
    """RunFolderError if the run in `path` began with other data; one of an earlier version does not tell."""
    file = path / "data.json"
    if not file.exists():
        return
    there = read_json(file)
    if not isinstance(there, dict) or not all(isinstance(facts, dict) for facts in there.values()):
        raise RunFolderError(f"run: {file} is damaged: expected the facts of each part of the data")
    differences = changes({name: facts for name, facts in there.items() if name in data}, data)
    if differences:
        raise RunFolderError(
            f"data: expected those that {path} began with, but {', '.join(differences)} (without {file} any "
            "data are taken)"
        )


def differences_of(there: Mapping[str, Any], here: Mapping[str, Any], at: str, or_at: str) -> str:
    """The options whose values differ, in words."""
    return "; ".join(
        f"{name} is {there[name]!r} {at} and {here[name]!r} {or_at}"
        for name in sorted(fixed(here))
        if name in there and there[name] != here[name]
    )


def _digest(lines: list[bytes]) -> str:
    return hashlib.sha256(b"".join(lines)).hexdigest()


def read_json(file: Path) -> Any:
    """A file's JSON; RunFolderError if it cannot be read."""
    try:
        return json.loads(read_bytes(file))
    except OSError as error:
        raise RunFolderError(f"run: {file} cannot be read: {reason(error)}") from None
    except (ValueError, RecursionError) as error:
        raise RunFolderError(f"run: {file} is damaged: {' '.join(str(error).split())}") from None


def renamed(values: Mapping[str, Any], command: str) -> dict[str, Any]:
    """Options that an earlier version wrote, with this version's names; see `RENAMED`."""
    values = dict(values)
    for (of_command, name, *value), new in RENAMED.items():
        if of_command != command or name not in values:
            continue
        if not value:
            values[str(new)] = values.pop(name)
        elif values[name] == value[0]:
            values[name] = new(values) if callable(new) else new
    return values


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
    values = read_json(file)
    wrote = values.pop("command", None) if isinstance(values, dict) else None
    if wrote != command:
        raise RunFolderError(
            f"run: {path} is another command's: command is {wrote!r} there and {command!r} here"
        )
    values = renamed(values, command)
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
