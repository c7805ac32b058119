"""Weights as they were, to notice that they are others now."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

# bytes of each tensor, and parts of all bytes one of which is compared in each call
_BEGINNING, PARTS = 64, 16
_version = attrgetter("_version")


class Snapshot:
    """Addresses, counts of changes and contents of tensors.

    Neither `tensor.data` nor a NumPy array counts its changes. On the CPU contents are therefore compared:
    the first bytes of each tensor in each call, and the whole of one tensor in 16. A change of whole tensors
    is noticed at once, one of a single number within 16 calls. On other devices the comparison would have to
    be waited for, and there is none.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._addresses, self._versions = _addresses(tensors), _versions(tensors)
        contents = _contents(tensors)
        parts = [[content[:_BEGINNING] for content in contents], *(contents[i::PARTS] for i in range(PARTS))]
        # memory, and what was in it
        self._parts = [(part, b"".join(part)) for part in parts if part]
        self._calls = 0

    def still_holds(self, tensors: Sequence[Tensor]) -> bool:
        """True if these are the tensors, with the same contents as far as this call looks."""
        if _addresses(tensors) != self._addresses or _versions(tensors) != self._versions:
            return False
        if not self._parts:
            return True
        self._calls = self._calls % (len(self._parts) - 1) + 1
        looked_at = self._parts[0], self._parts[self._calls]
        return all(b"".join(part) == content for part, content in looked_at)


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    # tensors of inference mode have none
    return [] if any(map(Tensor.is_inference, tensors[:1])) else [*map(_version, tensors)]


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    # tensors without data, for tracing, have no address
    address = id if any(isinstance(tensor, FakeTensor) for tensor in tensors[:1]) else Tensor.data_ptr
    return [*map(address, tensors)]


def _contents(tensors: Sequence[Tensor]) -> list[memoryview]:
    """The bytes of each tensor, as they are now at any time; none where they cannot be looked at."""
    contents = []
    for tensor in tensors:
        dense = any(
            tensor.is_contiguous(memory_format=layout)
            for layout in (torch.contiguous_format, torch.channels_last)
        )
        if tensor.device.type != "cpu" or isinstance(tensor, FakeTensor) or not dense:
            return []
        flat = tensor.detach().as_strided((tensor.numel(),), (1,), tensor.storage_offset())
        contents.append(flat.view(torch.uint8).numpy().data)
    return contents
