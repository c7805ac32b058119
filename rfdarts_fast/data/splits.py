"""Cutting a training set into disjoint parts: as published, per class, or from a NAS-Bench-201 split file.

Every function returns int64 index tensors and raises DataError for bad input. Names are what errors
call a number: an option, for one.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rfdarts_fast.messages import reason, shown

from .errors import DataError, require, require_int
from .texts import read_unzipped

# the largest split file of NAS-Bench-201 takes a hundredth
_MOST_BYTES = 64_000_000
# what int() takes besides, 1_0 or digits of other scripts, is no index
_INDEX = re.compile(r"-?[0-9]{1,18}")


def split_half(
    n: int, portion: float = 0.5, seed: int | None = None, name: str = "portion"
) -> tuple[Tensor, Tensor]:
    """The first floor(portion * n) of n images and the rest, both in data set order.

    That is the published split (quark0/darts, PC-DARTS and RobustDARTS cut `list(range(n))` with
    train_portion 0.5). With a `seed` the images are shuffled before the cut.
    """
    require_int(n, "n", 2)
    require(0 < portion < 1, f"{name}: expected a number between 0 and 1, got {portion!r}")
    cut = math.floor(portion * n)
    require(0 < cut < n, f"{name}: {portion!r} of {n} images leaves one part empty")
    order = torch.arange(n) if seed is None else torch.from_numpy(_random(seed).permutation(n))
    return order[:cut], order[cut:]


def split_stratified(
    labels: Tensor, portion: float = 0.5, seed: int = 0, name: str = "portion"
) -> tuple[Tensor, Tensor]:
    """Two parts that hold `portion` and the rest of every class: for sets too small to trust to chance.

    `labels` is int64 [N]. Every class needs at least one image in each part.
    """
    require(0 < portion < 1, f"{name}: expected a number between 0 and 1, got {portion!r}")
    names = name, f"what {name} leaves"
    first, second = split_per_class(labels, (portion, 1 - portion), seed, names)
    return first, second


def split_per_class(
    labels: Tensor, fractions: Sequence[float], seed: int = 0, names: Sequence[str] = ()
) -> tuple[Tensor, ...]:
    """Disjoint random parts, the k-th holding `fractions[k]` of each class; what is left over is in no part.

    `labels` is int64 [N]. (0.1, 0.025) is PC-DARTS's search on ImageNet: 10% and 2.5% of each class for
    weights and alphas. The same seed gives the same parts under every version of numpy and torch.
    """
    require(
        len(fractions) > 0 and all(0 < f <= 1 for f in fractions) and sum(fractions) <= 1 + 1e-9,
        f"fractions: expected numbers above 0 that sum to at most 1, got {tuple(fractions)}",
    )
    require(
        labels.ndim == 1 and len(labels) > 0, f"labels: expected int64 [N], got shape {list(labels.shape)}"
    )
    random, values = _random(seed), labels.cpu().numpy()
    parts: list[list[np.ndarray[Any, Any]]] = [[] for _ in fractions]
    for label in np.unique(values):
        members = random.permutation(np.flatnonzero(values == label))
        cuts = [0, *(round(len(members) * c) for c in np.cumsum(fractions))]
        for k, (start, stop) in enumerate(itertools.pairwise(cuts)):
            name = names[k] if names else "fractions"
            require(
                stop > start,
                f"{name}: {fractions[k]:g} of class {label} is no image (the class has {len(members)})",
            )
            parts[k].append(members[start:stop])
    return tuple(torch.from_numpy(np.sort(np.concatenate(part))) for part in parts)


def read_split_file(
    path: str | os.PathLike[str], n: int, keys: tuple[str, str] = ("train", "valid")
) -> tuple[Tensor, Tensor]:
    """The two index lists of a NAS-Bench-201 split file (D-X-Y/AutoDL-Projects, plain or .gz).

    The file is JSON, {"train": ["int", ["0", "5", ...]], "valid": ["int", [...]]}: cifar-split.txt cuts the
    50,000 training images of CIFAR-10 into 25,000 and 25,000. The files that cut a test set have the
    `keys` ("xvalid", "xtest"). `n` is the size of the set that is cut. Raises DataError for a missing or
    damaged file, an index outside 0..n-1, a repeated one and parts that overlap.
    """
    file = Path(path)
    content = _read_json(file)
    if not isinstance(content, dict) or not set(keys) <= content.keys():
        got = shown(sorted(content)) if isinstance(content, dict) else type(content).__name__
        raise DataError(f"{file}: expected a split file with the keys {list(keys)}, got {got}")
    first, second = (_indices(content[key], n, f"{file}: {key}") for key in keys)
    both = np.intersect1d(first.numpy(), second.numpy())
    require(both.size == 0, f"{file}: expected disjoint parts, got {both.size} images in both")
    return first, second


def _read_json(file: Path) -> object:
    expected = f"{file}: expected a readable NAS-Bench-201 split file"
    text = read_unzipped(file, expected, _MOST_BYTES)
    try:
        return json.loads(text, object_pairs_hook=lambda pairs: _named_once(pairs, expected))
    except DataError:
        raise
    # ValueError: text that is no JSON, and integers of more digits than Python reads
    except (ValueError, RecursionError) as error:
        raise DataError(f"{expected}, got {reason(error)}") from error


def _named_once(pairs: list[tuple[str, object]], expected: str) -> dict[str, object]:
    values = dict(pairs)
    require(len(values) == len(pairs), f"{expected}, got {shown([name for name, _ in pairs])}")
    return values


def _indices(entry: object, n: int, name: str) -> Tensor:
    if not (isinstance(entry, list) and len(entry) == 2 and entry[0] == "int" and isinstance(entry[1], list)):
        raise DataError(f'{name}: expected ["int", [indices]], got {shown(entry)}')
    texts = [str(value) if type(value) in (int, str) else shown(value) for value in entry[1]]
    wrong = next((text for text in texts if not _INDEX.fullmatch(text)), None)
    require(wrong is None, f"{name}: expected integers, got {shown(wrong)}")
    values = torch.tensor([int(text) for text in texts], dtype=torch.int64)
    require(len(values) > 0, f"{name}: expected at least one index, got none")
    low, high = int(values.min()), int(values.max())
    require(low >= 0 and high < n, f"{name}: expected indices within 0..{n - 1}, got {low}..{high}")
    require(len(values.unique()) == len(values), f"{name}: expected every index once, got repeated ones")
    return values


def _random(seed: int) -> np.random.RandomState:
    # the legacy generator: numpy promises never to change its numbers, so a split outlives upgrades
    require(require_int(seed, "seed", 0) < 2**32, f"seed: expected one below 2**32, got {seed}")
    return np.random.RandomState(seed)
