"""Compilation and launch of kernels: tile sizes, autotuning, the order of sums."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from triton import knobs

from rfdarts_fast.ops.triton.arguments import SIDE, Parts

# elements of a tile, warps: at most eight elements a thread, more would not fit into its registers
TILE, WARPS = 1024, 4
TILES = ((TILE, WARPS), (2048, 8))
# sums over pixels are split into at most PARTS parts of a multiple of CHUNK rows each
CHUNK = 256
PARTS = 256
# channels of a tile
WIDEST = 64
# the same of products, which sum over their outputs: a program for each part, short enough for many programs
PRODUCT_CHUNK = 64
PRODUCT_PARTS = 512
# bytes of outputs of a pixel in a product's tile, and of inputs that are added up at once: more, and values
# would not fit into the registers
OUTPUTS, INPUTS = 128, 64
# options about registers by kernel and some of its constants, where level 0 spills eight bytes of a variant;
# at level 5 other depthwise convolutions would spill, and nodes
REGISTERS: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
    ("branch_gradient_kernel", {}, {"ptx_options": "--register-usage-level=5"}),
    ("depthwise_kernel", {"NB": 2, "STRIDE": 1}, {"ptx_options": "--register-usage-level=5"}),
    ("node_kernel", {"STRIDE": 2}, {"maxnreg": 255}),
)


def interpreted() -> bool:
    """True if kernels run on the CPU, statement by statement (TRITON_INTERPRET=1)."""
    return bool(knobs.runtime.interpret)


def tuned(*key: str) -> Callable[[Callable], Any]:
    """A kernel whose TILE and warps are tuned on a GPU, anew for every value of `sizes` and of the arguments
    in `key`; the result is kept in Triton's cache folder."""
    cached = (
        {"cache_results": True} if "cache_results" in inspect.signature(triton.autotune).parameters else {}
    )
    configs = [triton.Config({"TILE": tile}, num_warps=warps) for tile, warps in TILES]
    return lambda function: triton.autotune(configs, ["sizes", *key], **cached)(triton.jit(function))


def untuned(function: Callable) -> Any:
    """A kernel that reads its input once and does little else, so that tuning would take longer than it
    gains, or one whose larger tile spills registers."""
    return triton.autotune([triton.Config({"TILE": TILE}, num_warps=WARPS)], [])(triton.jit(function))


def registers(kernel: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Options of ptxas about registers. Left alone, at level 5, it spills a few so that one more block fits
    on a multiprocessor: not at level 0, nor where a limit is given. A limit has it use more of them, so that
    only those get one that would spill without: float64, products, some of `REGISTERS`."""
    if torch.version.hip is not None:
        return {}
    if "BN" in arguments or arguments["ACC"] == tl.float64:
        return {"maxnreg": 255}
    for name, constants, options in REGISTERS:
        if kernel.fn.__name__ == name and constants.items() <= arguments.items():
            return options
    return {"ptx_options": "--register-usage-level=0"}


def launch(kernel: Any, grid: Callable[[dict[str, Any]], tuple[int, ...]], **arguments: Any) -> None:
    """Runs a kernel; `grid` gets its arguments, TILE among them.

    Another tile adds in another order, so that torch.use_deterministic_algorithms rules out tuning.
    """
    # explicit, as the defaults of Triton's versions differ
    arguments["enable_fp_fusion"] = True
    if not interpreted():
        arguments |= registers(kernel, arguments)
    if interpreted() or torch.are_deterministic_algorithms_enabled():
        kernel.fn[grid](**arguments, TILE=TILE, num_warps=WARPS)
    else:
        kernel[grid](**arguments)


def parts(rows: int) -> Parts:
    """The parts of a sum over so many pixels."""
    return _parts(rows, CHUNK, PARTS)


def product_parts(rows: int) -> Parts:
    """The parts of so many pixels in products that sum over their outputs."""
    return _parts(rows, PRODUCT_CHUNK, PRODUCT_PARTS)


def _parts(rows: int, chunk: int, most: int) -> Parts:
    size = chunk * triton.cdiv(rows, chunk * most)
    return Parts(size, triton.cdiv(rows, size))


def channel_block(channels: int) -> int:
    """Channels of a tile: a power of two."""
    return min(triton.next_power_of_2(channels), WIDEST)


def product_blocks(inputs: int, outputs: int, item: int) -> dict[str, int]:
    """Outputs of a product's tile, and inputs that are added up at once, for numbers of `item` bytes."""
    outputs = min(channel_block(outputs), OUTPUTS // item)
    inputs = min(triton.next_power_of_2(inputs), INPUTS // item)
    return {"BN": max(outputs, SIDE.value), "BK": max(inputs, SIDE.value)}
