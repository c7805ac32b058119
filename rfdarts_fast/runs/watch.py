"""The first loss or gradient of a run that is NaN or infinite, seen without waiting for a GPU."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

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
        # steps done, and of the first bad tensor those before its step (or -1), and its place in `names`
        self._steps = torch.zeros((), dtype=torch.int64, device=device)
        self._first = torch.full((3,), -1, dtype=torch.int64, device=device)
        self._copies: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    @torch.no_grad()
    def see(self, which: int, loss: Tensor, grads: Sequence[Tensor]) -> None:
        """Looks at a loss, the one of the names `which`, and at its gradients."""
        norms = torch.stack([loss.detach(), *torch._foreach_norm(list(grads))])  # type: ignore[arg-type]
        bad = ~torch.isfinite(norms)
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
        return None if steps < 0 else (steps, self._names[which][place])
