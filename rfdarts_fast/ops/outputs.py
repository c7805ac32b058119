"""Outputs of an op that its backward reads again, although users may change them in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Outputs:
    """Tensors that go out to the user and are kept for the backward, to be taken once.

    Autograd's own saved tensors raise an error where one was changed; of these the backward can see that it
    has to compute them again.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        # in inference mode there are no versions, and no backward
        kept = [] if torch.is_inference_mode_enabled() else tensors
        # an output itself would keep the graph alive that keeps it; an alias shares its count of changes
        self._tensors: list[Tensor] | None = [tensor.detach() for tensor in kept]
        self._versions = [tensor._version for tensor in kept]

    def take(self) -> list[Tensor] | None:
        """The tensors, or None if they were taken before or one was changed since."""
        tensors, self._tensors = self._tensors, None
        if tensors is None or [tensor._version for tensor in tensors] != self._versions:
            return None
        return tensors
