"""The first loss or gradient of a run that is NaN or infinite, seen without waiting for a GPU."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

# steps that a GPU may be ahead of its watch
_GPU_LAG = 8


class Watch:
    """Notes the first step whose loss or gradients are not finite, and the first such tensor in it.

    What is noted stays on the device, where a recorded CUDA graph writes it, too. The CPU reads it after each
    step, of a GPU some steps later: the name and the step are those of the first all the same.

    Args:
        device: of the tensors.
        names: of each loss that is watched, and of the gradients that belong to it.
    """

    def __init__(self, device: torch.device, *names: Sequence[str]) -> None:
        self._names = names
        self._device = device
        # of each loss, the numbers in it and in its gradients up to each of them
        self._ends: dict[int, list[int]] = {}
        # steps done; of the first bad number those before its step (or -1), which loss's, its place
        self._steps = torch.zeros((), dtype=torch.int64, device=device)
        self._first = torch.full((3,), -1, dtype=torch.int64, device=device)
        self._copies: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    @torch.no_grad()
    def see(self, which: int, loss: Tensor, grads: Sequence[Tensor]) -> None:
        """Looks at a loss, the one of the names `which`, and at its gradients."""
        tensors = [loss.detach(), *grads]
        if which not in self._ends:
            self._ends[which] = [*accumulate(tensor.numel() for tensor in tensors)]
        bad = ~torch.isfinite(torch.cat([x if x.dim() == 1 else x.reshape(-1) for x in tensors]))
        place = bad.int().argmax()
        first = torch.stack([self._steps, torch.full_like(place, which), place])
        self._first.copy_(torch.where(bad.any() & (self._first[0] < 0), first, self._first))

    def end_step(self) -> tuple[int, str] | None:
        """Steps before the first bad one, and the name of its tensor; None if none is known."""
        self._steps += 1
        if self._device.type != "cuda":
            steps, which, place = self._first.tolist()
        else:
            done = torch.cuda.Event()
            copy = torch.empty(3, dtype=torch.int64, pin_memory=True).copy_(self._first, non_blocking=True)
            done.record()
            self._copies.append((copy, done))
            if len(self._copies) <= _GPU_LAG:
                return None
            copy, done = self._copies.popleft()
            done.synchronize()
            steps, which, place = copy.tolist()
        if steps < 0:
            return None
        return steps, self._names[which][bisect_right(self._ends[which], place)]
