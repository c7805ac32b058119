"""A training step recorded once in a CUDA graph and replayed: no Python and no launch by the host."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

Step = Callable[..., None]
Record = Callable[[Callable[[], None]], Callable[[], None]]


class Recorder:
    """Records with torch.cuda.graph; all recordings share one memory pool, as only one replays at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            work()
        return graph.replay


class GraphedStep:
    """Calls a step as it is the first times, then records it and replays the recording.

    The step may only launch work. What it reads and what changes from call to call is in its arguments, or in
    tensors that are changed in place; so is what it leaves behind.

    Args:
        step: takes tensors, returns nothing.
        record: takes work to record, which may not run, and returns what replays it.
        warmup: calls before recording, for each `kind` and shapes: lazily made state must be there.
        required: a step that cannot be recorded raises; otherwise it goes on unrecorded, with a warning.
    """

    def __init__(self, step: Step, record: Record, warmup: int = 3, required: bool = False) -> None:
        self._step = step
        self._record = record
        self._warmup = warmup
        self._required = required
        self._calls: dict[Hashable, int] = {}
        self._recorded: dict[Hashable, tuple[list[Tensor], Callable[[], None]]] = {}
        self.reason: str | None = None

    def __call__(self, kind: Hashable, *tensors: Tensor) -> None:
        """One step; `kind` names what the step does differently, apart from the shapes of its arguments."""
        key = kind, *((x.shape, x.stride(), x.dtype) for x in tensors)
        calls = self._calls[key] = self._calls.get(key, 0) + 1
        if self.reason is None and key not in self._recorded and calls > self._warmup:
            self._try_to_record(key, kind, tensors)
        if key not in self._recorded:
            self._step(kind, *tensors)
            return
        static, replay = self._recorded[key]
        for place, x in zip(static, tensors, strict=True):
            place.copy_(x)
        replay()

    def _try_to_record(self, key: Hashable, kind: Hashable, tensors: tuple[Tensor, ...]) -> None:
        static = [x.clone() for x in tensors]
        try:
            self._recorded[key] = static, self._record(lambda: self._step(kind, *static))
        except RuntimeError as error:
            if self._required:
                raise
            self.reason = str(error).splitlines()[0]
            warnings.warn(
                f"steps are not recorded in a CUDA graph: {self.reason}", RuntimeWarning, stacklevel=3
            )
