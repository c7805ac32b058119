"""Checkpoints: everything a run needs to go on bit by bit as if it had not stopped.

A checkpoint is what `torch.save` writes, so `torch.load(path, weights_only=True)` reads it. The comment of
the archive holds a SHA-256 of the bytes before it: it tells a damaged file from one of another kind, before
anything of the file is interpreted. Checkpoints of version 1 (rfdarts_fast 0.1.0) have none.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import random
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rfdarts_fast.messages import reason
from rfdarts_fast.runs.files import read_bytes, write_atomic

VERSION = 2
"""Format of the checkpoints that are written here; older ones are read, too."""

# the way out of a folder that this version cannot read
ANOTHER_VERSION = (
    "go on with the version of rfdarts_fast that wrote it (its environment.json names it), or start anew in "
    "another folder"
)
_COMMENT = b"rfdarts_fast checkpoint, SHA-256 "
_COMMENT_BYTES = len(_COMMENT) + 64


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or holds the state of another run or version."""


class DamagedError(CheckpointError):
    """The file is not, or no longer, what a run wrote."""


def rng_state() -> dict[str, Any]:
    """The states of the global random generators of Python, NumPy and PyTorch."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": (version, list(internal), gauss),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    # a run may move to a machine with another number of GPUs; the data order does not depend on these
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def save_checkpoint(path: Path, state: dict[str, Any], previous: Path | None = None) -> None:
    """Writes `state` and its version; a checkpoint that was there becomes `previous`. Raises WriteError."""
    buffer = io.BytesIO()
    torch.save({"version": VERSION, **state}, buffer)
    archive = buffer.getbuffer()
    comment = _COMMENT + hashlib.sha256(archive).hexdigest().encode()
    # an archive ends with the length of its comment
    write_atomic(path, archive[:-2], len(comment).to_bytes(2, "little"), comment, previous=previous)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state that `save_checkpoint` wrote, on the CPU. Nothing of the file is run.

    Raises:
        DamagedError: for anything else, naming the file.
        CheckpointError: if a later version wrote it.
    """
    try:
        data = read_bytes(path)
    except OSError as error:
        raise DamagedError(f"checkpoint: {path} cannot be read: {reason(error)}") from None
    if not data.startswith(b"PK\3\4"):
        what = "it is empty" if not data else f"it begins with {data[:8]!r}"
        raise DamagedError(f"checkpoint: {path} is damaged or no checkpoint: {what}")
    signed = re.fullmatch(re.escape(_COMMENT) + rb"([0-9a-f]{64})", data[-_COMMENT_BYTES:])
    digest = hashlib.sha256(memoryview(data)[: -_COMMENT_BYTES - 2])
    digest.update(b"\0\0")
    if signed and digest.hexdigest().encode() != signed[1]:
        raise DamagedError(f"checkpoint: {path} is damaged: its checksum is of other bytes")
    state = _read(path, data)
    version = state.get("version", 1)
    if not isinstance(version, int) or version > VERSION:
        raise CheckpointError(
            f"checkpoint: {path} has format {version!r}, and this version reads up to {VERSION}; "
            f"{ANOTHER_VERSION}"
        )
    if version > 1 and not signed:
        raise DamagedError(f"checkpoint: {path} is damaged: its checksum is missing")
    return state


def _read(path: Path, data: bytes) -> dict[str, Any]:
    """The dictionary in an archive. PyTorch's own messages advise to load unsafely, and are not passed on."""
    try:
        members = zipfile.ZipFile(io.BytesIO(data)).infolist()
        # nothing is compressed, so that what is read takes no more memory than the file
        if sum(member.file_size for member in members) > len(data):
            raise DamagedError(f"checkpoint: {path} is damaged or no checkpoint: its parts exceed the file")
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (DamagedError, MemoryError):
        raise
    except pickle.UnpicklingError:
        raise DamagedError(
            f"checkpoint: {path} is damaged or no checkpoint: it holds other things than numbers and tensors"
        ) from None
    # whatever the bytes may make of the unpickler
    except Exception as error:
        raise DamagedError(
            f"checkpoint: {path} is damaged or no checkpoint: {type(error).__name__} in its archive"
        ) from None
    if not isinstance(state, dict):
        raise DamagedError(f"checkpoint: {path} is no checkpoint: it holds {type(state).__name__}, no parts")
    return state


@contextmanager
def restoring(path: Path) -> Iterator[None]:
    """Puts state from the checkpoint `path` back inside; CheckpointError that names what does not fit."""
    try:
        yield
    except (KeyError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise misfit(path, f"{type(error).__name__}: {' '.join(str(error).split())}") from None


def misfit(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"checkpoint: {path} does not fit this run: {what}; {ANOTHER_VERSION}")
