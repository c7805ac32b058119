"""The metrics, architecture parameters and result of a run's folder."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rfdarts_fast.messages import reason
from rfdarts_fast.runs.config import require_package
from rfdarts_fast.runs.files import JsonLines
from rfdarts_fast.runs.progress import numbers
from rfdarts_fast.runs.run_folder import RunFolderError, read_json
from rfdarts_fast.spaces import AnyGenotype, GenotypeError, Space, get_space, parse

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class RunResults:
    """A run's folder as it was when it was read; the run may still go on.

    Attributes:
        path: the folder.
        command: "search" or "train".
        config: the options, as in config.json.
        records: one of each finished epoch, as in metrics.jsonl.
        alphas: of a search, name -> architecture parameters after each epoch: alphas [epochs, edges,
            primitives], betas [epochs, edges].
        genotype: the result, or that of the last epoch so far; None before it.
        result: result.json of a finished training, or None.
        starts: environment.json, the machine and versions of each start.
    """

    path: Path
    command: str
    config: dict[str, Any]
    records: list[dict[str, Any]]
    alphas: dict[str, np.ndarray]
    genotype: AnyGenotype | None
    result: dict[str, Any] | None
    starts: list[dict[str, Any]]

    @property
    def epochs(self) -> int:
        """Epochs that the run is to have in the end."""
        return int(self.config.get("epochs", len(self.records)))

    @property
    def finished(self) -> bool:
        name = "genotype.json" if self.command == "search" else "result.json"
        return len(self.records) >= self.epochs and (self.path / name).is_file()

    @cached_property
    def metrics(self) -> dict[str, np.ndarray]:
        """Name -> value at each epoch, NaN where a record lacks it; nested names are "train/loss"."""
        flat = [dict(numbers(record)) for record in self.records]
        names = dict.fromkeys(name for record in flat for name in record)
        return {name: np.array([record.get(name, np.nan) for record in flat]) for name in names}

    @property
    def space(self) -> Space:
        """The space of a search; RunFolderError if it is not registered here."""
        try:
            return get_space(str(self.config.get("space")))
        except ValueError as error:
            raise RunFolderError(f"run: {self.path}: {error}") from None

    def op_weights(self, cell: str) -> np.ndarray:
        """The softmax of the alphas of a cell type, [epochs, edges, primitives]."""
        alphas = self.alphas["alphas" if len(self.space.cells) == 1 else f"alphas_{cell}"]
        powers = np.exp(alphas - alphas.max(axis=-1, keepdims=True))
        return powers / powers.sum(axis=-1, keepdims=True)

    def frame(self) -> pandas.DataFrame:
        """The metrics as a table of one row an epoch; needs the extra `report`."""
        return _pandas().DataFrame(self.metrics).set_index("epoch")

    def alpha_frame(self) -> pandas.DataFrame:
        """A row for each epoch, cell, edge and primitive: alpha, and its softmax as weight; as `frame`."""
        rows = []
        for cell, edges in self.space.cells.items():
            weights = self.op_weights(cell)
            alphas = self.alphas["alphas" if len(self.space.cells) == 1 else f"alphas_{cell}"]
            rows += [
                (epoch, cell, edge, name, alphas[epoch, edge, k], weights[epoch, edge, k])
                for epoch in range(len(alphas))
                for edge, names in enumerate(edges)
                for k, name in enumerate(names)
            ]
        columns = ["epoch", "cell", "edge", "primitive", "alpha", "weight"]
        return _pandas().DataFrame(rows, columns=columns)


def _pandas() -> Any:
    return require_package("pandas", "pandas", "report")


def load(run: str | os.PathLike[str]) -> RunResults:
    """The results of a run's folder, also of one that is still running.

    A last line that is half written is left out. Raises RunFolderError for what is no run's folder.
    """
    path = Path(run)
    file = path / "config.json"
    config = read_json(file) if file.exists() else {}
    command = config.pop("command", None) if isinstance(config, dict) else None
    if command not in ("search", "train"):
        raise RunFolderError(f"run: expected the folder of a search or train run, got {path}")
    records = _records(path / "metrics.jsonl")
    alphas = _records(path / "alphas.jsonl")
    # between the two files an epoch may have one record only
    count = min(len(records), len(alphas)) if command == "search" else len(records)
    result, starts = path / "result.json", path / "environment.json"
    return RunResults(
        path=path,
        command=command,
        config=config,
        records=records[:count],
        alphas={
            name: np.array([record[name] for record in alphas[:count]])
            for name in (alphas[0] if alphas and count else {})
            if name != "epoch"
        },
        genotype=_genotype(path / "genotype.json", records[:count]),
        result=read_json(result) if result.is_file() else None,
        starts=read_json(starts) if starts.is_file() else [],
    )


def _records(file: Path) -> list[dict[str, Any]]:
    try:
        records = JsonLines(file).read()
    except (OSError, ValueError, RecursionError) as error:
        raise RunFolderError(f"run: {file} is damaged: {reason(error)}") from None
    if not all(isinstance(record, dict) for record in records):
        raise RunFolderError(f"run: {file} is damaged: expected an object in each line")
    return records


def _genotype(file: Path, records: list[dict[str, Any]]) -> AnyGenotype | None:
    try:
        if file.is_file():
            return parse(file.read_text())
        last = records[-1].get("genotype") if records else None
        return parse(last) if isinstance(last, str) else None
    except (OSError, UnicodeDecodeError, GenotypeError) as error:
        raise RunFolderError(f"run: {file} is damaged: {reason(error)}") from None
