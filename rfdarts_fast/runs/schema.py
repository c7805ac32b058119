"""The schema of a run's folder: every part of its checkpoints and records, and the kind of each.

A checkpoint is compared with the run that is to go on from it: the names, shapes and dtypes of its tensors
are those of the run's own, every number is finite, and optimisers have the run's options. The text of a
misfit names the part: "network.stem.0.weight: expected float32 [12, 3, 3, 3], got float32 [24, 3, 3, 3]".
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Part = nn.Module | Optimizer | Tensor | dict | list | tuple | str | float | int | None

LATER_PARTS = frozenset({"version", "config", "history", "alpha_gradients"})
"""Parts that checkpoints of earlier versions lack: read with a default."""

# how an optimiser computes, not what; a checkpoint may come from another device
_MODES = frozenset({"params", "lr", "foreach", "fused", "capturable", "differentiable", "initial_lr"})
# what an optimiser keeps of each parameter
_KEPT = {torch.optim.SGD: {"momentum_buffer"}, torch.optim.Adam: {"step", "exp_avg", "exp_avg_sq"}}


def misfit(value: Any, expected: Part, name: str = "") -> str | None:
    """The first part of `value` that is of another kind than `expected`; None if all fits."""
    if isinstance(expected, nn.Module):
        return misfit(value, expected.state_dict(), name)
    if isinstance(expected, Optimizer):
        return _optimizer_misfit(value, expected, name)
    if isinstance(expected, Tensor):
        return _tensor_misfit(value, expected, name)
    if isinstance(expected, Mapping):
        return _dict_misfit(value, expected, name)
    if isinstance(expected, (list, tuple)):
        # one entry for each GPU of another machine
        if name == "rng.cuda" and isinstance(value, list):
            wanted = torch.get_rng_state()[:0]
            return _first(_tensor_misfit(v[:0] if isinstance(v, Tensor) else v, wanted, name) for v in value)
        if not isinstance(value, type(expected)) or len(value) != len(expected):
            return f"{name}: expected {len(expected)} values, got {_kind(value)}"
        return _first(
            misfit(v, e, f"{name}[{i}]") for i, (v, e) in enumerate(zip(value, expected, strict=True))
        )
    if isinstance(expected, str):
        return None if value == expected else f"{name}: expected {expected!r}, got {value!r}"
    if isinstance(expected, bool) or (expected is None and value is None):
        return None if isinstance(value, type(expected)) else f"{name}: expected {expected}, got {value!r}"
    if isinstance(expected, int):
        whole = isinstance(value, int) and not isinstance(value, bool)
        return None if whole else f"{name}: expected a whole number, got {_kind(value)}"
    # a second number of a pair that is drawn at a time may be there or not
    if _is_number(value) or (value is None and name.startswith("rng.")):
        return None
    return f"{name}: expected a finite number, got {_kind(value)}"


def range_misfit(state: Mapping[str, Any], ranges: Mapping[str, tuple[int, float]]) -> str | None:
    """The first number of `state` outside its range (first and last value)."""
    return _first(
        None if first <= state[name] <= last else f"{name}: expected {first} to {last}, got {state[name]}"
        for name, (first, last) in ranges.items()
    )


def not_finite(value: Any) -> str | None:
    """The name of the first tensor that has NaN or an infinite value; None if all are finite."""
    floats: dict[tuple[torch.dtype, torch.device], list[tuple[str, Tensor]]] = defaultdict(list)
    for name, tensor in _tensors(value, ""):
        if tensor.is_floating_point():
            floats[tensor.dtype, tensor.device].append((name, tensor))
    for named in floats.values():
        # one question for all: a supernet has thousands, and a GPU is waited for at each
        if not _is_finite(torch.cat([tensor.reshape(-1) for _, tensor in named])):
            return next(name for name, tensor in named if not _is_finite(tensor))
    return None


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _tensors(part, _join(name, key))
    elif isinstance(value, (list, tuple)):
        for i, part in enumerate(value):
            yield from _tensors(part, f"{name}[{i}]")


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def records_misfit(lines: list[bytes]) -> str | None:
    """The first line that is not the record of its epoch: line n is a JSON object whose "epoch" is n - 1."""
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            return f"line {number} is not JSON"
        if not isinstance(record, dict):
            return f"line {number}: expected an object, got {type(record).__name__}"
        epoch = record.get("epoch")
        if epoch != number - 1 or isinstance(epoch, bool):
            return f"line {number}: expected the record of epoch {number - 1}, got epoch {epoch!r}"
    return None


def _dict_misfit(value: Any, expected: Mapping[str, Any], name: str) -> str | None:
    if not isinstance(value, Mapping):
        return f"{name or 'it'}: expected named parts, got {_kind(value)}"
    missing = [key for key in expected if key not in value and key not in LATER_PARTS]
    unknown = [key for key in value if key not in expected and _join(name, key) not in LATER_PARTS]
    if missing or unknown:
        text = [f"it has no {_join(name, missing[0])!r}"] if missing else []
        text += [f"it has {_join(name, unknown[0])!r}, which the run has not"] if unknown else []
        return " and ".join(text)
    return _first(
        misfit(value[key], part, _join(name, key)) for key, part in expected.items() if key in value
    )


def _tensor_misfit(value: Any, expected: Tensor, name: str) -> str | None:
    same = isinstance(value, Tensor) and value.layout == torch.strided
    if not same or (value.shape, value.dtype) != (expected.shape, expected.dtype):
        return f"{name}: expected {_kind(expected)}, got {_kind(value)}"
    if value.is_floating_point() and not _is_finite(value):
        return f"{name}: expected finite values, got NaN or infinite ones"
    return None


def _optimizer_misfit(value: Any, optimizer: Optimizer, name: str) -> str | None:
    fresh = optimizer.state_dict()
    base = next(base for base in _KEPT if isinstance(optimizer, base))
    if not isinstance(value, dict) or value.keys() != fresh.keys():
        return f"{name}: expected the state of {base.__name__}, got {_kind(value)}"
    groups, wanted = value["param_groups"], fresh["param_groups"]
    if not isinstance(groups, list) or len(groups) != len(wanted):
        return f"{name}: expected {len(wanted)} groups of parameters, got {_kind(groups)}"
    for i, (group, fresh_group) in enumerate(zip(groups, wanted, strict=True)):
        where = f"{name}.param_groups[{i}]"
        if not isinstance(group, dict) or group.get("params") != fresh_group["params"]:
            return f"{where}: expected {len(fresh_group['params'])} parameters, got others"
        rate: Any = group.get("lr")
        rate = rate.item() if isinstance(rate, Tensor) and rate.numel() == 1 else rate
        if not _is_number(rate) or rate < 0:
            return f"{where}.lr: expected a learning rate, got {_kind(rate)}"
        for key in fresh_group.keys() & group.keys() - _MODES:
            if group[key] != fresh_group[key]:
                return f"{where}.{key}: expected {fresh_group[key]!r}, got {group[key]!r}"
    parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    return _kept_misfit(value["state"], parameters, _KEPT[base], f"{name}.state")


def _kept_misfit(state: Any, parameters: dict[int, Tensor], names: Iterable[str], name: str) -> str | None:
    """A misfit in what an optimiser keeps of its parameters; nothing before its first step."""
    if not isinstance(state, dict):
        return f"{name}: expected named parts, got {_kind(state)}"
    for index, kept in state.items():
        where = f"{name}[{index!r}]"
        if index not in parameters:
            return f"{where}: expected one of {len(parameters)} parameters"
        if not isinstance(kept, dict) or (kept and kept.keys() != set(names)):
            return f"{where}: expected {', '.join(sorted(names))}, got {_kind(kept)}"
        for key, part in kept.items():
            # a momentum that there is none of yet
            if key == "momentum_buffer" and part is None:
                continue
            wanted = torch.zeros(()) if key == "step" else parameters[index]
            other = misfit(part, wanted, f"{where}.{key}")
            if other:
                return other
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _join(name: str, key: Any) -> str:
    return f"{name}.{key}" if name else str(key)


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, (dict, list, tuple)):
        return f"{type(value).__name__} of {len(value)}"
    return repr(value)[:40]


def _first(texts: Iterable[str | None]) -> str | None:
    return next((text for text in texts if text is not None), None)
