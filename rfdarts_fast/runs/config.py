"""The options that search and training share, and the reading and checking of options."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from rfdarts_fast.data import DATASETS
from rfdarts_fast.messages import one_line, shown

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
    """A config value that cannot be used: one line that names it, what was expected and what came."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


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
    """Images: digits come with scikit-learn; npz is a file of x_train, y_train, x_test, y_test; cache a store
    of decoded photos that `rfdarts cache` made."""
    data_root: Path | None = None
    """The data set's npz file or folder."""
    corrupt: Literal["fatal", "skip"] = "fatal"
    """imagefolder: an image that cannot be read ends the run, or is left out, named and counted."""
    cache_on: Literal["auto", "host", "device"] = "auto"
    """cache: batches are taken from the store's file, or from a copy on the device; auto takes that for a GPU
    half of whose free memory holds it."""
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
    keep_checkpoints: int = 0
    """Keep the checkpoints of so many last epochs too, as checkpoint.epoch-N.pt; one of them, copied over
    checkpoint.pt, is where the same command goes on from."""
    sync_batch_norm: bool = False
    """Under torchrun: BatchNorm normalises by the whole batch, not by each process's part of it. A search
    then runs in plain PyTorch (--backend reference): the compiled cells cannot exchange statistics."""
    grad_accum_steps: int = 1
    """Gradient accumulation: each process computes its part of a batch in so many micro-batches, one after
    the other, in the memory of one. --batch-size stays that of the whole step, so that learning rate, steps
    and order of the data do not depend on it; BatchNorm normalises each micro-batch by itself."""
    time_limit_minutes: float | None = None
    """Save and leave with exit code 75 after so many minutes of steps; the same command goes on."""
    tensorboard: bool = False
    """Also write TensorBoard event files (needs the extra `log`)."""

    def check(self) -> None:
        """Raises ConfigError for the first value that cannot be used."""
        if self.image_size is not None:
            require_positive(self, "image_size", most=MOST_SIDE)
        require_not_negative(self, "workers", most=1024)
        require_not_negative(self, "keep_checkpoints", most=10**6)
        require_positive(self, "grad_accum_steps", most=10**6)
        # of all configs: the command line and YAML files check choices themselves
        check_choices(self)
        cached = self.dataset == "cache"
        require(cached or self.cache_on == "auto", self, "cache_on", f"auto with the data set {self.dataset}")
        require(0 <= self.seed < 2**32, self, "seed", "a number from 0 to 2**32 - 1")
        if self.threads is not None:
            require_positive(self, "threads", most=4096)
        require_positive(self, "checkpoint_minutes")
        if self.time_limit_minutes is not None:
            require_positive(self, "time_limit_minutes")
        require(
            not self.tensorboard or importlib.util.find_spec("tensorboard") is not None, self, "tensorboard",
            "tensorboard to be installed (pip install 'rfdarts_fast[log]')",
        )  # fmt: skip


def require(condition: bool, config: Any, field: str, expected: str) -> None:
    """ConfigError that names the option unless the condition holds."""
    if not condition:
        raise ConfigError(f"{field}: expected {expected}, got {shown(getattr(config, field))}")


def require_package(
    name: str, package: str, extra: str, *modules: str, error: type[ValueError] = ConfigError
) -> Any:
    """An optional package, imported with these modules of it.

    Args:
        name: the option or thing that needs it, with which the error begins.
        extra: the extra of this package that installs it.
        error: raised if it is not installed.
    """
    try:
        for module in modules:
            importlib.import_module(module)
        return importlib.import_module(package)
    except ImportError:
        raise error(
            f"{name}: expected the package {package}, which is not installed "
            f"(pip install 'rfdarts_fast[{extra}]')"
        ) from None


# far beyond what anybody means; greater numbers overflow somewhere on the way
MOST = 10**9
MOST_SIDE = 16_384


def require_positive(config: Any, *fields: str, most: float = MOST) -> None:
    for field in fields:
        require(0 < getattr(config, field) < math.inf, config, field, "a positive number")
        require(getattr(config, field) <= most, config, field, f"at most {most:,}")


def require_not_negative(config: Any, *fields: str, most: float = MOST) -> None:
    for field in fields:
        require(0 <= getattr(config, field) < math.inf, config, field, "0 or more")
        require(getattr(config, field) <= most, config, field, f"at most {most:,}")


def check_choices(config: Any) -> None:
    """ConfigError for a value that is none of its field's choices; the command line checks this itself."""
    hints = type_hints(type(config))
    for field in dataclasses.fields(config):
        if typing.get_origin(hints[field.name]) is Literal:
            choices = typing.get_args(hints[field.name])
            require(
                getattr(config, field.name) in choices, config, field.name, f"one of {', '.join(choices)}"
            )


def from_plain(
    values: dict[str, Any], config_class: type, names: dict[str, str] | None = None
) -> dict[str, Any]:
    """Values as JSON or YAML hold them, brought to the types of the fields; ConfigError for another type.

    Errors call a field by its entry in `names`.
    """
    hints = type_hints(config_class)
    return {
        name: _to_type((names or {}).get(name, name), value, hints[name]) for name, value in values.items()
    }


def type_hints(config_class: type) -> dict[str, Any]:
    """The types of the fields, the names of `one_of` as a Literal."""
    hints = typing.get_type_hints(config_class, include_extras=True)
    return {
        name: _plain_hint(hint.__metadata__[0], hint.__origin__)
        if typing.get_origin(hint) is Annotated
        else hint
        for name, hint in hints.items()
    }


def _plain_hint(argument: Any, origin: Any) -> Any:
    factory = getattr(argument, "constructor_factory", None)
    return factory() if factory else origin


_NUMBERS = {
    # nineteen digits fit into 64 bits
    int: re.compile(r"[-+]?(0|[1-9][0-9]{0,18})"),
    float: re.compile(
        r"[-+]?(((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?|\.?inf|\.?nan)", re.IGNORECASE
    ),
}


def is_number(text: str, number: type[int] | type[float]) -> bool:
    """Tells whether `text` is a decimal number in ASCII digits, an integer of at most 19 of them."""
    return len(text) <= 100 and _NUMBERS[number].fullmatch(text) is not None


def _to_type(name: str, value: Any, hint: Any) -> Any:
    options = [hint] if typing.get_origin(hint) in (Literal, None) else list(typing.get_args(hint))
    if value is None and type(None) in options:
        return None
    for option in options:
        if typing.get_origin(option) is Literal and value in typing.get_args(option):
            return value
        if option is Path and isinstance(value, str) and value and "\0" not in value:
            return Path(value)
        if option is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            try:
                return float(value)
            except OverflowError:
                # of an integer beyond the largest float the sign is enough
                return math.inf if value > 0 else -math.inf
        if option is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if option is str and isinstance(value, str) and value and "\0" not in value:
            return value
        if option is bool and isinstance(value, bool):
            return value
    # YAML reads 3e-4 as text
    if float in options and isinstance(value, str) and is_number(value, float):
        return float(value.replace(".inf", "inf").replace(".nan", "nan"))
    expected = " or ".join(
        ", ".join(map(str, typing.get_args(o)))
        if typing.get_origin(o) is Literal
        else getattr(o, "__name__", str(o))
        for o in options
    )
    raise ConfigError(f"{name}: expected {expected}, got {shown(value)}")
