"""The outcome of a study: groups with error bars, paired comparisons over seeds, and each run."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rfdarts_fast.results import RunResults, load
from rfdarts_fast.runs.files import write_json
from rfdarts_fast.runs.run_folder import RunFolderError, read_json
from rfdarts_fast.spaces import CellGenotype
from rfdarts_fast.study.spec import TRAINED, PlannedRun, Study
from rfdarts_fast.tables import Table

STUDY_FILE = "study.json"
CONFIDENCE = 0.95


@dataclass(frozen=True)
class RunRow:
    """A run of the study in one line; None for what is not known (yet).

    Attributes:
        test: test accuracy of the trained genotype in the last epoch, percent.
        val: validation accuracy of the supernet in the last epoch, percent.
        table, rank: test accuracy (percent) and rank in the table, on `table_dataset`.
    """

    group: str
    seed: int
    folder: str
    epochs: int = 0
    finished: bool = False
    test: float | None = None
    val: float | None = None
    table: float | None = None
    rank: int | None = None
    table_dataset: str | None = None
    skips: int | None = None
    parameter_free: int | None = None
    genotype_rule: str | None = None
    genotype: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class GroupRow:
    """A measure over the finished runs of a group; the deviation is that of a sample."""

    group: str
    measure: str
    runs: int
    mean: float
    deviation: float | None
    best: float
    median_rank: float | None


@dataclass(frozen=True)
class Pair:
    """The mean difference, second minus first, over the seeds that both have, with a confidence interval."""

    first: str
    second: str
    measure: str
    seeds: int
    difference: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class StudyResults:
    """A study's runs, also of one that is still going on."""

    name: str
    path: Path
    rows: list[RunRow]
    runs: dict[str, RunResults]

    def measures(self) -> list[str]:
        """The fields of `RunRow` that finished runs have, the most telling first."""
        names = ("test", "table", "val", "skips", "parameter_free")
        finished = [row for row in self.rows if row.finished]
        return [name for name in names if any(getattr(row, name) is not None for row in finished)]

    def by_group(self, measure: str) -> dict[str, dict[int, float]]:
        """Group -> seed -> value, of finished runs."""
        values: dict[str, dict[int, float]] = {}
        for row in self.rows:
            value = getattr(row, measure)
            group = values.setdefault(row.group, {})
            if row.finished and value is not None:
                group[row.seed] = float(value)
        return values

    def groups(self) -> list[GroupRow]:
        rows = []
        ranks = self.by_group("rank")
        for measure in self.measures():
            for group, by_seed in self.by_group(measure).items():
                values = np.array(list(by_seed.values()))
                if not len(values):
                    continue
                fewer_is_better = measure in ("skips", "parameter_free")
                deviation = float(values.std(ddof=1)) if len(values) > 1 else None
                best = float(values.min() if fewer_is_better else values.max())
                ranked = measure == "table" and ranks.get(group)
                median = float(np.median(list(ranks[group].values()))) if ranked else None
                rows.append(
                    GroupRow(group, measure, len(values), float(values.mean()), deviation, best, median)
                )
        return rows

    def pairs(self) -> list[Pair]:
        """Every pair of groups that search one space on the same data, by each measure."""
        searched = {
            row.group: tuple(self.runs[row.folder].config.get(name) for name in ("space", "dataset"))
            for row in self.rows
            if row.folder in self.runs
        }
        return [
            compared(measure, first, second, values[first], values[second])
            for measure in self.measures()
            for values in [self.by_group(measure)]
            for first, second in itertools.combinations(values, 2)
            if searched.get(first) == searched.get(second) and values[first].keys() & values[second].keys()
        ]

    def to_json(self) -> str:
        parts: dict[str, Sequence[Any]] = {"runs": self.rows, "groups": self.groups(), "pairs": self.pairs()}
        plain = {name: [asdict(row) for row in rows] for name, rows in parts.items()}
        return json.dumps({"study": self.name, "confidence": CONFIDENCE, **plain}, indent=2) + "\n"

    def to_csv(self) -> str:
        """A line for each run."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(RunRow.__dataclass_fields__), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in self.rows)
        return text.getvalue()


def compared(measure: str, first: str, second: str, a: Mapping[int, float], b: Mapping[int, float]) -> Pair:
    """The paired comparison of two groups; with one seed, or equal differences, there is no interval."""
    from scipy.stats import ttest_rel

    seeds = sorted(a.keys() & b.keys())
    before, after = (np.array([values[seed] for seed in seeds]) for values in (a, b))
    difference = after - before
    low = high = None
    if len(seeds) > 1 and np.ptp(difference) > 0:
        low, high = map(float, ttest_rel(after, before).confidence_interval(CONFIDENCE))
    return Pair(first, second, measure, len(seeds), float(difference.mean()), low, high)


def write_study(folder: Path, study: Study) -> None:
    """Notes the runs of a study in its folder, which is made if absent."""
    folder.mkdir(parents=True, exist_ok=True)
    runs = [{**asdict(run), "folder": run.folder} for run in study.runs]
    write_json(folder / STUDY_FILE, {"study": study.name, "runs": runs})


def load_study(folder: Path, table: Table | None = None, errors: Mapping[str, str] = {}) -> StudyResults:
    """The results of a study's folder so far.

    Args:
        table: looks the cells up here; without it what the runs themselves noted is taken.
        errors: the last error of runs that failed, by folder.

    Raises:
        RunFolderError: for what is no study's folder, or a run that cannot be read.
    """
    file = folder / STUDY_FILE
    content = read_json(file) if file.is_file() else None
    try:
        assert isinstance(content, dict)
        planned = [(str(run["group"]), int(run["seed"]), str(run["folder"])) for run in content["runs"]]
        name = str(content["study"])
    except (AssertionError, KeyError, TypeError, ValueError):
        raise RunFolderError(f"study: expected the folder of a study, got {folder}") from None
    rows, runs = [], {}
    for group, seed, place in planned:
        row = RunRow(group, seed, place, error=errors.get(place))
        if (folder / place / "config.json").exists():
            runs[place] = load(folder / place)
            row = _row(row, runs[place], table)
        trained = folder / f"{place}{TRAINED}"
        if (trained / "config.json").exists():
            result = load(trained).result
            row = replace(row, test=None if result is None else result["test_accuracy"])
        rows.append(row)
    return StudyResults(name, folder, rows, runs)


def _row(row: RunRow, run: RunResults, table: Table | None) -> RunRow:
    last: dict[str, Any] = run.records[-1] if run.records else {}
    entry = last.get("table") or {}
    if table is not None and isinstance(run.genotype, CellGenotype) and str(run.genotype) in table.cells:
        entry = table.entry(run.genotype)
    own = run.config.get("dataset")
    dataset = own if own in entry else next(iter(entry), None)
    return RunRow(
        row.group, row.seed, row.folder, len(run.records), run.finished,
        val=(last.get("val") or {}).get("accuracy"),
        table=entry[dataset]["test"] if dataset else None,
        rank=entry[dataset]["rank"] if dataset else None,
        table_dataset=dataset,
        skips=last.get("skip_connects"),
        parameter_free=last.get("parameter_free_ops"),
        genotype_rule=last.get("genotype_rule"),
        genotype=str(run.genotype) if run.genotype else None,
        error=row.error,
    )  # fmt: skip


def planned_runs(rows: Sequence[PlannedRun]) -> str:
    """The runs as commands, for a look before they start."""
    lines = []
    for run in rows:
        lines.append(f"{run.folder}: rfdarts search {' '.join(run.args)}")
        if run.train_args is not None:
            lines.append(f"{run.folder}{TRAINED}: rfdarts train {' '.join(run.train_args)}")
    return "\n".join(lines)
