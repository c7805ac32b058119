"""The options that search and training share, and the reading and checking of options."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
import yaml

from rfdarts_fast.data import DATASETS

MemoryFormat = Literal["channels_last", "contiguous"]


def one_of(names: Iterable[str] | Callable[[], Iterable[str]]) -> Any:
    """The annotation of an option whose values are the names in a registry, read at each use."""

    def literal() -> Any:
        return Literal[tuple(names() if callable(names) else names)]

    return tyro.conf.arg(
        constructor_factory=literal,
        # tyro takes the words of a custom constructor for a list
        help_behavior_hint=lambda default: "(default: {})".format(default.strip("[]'")),
    )


class ConfigError(ValueError):
    """A config value that cannot be used; the message names it, what was expected and what came."""


@dataclass(frozen=True)
class RunConfig:
    """Fields of every run."""

    out: Path
    """The run's folder. The same command again resumes what was begun there."""
    restart: bool = False
    """Begin anew in a folder that holds a run; that is moved to before-restart-1 in it, not deleted."""
    config: Path | None = None
    """A YAML file of values for the options below; the command line wins over it."""
    dataset: Annotated[str, one_of(DATASETS)] = "digits"
    """Images: digits come with scikit-learn; npz is a file of x_train, y_train, x_test, y_test."""
    data_root: Path | None = None
    """The data set's npz file or folder."""
    download: bool = False
    """Let torchvision download the data set to data_root."""
    image_size: int | None = None
    """Side of the images in pixels (default: the data set's own)."""
    flip: bool | None = None
    """Mirror training images at random (default: what is registered for the data set; all but digits)."""
    workers: int = 0
    """Processes that decode images (imagefolder only)."""
    seed: int = 2
    """Seeds the initial values, the order of the images and their augmentation."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU where there is one."""
    threads: int | None = None
    """CPU threads (default: PyTorch's choice)."""
    memory_format: MemoryFormat = "channels_last"
    """Layout of activations in memory."""
    checkpoint_minutes: float = 10.0
    """Save inside an epoch too, this often; each epoch's end, SIGTERM and Ctrl-C always save."""
    tensorboard: bool = False
    """Also write TensorBoard event files (needs the extra `log`)."""

    def check(self) -> None:
        """Raises ConfigError for the first value that cannot be used."""
        require(self.image_size is None or self.image_size > 0, self, "image_size", "a positive number")
        require(self.workers >= 0, self, "workers", "0 or more")
        require(0 <= self.seed < 2**32, self, "seed", "a number from 0 to 2**32 - 1")
        require(self.threads is None or self.threads > 0, self, "threads", "a positive number")
        require(self.checkpoint_minutes > 0, self, "checkpoint_minutes", "a positive number")
        require(
            not self.tensorboard or importlib.util.find_spec("tensorboard") is not None, self, "tensorboard",
            "tensorboard to be installed (pip install 'rfdarts_fast[log]')",
        )  # fmt: skip


def require(condition: bool, config: Any, field: str, expected: str) -> None:
    """ConfigError that names the option unless the condition holds."""
    if not condition:
        raise ConfigError(f"{field}: expected {expected}, got {getattr(config, field)!r}")


def require_positive(config: Any, *fields: str) -> None:
    for field in fields:
        require(0 < getattr(config, field) < math.inf, config, field, "a positive number")


def require_not_negative(config: Any, *fields: str) -> None:
    for field in fields:
        require(0 <= getattr(config, field) < math.inf, config, field, "0 or more")


def check_choices(config: Any) -> None:
    """ConfigError for a value that is none of its field's choices; the command line checks this itself."""
    hints = _type_hints(type(config))
    for field in dataclasses.fields(config):
        if typing.get_origin(hints[field.name]) is Literal:
            choices = typing.get_args(hints[field.name])
            require(
                getattr(config, field.name) in choices, config, field.name, f"one of {', '.join(choices)}"
            )


def read_yaml(path: Path, config_class: type) -> dict[str, Any]:
    """Values for fields of `config_class` from a YAML file; ConfigError for an unknown name or a bad file."""
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except FileNotFoundError:
        raise ConfigError(f"config: there is no file {path}") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"config: {path} cannot be read as YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"config: expected names and values in {path}, got {type(values).__name__}")
    values = {str(name).replace("-", "_"): value for name, value in values.items()}
    unknown = values.keys() - {field.name for field in dataclasses.fields(config_class)}
    if unknown:
        raise ConfigError(f"config: {path} has no such options: {', '.join(sorted(unknown))}")
    return from_plain(values, config_class)


def from_plain(values: dict[str, Any], config_class: type) -> dict[str, Any]:
    """Values as JSON or YAML hold them, brought to the types of the fields; ConfigError for another type."""
    hints = _type_hints(config_class)
    return {name: _to_type(name, value, hints[name]) for name, value in values.items()}


def _type_hints(config_class: type) -> dict[str, Any]:
    """The types of the fields, the names of `one_of` as a Literal."""
    hints = typing.get_type_hints(config_class, include_extras=True)
    return {
        name: hint.__metadata__[0].constructor_factory() if typing.get_origin(hint) is Annotated else hint
        for name, hint in hints.items()
    }


def _to_type(name: str, value: Any, hint: Any) -> Any:
    options = [hint] if typing.get_origin(hint) in (Literal, None) else list(typing.get_args(hint))
    if value is None and type(None) in options:
        return None
    for option in options:
        if typing.get_origin(option) is Literal and value in typing.get_args(option):
            return value
        if option is Path and isinstance(value, str):
            return Path(value)
        if option is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if option is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if option in (bool, str) and isinstance(value, option):
            return value
    # YAML reads 3e-4 as text
    if float in options and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
    expected = " or ".join(
        ", ".join(map(str, typing.get_args(o)))
        if typing.get_origin(o) is Literal
        else getattr(o, "__name__", str(o))
        for o in options
    )
    raise ConfigError(f"{name}: expected {expected}, got {value!r}")
