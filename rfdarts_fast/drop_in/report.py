"""The account that `accelerate` gives of what it did, and what it knows of how the model is used."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rfdarts_fast.drop_in.probe import without_hooks
from rfdarts_fast.ops.backend import use_backend


@dataclass
class Report:
    """The changes that `accelerate` made; `str(report)` is for readers.

    Attributes:
        kernels: path of a module that compiled kernels compute -> description.
        plain: path of a module that was replaced and stays in plain PyTorch -> reason.
        left: path of a module -> why it is as it was. In strict mode only modules that need no replacement.
        never_called: paths of replaced modules whose forward the model does not call; None if that is not
            known, for the reason in `calls_unknown`.
        parameters: name -> new parameter, the gammas and betas of BatchNorms that had none.
        vanished: name of a bias that is gone -> name of the buffer that it went into.
        optimizers: path of an optimiser inside the model that trains its weights -> names of new parameters
            that it lacks.
        frozen: number of parameters, counted as scalars, that do not train.
        affine: number of BatchNorms that got a trainable gamma and beta.
    """

    kernels: dict[str, str] = field(default_factory=dict)
    plain: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    never_called: list[str] | None = None
    calls_unknown: str = ""
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    vanished: dict[str, str] = field(default_factory=dict)
    optimizers: dict[str, list[str]] = field(default_factory=dict)
    frozen: int = 0
    affine: int = 0

    @property
    def replaced(self) -> dict[str, str]:
        """Path of a replaced module -> the description of its kernels, or why it has none."""
        return {**self.kernels, **self.plain}

    @property
    def remedy(self) -> str:
        """The lines that give optimisers the parameters that they lack; "" if none lacks any."""
        return "\n".join(
            f'model.{path}.add_param_group({{"params": list(report.parameters.values())}})'
            for path in self.optimizers
        )

    def __str__(self) -> str:
        idle = [*self.never_called] if self.never_called else []
        lines = [
            f"{len(self.kernels)} modules in kernels, {len(self.plain)} in plain PyTorch, "
            f"{len(self.left)} left; {self.frozen} scalars frozen, {self.affine} BatchNorms got "
            "gamma and beta"
        ]
        lines += [f"  kernels {text}" for text in grouped(self.kernels)]
        lines += [f"  plain PyTorch {text}" for text in grouped(self.plain)]
        lines += [f"  left {text}" for text in grouped(self.left)]
        lines += [f"  never called {text}" for text in grouped(dict.fromkeys(idle, "by the model's forward"))]
        if self.calls_unknown:
            lines.append(f"  which modules the model calls is unknown: {self.calls_unknown}")
        if self.parameters:
            lines.append(f"  new parameters {_some(self.parameters)}")
        if self.vanished:
            lines.append(f"  went into running means {_some(self.vanished)}")
        for path, names in self.optimizers.items():
            lines.append(f"  model.{path} lacks {len(names)} new parameters; give it them:")
        lines += [f"    {line}" for line in self.remedy.splitlines()]
        return "\n".join(lines)


def grouped(reasons: dict[str, str]) -> list[str]:
    """Every distinct reason once, in full, behind the modules that it holds for."""
    paths: dict[str, list[str]] = {}
    for path, reason in reasons.items():
        paths.setdefault(reason, []).append(path or "the model")
    return [f"{_some(members)}: {reason}" for reason, members in paths.items()]


def _some(names: Iterable[str]) -> str:
    first, *others = names
    return f"{first} and {len(others)} others" if len(others) > 1 else ", ".join([first, *others])


def uncalled(model: nn.Module, paths: Iterable[str], example: Any) -> list[str] | str:
    """Those of the paths whose modules one forward pass of a copy does not call, or why none is known.

    Args:
        example: the model's input; None for images of 32x32 pixels.
    """
    try:
        copied = without_hooks(copy.deepcopy(model))
        called: set[str] = set()
        for path, module in copied.named_modules():
            module.register_forward_pre_hook(lambda *_, path=path: called.add(path))
        if example is None:
            conv = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
            example = conv.weight.new_zeros(2, conv.in_channels, 32, 32)
        devices = [example.device] if isinstance(example, Tensor) and example.is_cuda else []
        with torch.no_grad(), torch.random.fork_rng(devices), use_backend("reference"):
            copied(example)
    except Exception as error:
        return f"{type(error).__name__}: {error}; pass `example`, an input that the model takes"
    return [path for path in paths if path not in called]


def lacking_optimizers(model: nn.Module, new: dict[str, nn.Parameter]) -> dict[str, list[str]]:
    """Path of an optimiser of the model's weights, as an expression behind `model.` -> names of the new
    parameters that it lacks."""
    layers = (nn.Conv2d, nn.Linear, nn.BatchNorm2d)
    weights = {id(p) for m in model.modules() if isinstance(m, layers) for p in m.parameters()}
    weights -= {*map(id, new.values())}
    lacking = {}
    for path, optimizer in _optimizers(model):
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        names = [name for name, parameter in new.items() if id(parameter) not in trained]
        if names and trained & weights:
            lacking[path] = names
    return lacking


def _optimizers(model: nn.Module) -> Iterator[tuple[str, torch.optim.Optimizer]]:
    """Optimisers among the attributes of modules, and in lists and dictionaries there."""
    seen: set[int] = set()

    def search(path: str, value: Any) -> Iterator[tuple[str, torch.optim.Optimizer]]:
        if isinstance(value, torch.optim.Optimizer) and id(value) not in seen:
            seen.add(id(value))
            yield path, value
        elif isinstance(value, (list, tuple)):
            for i, each in enumerate(value):
                yield from search(f"{path}[{i}]", each)
        elif type(value) is dict:
            for key, each in value.items():
                yield from search(f"{path}[{key!r}]", each)

    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if not name.startswith("_modules"):
                yield from search(f"{path}.{name}".lstrip("."), value)
