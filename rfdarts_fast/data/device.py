"""Getting tensors onto the device that trains without making the CPU wait for it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

# images and labels
Batch = tuple[Tensor, Tensor]


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on `device`; pinned for CUDA, so that the copy does not wait for the GPU's queue."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@lru_cache(maxsize=64)
def per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """One float32 constant per channel as [1, C, 1, 1], uploaded once."""
    return torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, 1, 1)


def copied_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """CPU batches on `device`; on CUDA the next batch is copied while the last one is used."""
    if device.type != "cuda":
        yield from ((images.to(device), labels.to(device)) for images, labels in batches)
        return
    side = torch.cuda.Stream(device)
    ready: tuple[Batch, torch.cuda.Event] | None = None
    for images, labels in batches:
        with torch.cuda.stream(side):
            copies = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            done = torch.cuda.Event()
            done.record(side)
        if ready is not None:
            yield _handed_over(*ready, device)
        ready = copies, done
    if ready is not None:
        yield _handed_over(*ready, device)


def _handed_over(batch: Batch, done: torch.cuda.Event, device: torch.device) -> Batch:
    current = torch.cuda.current_stream(device)
    current.wait_event(done)
    for tensor in batch:
        # the memory belongs to the side stream; it must not be reused while this one still reads it
        tensor.record_stream(current)
    return batch
