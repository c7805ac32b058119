"""Options as they are typed: on the command line, and in a YAML file of them."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin

import tyro
import yaml

from rfdarts_fast.messages import one_line, reason, shown, thing_at
from rfdarts_fast.runs.config import ConfigError, RunConfig, from_plain, is_number, type_hints

Options = TypeVar("Options")
Config = TypeVar("Config", bound=RunConfig)

_MOST_YAML_BYTES = 1_000_000


def parse_config(
    config_class: type[Config], preset_values: Callable[[dict], dict], args: list[str], prog: str
) -> Config:
    """A config from a preset, a YAML file and the command line, each winning over the one before.

    The options that choose the preset are read first, so that --help shows the values that would be used.
    Every value is checked. Raises ConfigError that names the option as it was typed, and the file and line.
    """
    choosers = [name for name in ("preset", "method", "space") if name in config_class.__dataclass_fields__]
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("config", *choosers):
        first.add_argument(f"--{name}", default=argparse.SUPPRESS)
    try:
        known = vars(first.parse_known_args(args)[0])
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error.argument_name}: {error.message}") from None
    given = {name: value for name, value in known.items() if value != "None"}
    file = read_yaml(Path(given["config"]), config_class) if "config" in given else {}
    values = {name: entry.value for name, entry in file.items()}
    default = config_class(
        **{"out": tyro.MISSING, **preset_values({**values, **given}), **values}  # type: ignore[arg-type]
    )
    config = parse_options(config_class, args, prog, default=default, config=(tyro.conf.AvoidSubcommands,))
    try:
        config.check()
    except ConfigError as error:
        message = as_typed(str(error), args)
        name, _, rest = str(error).partition(": ")
        if name in file and message == str(error):
            message = f"{file[name].where}: {rest}"
        raise ConfigError(message) from None
    return config


def parse_options(options_class: type[Options], args: list[str], prog: str, **how: Any) -> Options:
    """The dataclass of options that `args` give; ConfigError of one line for a usage error.

    Numbers are to be written in ASCII digits, and no value may be empty.
    """
    hints = type_hints(options_class)
    for word, following in zip_longest(args, args[1:]):
        option, equals, value = word.partition("=")
        name = _field_name(option)
        text = value if equals else following
        if not option.startswith("--") or name not in hints or text is None:
            continue
        if not text:
            raise ConfigError(f"{option}: expected a value, got ''")
        choices = get_args(hints[name]) or (hints[name],)
        number = next((number_type for number_type in (float, int) if number_type in choices), None)
        if number and text != "None" and not text.startswith("--") and not is_number(text, number):
            raise ConfigError(f"{option}: expected {number.__name__}, got {shown(text)}")
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            options = tyro.cli(options_class, prog=prog, args=args, **how)
    except SystemExit as stop:
        if stop.code != 2:
            raise
        raise ConfigError(_first_paragraph(printed.getvalue())) from None
    sys.stderr.write(printed.getvalue())
    return options


def _first_paragraph(box: str) -> str:
    """The text of a usage error without its frame, down to the first rule."""
    lines = [line.strip("│| ") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    rules = [i for i, line in enumerate(lines) if line and not line.strip("─")]
    text = " ".join(lines[: rules[0]] if rules else lines)
    hint = re.search(r"Perhaps you meant: +(--[\w-]+)", " ".join(lines))
    # tyro's words for a value that does not suit its option
    text = re.sub(r"^Error parsing (--[\w-]+): ", r"\1: ", text)
    return one_line(f"{text}; perhaps you meant {hint[1]}" if hint else text)


def _field_name(option: str) -> str:
    return option.removeprefix("--").replace("-", "_")


def as_typed(message: str, args: Sequence[str]) -> str:
    """A message that begins with the name of a field, with the option in `args` that set it, if one did."""
    name, colon, rest = message.partition(": ")
    for word in args:
        option = word.partition("=")[0]
        if colon and option.startswith("--") and name in (_field_name(option), _field_name(option)[3:]):
            return f"{option}: {rest}"
    return message


class Entry(NamedTuple):
    """A value of an options file, and the place where it stands: the file, the line, the name as typed."""

    value: Any
    where: str


def read_yaml(path: Path, config_class: type) -> dict[str, Entry]:
    """Values for fields of `config_class` from a YAML file of names and plain values.

    Anchors, aliases, tags, nested values, several documents and names that stand there twice are refused.
    Numbers are decimal; what YAML 1.1 makes of 010, 0x10, 1_000 or 1:30 is text. Raises ConfigError that
    names file and line, also for an unknown name and a value of another type.
    """
    entries: dict[str, Entry] = {}
    for name_event, event in _pairs(path):
        where = f"config: {place(path, name_event)}"
        name, entry = option_entry(name_event.value, event, config_class, where)
        if name in entries:
            raise ConfigError(f"{where}: expected {name_event.value} once, got it twice")
        entries[name] = entry
    return entries


def option_entry(typed: str, event: yaml.ScalarEvent, config_class: type, where: str) -> tuple[str, Entry]:
    """The field that `typed` names, and its value out of YAML; ConfigError for an unknown one or a misfit."""
    name = typed.replace("-", "_")
    hints = type_hints(config_class)
    if name not in {field.name for field in fields(config_class)}:
        raise ConfigError(f"{where}: has no such option: {shown(typed)}")
    where = f"{where}: {typed}"
    value = _scalar(event, hints[name])
    return name, Entry(from_plain({name: value}, config_class, {name: where})[name], where)


def yaml_events(path: Path, option: str) -> Iterator[yaml.Event]:
    """The events of a YAML file without anchors, aliases and tags, of one document.

    Raises ConfigError that names the option that gave the file, the file and the line.
    """
    last: yaml.Event | None = None
    try:
        for event in yaml.parse(_read(path, option), Loader=yaml.SafeLoader):
            where = f"{option}: {place(path, event)}"
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise ConfigError(f"{where}: expected no anchors and aliases")
            tag = getattr(event, "tag", None)
            if tag:
                raise ConfigError(f"{where}: expected no tags, got {shown(tag)}")
            if isinstance(event, yaml.DocumentStartEvent) and isinstance(last, yaml.DocumentEndEvent):
                raise ConfigError(f"{where}: expected one document, got another")
            yield event
            last = event
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}," if error.problem_mark else ""
        raise ConfigError(f"{option}: {path}{line} cannot be read as YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{option}: {path} cannot be read as YAML: {error}") from None


def _pairs(path: Path) -> list[tuple[yaml.ScalarEvent, yaml.ScalarEvent]]:
    """The names and values of the mapping that is all of a YAML file."""
    scalars: list[yaml.ScalarEvent] = []
    last: yaml.Event | None = None
    for event in yaml_events(path, "config"):
        where = f"config: {place(path, event)}"
        if isinstance(event, yaml.MappingStartEvent) and not isinstance(last, yaml.DocumentStartEvent):
            raise ConfigError(f"{where}: expected a plain value, got a mapping")
        if isinstance(event, yaml.SequenceStartEvent):
            inside = "a plain value" if scalars else "names and values"
            raise ConfigError(f"{where}: expected {inside}, got a list")
        if isinstance(event, yaml.ScalarEvent):
            if isinstance(last, yaml.DocumentStartEvent) and event.value:
                raise ConfigError(f"{where}: expected names and values, got {shown(event.value)}")
            scalars.append(event)
        last = event
    return list(zip(scalars[::2], scalars[1::2], strict=False))


def place(path: Path, event: yaml.Event) -> str:
    """The file and line of an event."""
    return f"{path}, line {event.start_mark.line + 1 if event.start_mark else 1}"


def _read(path: Path, option: str) -> str:
    there = thing_at(path)
    if there == "nothing there":
        raise ConfigError(f"{option}: there is no file {path}")
    if there != "a file":
        raise ConfigError(f"{option}: expected a file, got {there}: {path}")
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_YAML_BYTES + 1)
        if len(content) > _MOST_YAML_BYTES:
            raise ConfigError(f"{option}: {path} has more than {_MOST_YAML_BYTES} bytes")
        return content.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{option}: {path} cannot be read as YAML: {reason(error)}") from None


_WORDS = {
    **dict.fromkeys(("", "~", "null"), None),
    **dict.fromkeys(("true", "yes", "on"), True),
    **dict.fromkeys(("false", "no", "off"), False),
}


def _scalar(event: yaml.ScalarEvent, hint: Any) -> Any:
    """The value of a scalar: text if it is quoted, or a choice of its option, such as off."""
    text = event.value
    choices = [
        choice for part in (hint, *get_args(hint)) if get_origin(part) is Literal for choice in get_args(part)
    ]
    if not event.implicit[0] or text in choices:
        return text
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if is_number(text, int):
        return int(text)
    # 010 is the eight of YAML 1.1 and no other number
    return float(text) if is_number(text, float) and re.search("[0-9].*[.eE]|[.][0-9]", text) else text
