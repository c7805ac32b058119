"""Multiply-adds of a network."""

from __future__ import annotations

import torch
from torch import nn

CONVENTION = "multiply-adds of convolutions and linear layers for one image; no auxiliary head"
"""The meaning of `multiply_adds`; papers differ by some per cent."""


def multiply_adds(network: nn.Module, image_size: int) -> int:
    """Multiply-adds as in CONVENTION of a network on the meta device, so that nothing is computed."""
    # it loads triton, where that is installed
    from torch.utils.flop_counter import FlopCounterMode

    network.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 3, image_size, image_size, device="meta"))
    # the library counts a multiply-add as two operations
    return counter.get_total_flops() // 2
