"""A number of bytes that cells and layers may keep for the backward."""

from __future__ import annotations

from collections.abc import Hashable

import torch


class Budget:
    """The choice, call by call, of what keeps its outputs and what computes them again in the backward.

    A step is the calls between two calls of one cell. The sizes of the last step decide: the smallest are
    kept, as many as fit. Cells of later stages are as much work as earlier ones and have fewer bytes, so that
    the least is computed again. In a first step, and where a call is larger than last time, nothing is kept.

    Args:
        limit: bytes.

    Raises:
        ValueError: for a negative limit.
    """

    def __init__(self, limit: int) -> None:
        if limit < 0:
            raise ValueError(f"memory_budget: expected bytes, at least 0, got {limit}")
        self.limit = limit
        self._step: dict[Hashable, int] = {}
        # what may be kept, and how many bytes of it
        self._kept: dict[Hashable, int] = {}

    def keeps(self, key: Hashable, size: int) -> bool:
        """True if the call named `key` may keep its `size` bytes."""
        if not torch.is_grad_enabled():
            return False
        if key in self._step:
            self._kept, left = {}, self.limit
            for each, bytes_of_it in sorted(self._step.items(), key=lambda item: item[1]):
                left -= bytes_of_it
                if left >= 0:
                    self._kept[each] = bytes_of_it
            self._step = {}
        self._step[key] = size
        return size <= self._kept.get(key, -1)
