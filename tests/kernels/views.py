"""Tensors of the same values in other layouts."""

import torch
from torch import Tensor


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def wider(first: int, rows: int = 1, memory_format: torch.memory_format = torch.channels_last):
    """Makes x the channels from `first` on, every `rows`-th row and the inner columns of a tensor of NaNs."""

    def view(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        wide = x.new_full((n, first + c + 8, rows * h + 2, w + 3), torch.nan).contiguous(
            memory_format=memory_format
        )
        place = (slice(None), slice(first, first + c), slice(1, 1 + rows * h, rows), slice(1, 1 + w))
        wide[place] = x
        return wide[place]

    return view


def expanded(ones: Tensor) -> Tensor:
    """One number in the shape of many, as the gradient of a sum is."""
    return ones.new_ones(()).expand_as(ones)


# views that vectors can be loaded from, or that are copied
ALIGNED = (
    channels_last,
    wider(8),
    wider(8, rows=2),
    wider(3, memory_format=torch.contiguous_format),
    wider(3, 2, torch.contiguous_format),
)
not_aligned = wider(3)
# of gradients that are ones
GRADIENT_VIEWS = (channels_last, expanded, not_aligned)
