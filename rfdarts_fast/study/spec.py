"""The runs of a study: a YAML file of search options, some of which have several values.

    space: nasbench201
    seed: [1, 2, 3, 4]
    variants:
      darts: {method: darts}
      rf-darts: {method: rf-darts, learning-rate: [0.025, 0.3]}
    train: {preset: nasbench201, epochs: 12}

Every combination of the values is a run. Runs that differ in nothing but the seed make a group. With `train`,
options of `rfdarts train`, the genotype of each run is trained on the same data.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from rfdarts_fast.messages import shown
from rfdarts_fast.retrain.config import TrainConfig
from rfdarts_fast.retrain.config import preset_values as train_values
from rfdarts_fast.runs.config import ConfigError, RunConfig
from rfdarts_fast.runs.options import option_entry, parse_config, place, yaml_events
from rfdarts_fast.search import SearchConfig
from rfdarts_fast.search.config import preset_values

_FOLDER = files("rfdarts_fast.study").joinpath("named")
NAMED = tuple(sorted(path.name.removesuffix(".yaml") for path in _FOLDER.iterdir()))
"""Names of the studies that come with the package."""

# what the study itself decides
_OWN = ("out", "restart", "config")
TRAINED = "-trained"
"""End of the name of the folder in which a run's genotype is trained."""
_MOST_RUNS = 10_000
# option -> its values
Axes = dict[str, list[Any]]


@dataclass(frozen=True)
class PlannedRun:
    """A search of a study.

    Attributes:
        group: the variant, and the values of other options that have several.
        seed: the run's.
        args: its options as of `rfdarts search`, all but --out.
        train_args: options of `rfdarts train` for its genotype; None if that is not trained.
    """

    group: str
    seed: int
    args: tuple[str, ...]
    train_args: tuple[str, ...] | None = None

    @property
    def folder(self) -> str:
        """The run's folder below the study's."""
        return f"{re.sub(r'[^A-Za-z0-9_.=,-]', '_', self.group)}/seed-{self.seed}"

    def config(self, study_folder: Path) -> SearchConfig:
        """The run's checked options; ConfigError for one that cannot be used."""
        args = [*self.args, "--out", str(study_folder / self.folder)]
        return parse_config(SearchConfig, preset_values, args, "rfdarts search")

    def train_config(self, study_folder: Path) -> TrainConfig | None:
        """The checked options of the training; what is not given of data and machine is the search's."""
        if self.train_args is None:
            return None
        config = self.config(study_folder)
        out = config.out.with_name(f"{config.out.name}{TRAINED}")
        genotype = config.out / "genotype.json"
        args = [*self.train_args, "--genotype", str(genotype), "--out", str(out)]
        trained = parse_config(TrainConfig, train_values, args, "rfdarts train")
        given = {arg.removeprefix("--").removeprefix("no-").replace("-", "_") for arg in self.train_args}
        same = {field.name for field in fields(RunConfig)} - {*_OWN, *given}
        return replace(trained, **{name: getattr(config, name) for name in same})


@dataclass(frozen=True)
class Study:
    """The runs of a study under its name."""

    name: str
    runs: tuple[PlannedRun, ...]


def read_study(text: str, extra: Sequence[str] = ()) -> Study:
    """The study in a YAML file, or of a name in `NAMED`.

    Args:
        text: the file's path or the name.
        extra: options of `rfdarts search` for every run, which win over the file.

    Raises:
        ConfigError: that names the file and line; also for options that do not go with each other.
    """
    path = Path(str(_FOLDER.joinpath(f"{text}.yaml"))) if text in NAMED else Path(text)
    if not path.exists():
        raise ConfigError(f"study: expected a YAML file or one of {', '.join(NAMED)}, got {shown(text)}")
    common, variants, train = _read(path)
    train_args = None if train is None else tuple(_typed_all({k: v[0] for k, v in train.items()}))
    runs = []
    for variant, own in (variants or {"": {}}).items():
        axes = {**common, **own}
        listed = [name for name, values in axes.items() if len(values) > 1 and name != "seed"]
        for values in itertools.product(*axes.values()):
            chosen = dict(zip(axes, values, strict=True))
            seed = chosen.pop("seed", SearchConfig.seed)
            words = [variant] if variant else []
            words += [f"{name.replace('_', '-')}={chosen[name]}" for name in listed]
            args = (*_typed_all(chosen), *extra, "--seed", str(seed))
            runs.append(PlannedRun(",".join(words) or "search", seed, args, train_args))
            if len(runs) > _MOST_RUNS:
                raise ConfigError(f"study: {path}: expected at most {_MOST_RUNS:,} runs, got more")
    twice, count = Counter(run.folder for run in runs).most_common(1)[0]
    if count > 1:
        raise ConfigError(f"study: {path}: expected different runs, got two that are called {twice}")
    return Study(path.stem, tuple(runs))


