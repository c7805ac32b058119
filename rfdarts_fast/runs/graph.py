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
    """A step that runs as it is the first times, is then recorded, and from then on replayed.

    The step may only launch work. It reads its arguments and tensors that are changed in place, and leaves
    its results in such tensors.

    Args:
        step: takes tensors, returns nothing.
        record: takes the work to record, which need not run yet, and returns a function that replays it.
        warmup: calls before recording, for each variant and shapes: lazily made state must be there.
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

    def __call__(self, variant: Hashable, *tensors: Tensor) -> None:
        """One step; steps that launch other work for arguments of the same shapes are another variant."""
        key = variant, *((x.shape, x.stride(), x.dtype) for x in tensors)
        calls = self._calls[key] = self._calls.get(key, 0) + 1
        if self.reason is None and key not in self._recorded and calls > self._warmup:
            self._try_to_record(key, variant, tensors)
        if key not in self._recorded:
            self._step(variant, *tensors)
            return
        static, replay = self._recorded[key]
        for place, x in zip(static, tensors, strict=True):
            place.copy_(x)
        replay()

    def _try_to_record(self, key: Hashable, variant: Hashable, tensors: tuple[Tensor, ...]) -> None:
        static = [x.clone() for x in tensors]
        try:
            self._recorded[key] = static, self._record(lambda: self._step(variant, *static))
        except RuntimeError as error:
            if self._required:
                raise
            self.reason = str(error).splitlines()[0]
            warnings.warn(
                f"steps are not recorded in a CUDA graph: {self.reason}", RuntimeWarning, stacklevel=3
            )
