"""Gradient accumulation: a step's batch in micro-batches, one after the other.

The gradients of the micro-batches, weighed by their shares of the images, add up to the gradient of the mean
loss over the whole batch; memory is that of one micro-batch. What is no mean over images is not the batch's:
BatchNorm normalises each micro-batch by its own statistics, and its running statistics move with each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor


def micro_batch_count(size: int, batch_size: int, grad_accum_steps: int, processes: int = 1) -> int:
    """The number of micro-batches for a batch of `size` images: `grad_accum_steps` for one of `batch_size`,
    as few for a smaller one as leave micro-batches no larger. It is the same in all processes, each of which
    has an image of every micro-batch if it has one of the batch.
    """
    needed = -(-size * grad_accum_steps // batch_size)
    return max(1, min(needed, size // processes))


def micro_batch_size(batch_size: int, grad_accum_steps: int) -> int:
    """Images of the largest micro-batch: what evaluation takes at a time, too."""
    return -(-batch_size // grad_accum_steps)


def weighed(loss: Tensor, share: float) -> Tensor:
    """A mean over a part of a batch, `share` of its images, as its term in the mean over the whole batch."""
    return loss if share == 1 else loss * share


def micro_batches(batch: Sequence[Tensor], count: int) -> Iterator[tuple[list[Tensor], float]]:
    """`count` parts of a batch [N, ...], of sizes that differ by one at most, and their shares of N."""
    parts = zip(*(x.tensor_split(count) for x in batch), strict=True)
    for part in parts:
        yield list(part), len(part[0]) / len(batch[0])