def _typed_all(values: dict[str, Any]) -> list[str]:
    """Values as options on a command line."""
    words = []
    for name, value in values.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [f"--{option}", str(value)]
    return words


def _read(path: Path) -> tuple[Axes, dict[str, Axes], Axes | None]:
    """The options of all runs, those of each variant, and those of the training if there is one."""
    events = yaml_events(path, "study")
    for event in events:
        if isinstance(event, yaml.MappingStartEvent):
            break
        if isinstance(event, (yaml.ScalarEvent, yaml.SequenceStartEvent)):
            raise ConfigError(f"study: {place(path, event)}: expected names and values")
    else:
        raise ConfigError(f"study: {path}: expected names and values, got nothing")
    common: Axes = {}
    variants: dict[str, Axes] = {}
    train: Axes | None = None
    for name, event in _names(events, path):
        if name.value == "train":
            where = f"study: {place(path, name)}: train"
            if train is not None or not isinstance(event, yaml.MappingStartEvent):
                raise ConfigError(f"{where}: expected options once, such as {{epochs: 3}}")
            train = {}
            for option, value in _names(events, path):
                _add(train, option, value, events, path, TrainConfig)
                if len(train[option.value.replace("-", "_")]) > 1:
                    raise ConfigError(f"{where}: {option.value}: expected one value, got a list")
        elif name.value != "variants":
            _add(common, name, event, events, path)
        elif isinstance(event, yaml.MappingStartEvent):
            _add_variants(variants, events, path)
        else:
            raise ConfigError(f"study: {place(path, event)}: variants: expected names with options each")
    # what is behind the mapping is refused by the reader
    for _ in events:
        pass
    return common, variants, train


def _add_variants(variants: dict[str, Axes], events: Iterator[yaml.Event], path: Path) -> None:
    """Adds the variants of a mapping that has begun."""
    for variant, start in _names(events, path):
        where = f"study: {place(path, variant)}"
        if variant.value in variants or not variant.value:
            raise ConfigError(f"{where}: expected another name, got {shown(variant.value)}")
        if not isinstance(start, yaml.MappingStartEvent):
            raise ConfigError(f"{where}: {shown(variant.value)}: expected options, such as {{epochs: 3}}")
        variants[variant.value] = {}
        for option, value in _names(events, path):
            _add(variants[variant.value], option, value, events, path)


def _names(events: Iterator[yaml.Event], path: Path) -> Iterator[tuple[yaml.ScalarEvent, yaml.Event]]:
    """Each name of a mapping and the first event of its value, up to the mapping's end."""
    for name in events:
        if isinstance(name, yaml.MappingEndEvent):
            return
        if not isinstance(name, yaml.ScalarEvent):
            raise ConfigError(f"study: {place(path, name)}: expected a name")
        yield name, next(events)


def _add(
    axes: Axes,
    name: yaml.ScalarEvent,
    event: yaml.Event,
    events: Iterator[yaml.Event],
    path: Path,
    config_class: type[RunConfig] = SearchConfig,
) -> None:
    """Adds an option, whose value begins with `event`: a plain value or a list of them."""
    where = f"study: {place(path, name)}"
    scalars: Iterable[yaml.Event] = [event]
    if isinstance(event, yaml.SequenceStartEvent):
        scalars = itertools.takewhile(lambda e: not isinstance(e, yaml.SequenceEndEvent), events)
    values: list[Any] = []
    for scalar in scalars:
        if not isinstance(scalar, yaml.ScalarEvent):
            raise ConfigError(f"{where}: {name.value}: expected a plain value or a list of them")
        field, entry = option_entry(name.value, scalar, config_class, where)
        own = (*_OWN, *(() if config_class is SearchConfig else ("genotype",)))
        if field in own or field in axes:
            expected = "no such option in a study" if field in own else "it once"
            raise ConfigError(f"{where}: {name.value}: expected {expected}, got {shown(scalar.value)}")
        if entry.value in values:
            raise ConfigError(f"{where}: {name.value}: expected each value once, got {shown(scalar.value)}")
        values.append(entry.value)
    if not values:
        raise ConfigError(f"{where}: {name.value}: expected at least one value, got none")
    axes[field] = values
