"""The least that a step computes and moves, and the most that this machine can do."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from rfdarts_fast.bench.variants import Method, is_nasbench201, make_network, search_cells

# times that a branch output is written or read in one step with the kernels (forward, backward)
_TOUCHED = {"inner": 5, "outer": 6, "single": 4}


def machine_roofs(device: str = "cpu") -> dict[str, float]:
    """GFLOP/s of a large float32 matrix product and GB/s (read + written) of a large copy, the best of
    several."""
    side = 1536 if device == "cpu" else 8192
    a, b = torch.randn(side, side, device=device), torch.randn(side, side, device=device)
    source = torch.randn(48 << 20, device=device)
    target = torch.empty_like(source)

    def best(function: Callable[[], object]) -> float:
        seconds = float("inf")
        for _ in range(7):
            start = time.perf_counter()
            function()
            if device != "cpu":
                torch.cuda.synchronize()
            seconds = min(seconds, time.perf_counter() - start)
        return seconds

    product, copy = best(lambda: torch.mm(a, b)), best(lambda: target.copy_(source))
    return {"gflops": 2 * side**3 / product / 1e9, "gbytes": 2 * source.numel() * 4 / copy / 1e9}


def step_counts(method: Method, batch: int, size: int, **shape: Any) -> dict[str, float]:
    """Floating-point operations and float32 bytes of the mixed ops in one step with the kernels.

    Counted are the convolutions (forward, and backward to their inputs, tap by tap) and the branch outputs;
    states, pools, bypass and preprocessing come on top.
    """
    network = make_network(method, **shape)
    channels, space = shape["channels"], shape["space"]
    if shape.get("stem") == "imagenet":
        size //= 8
    flops = moved = 0.0
    for cell in search_cells(network):
        if getattr(cell, "reduction", False):
            size //= 2
        # in NAS-Bench-201 residual blocks halve the image and double the channels
        side = size * channels // cell._ops[0].channels if is_nasbench201(space) else size
        pixels = batch * side * side
        for edge in cell._ops:
            width = edge.channels // edge.K
            for name in edge.primitives:
                if name.startswith(("sep_conv", "dil_conv")):
                    taps = int(name[-1]) ** 2
                    halves = 2 if name.startswith("sep") else 1
                    flops += 2 * 2 * halves * pixels * width * (taps + width)
                    touched = _TOUCHED["inner"] + _TOUCHED["outer"] if halves == 2 else _TOUCHED["single"]
                    moved += 4 * pixels * width * touched
                elif name.startswith("nor_conv"):
                    flops += 2 * 2 * pixels * width * width * int(name[-1]) ** 2
                    # outputs of 1x1 ones are made again instead of stored
                    moved += 4 * pixels * width * _TOUCHED["single"] * (name[-1] == "3")
                elif name == "skip_connect" and edge.stride == 2:
                    flops += 2 * 2 * pixels * width * width
                    moved += 4 * pixels * width * _TOUCHED["single"]
    return {"flops": flops, "bytes": moved}
