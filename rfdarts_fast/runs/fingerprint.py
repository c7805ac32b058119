"""The data that a run began with: noted in its folder, compared at every later start and in evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rfdarts_fast.data import DataSource
from rfdarts_fast.data.fingerprint import of_tensor

Fingerprint = dict[str, dict[str, Any]]


def fingerprint(source: DataSource, splits: Mapping[str, Tensor] | None = None) -> Fingerprint:
    """Numbers and hashes of a data set's parts, and of the indices of the `splits` of its training images."""
    parts: Fingerprint = {"classes": {"names": list(source.class_names)}}
    for name, images in (("train", source.train), ("test", source.test)):
        if images is not None:
            parts[name] = {"number": len(images), **images.fingerprint()}
    for name, indices in (splits or {}).items():
        parts[f"split {name}"] = {"number": len(indices), "indices": of_tensor(indices)}
    return parts


def changes(there: Fingerprint, here: Fingerprint) -> list[str]:
    """The parts that differ, in words."""
    texts = [f"{name} is missing" for name in there if name not in here]
    for name, facts in here.items():
        before = there.get(name)
        if before is None:
            texts.append(f"{name} is new")
        elif facts.get("number") != before.get("number"):
            texts.append(f"{name} had {before.get('number')} images and has {facts.get('number')}")
        else:
            differ = [fact for fact in facts if facts[fact] != before.get(fact)]
            if differ:
                texts.append(f"{name} has other {' and '.join(differ)}")
    return texts
