# mypy: ignore-errors
"""Kernels of NOR_CONV, the ordinary convolutions of NAS-Bench-201; for what the arguments mean see
arguments.py.

A convolution is a product of matrices, for 16 bits on tensor cores: of pixels times (taps, inputs), which is
read from the image tap by tap and never made, and the weights. The outputs of all convolutions of one kernel
size that leave a state lie side by side, so that they share its reads.
    BM, BN: pixels and outputs of a tile; BK: inputs that are added up at once.
"""

import triton
import triton.language as tl

from rfdarts_fast.ops.triton.arguments import (
    SIDE,
    add_to_moments,
    block_of,
    group_at,
    pixel_of,
    rows_of,
    slot_size,
)
from rfdarts_fast.ops.triton.tuning import interpreted, tuned

INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def operand(value, ACC: tl.constexpr):
    """`value` as tl.dot takes it: the interpreter would multiply the bits of bfloat16."""
    if INTERPRETED:
        return value.to(ACC)
    else:
        return value


@triton.jit
def add_convolution(
    total, x, x_row, weights, columns, rows, exist, cols, sizes,
    KERNEL: tl.constexpr, RELU: tl.constexpr, ACC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """`total` [rows, cols] plus the convolution of x, or with RELU of relu(x); weights [KERNEL^2, C,
    columns]."""
    _, C, OH, OW = sizes
    PAD: tl.constexpr = KERNEL // 2
    _, oy, ox = pixel_of(rows, OH, OW)
    TAPS: tl.constexpr = KERNEL * KERNEL
    # one loop of a length that is not known: unrolled, values would not fit into the registers
    for step in range(TAPS * tl.cdiv(C, BK)):
        inputs = step // TAPS * BK + tl.arange(0, BK)
        tap = step % TAPS
        i = tap // KERNEL - PAD
        j = tap % KERNEL - PAD
        inside = exist & (oy + i >= 0) & (oy + i < OH) & (ox + j >= 0) & (ox + j < OW)
        at = ((rows + i * OW + j) * x_row)[:, None] + inputs[None, :]
        value = tl.load(x + at, mask=inside[:, None] & (inputs < C)[None, :], other=0.0)
        value = operand(value, ACC)
        if RELU:
            # not tl.maximum: a NaN has to come through
            value = tl.where(value < 0, 0.0, value)
        at = ((tap * C + inputs) * columns)[:, None] + cols[None, :]
        mask = (inputs < C)[:, None] & (cols < columns)[None, :]
        weight = operand(tl.load(weights + at, mask=mask, other=0.0), ACC)
        # in float32 no TF32
        total = tl.dot(value, weight, total, input_precision="ieee")
    return total


@tuned("KERNEL", "BN")
def nor_conv_kernel(
    x, weights, y, partial, branches, sizes, parts,
    KERNEL: tl.constexpr, STATISTICS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ACC: tl.constexpr, TILE: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """y [branches, M, C]: convolutions of relu(x); with STATISTICS their means and squared distances,
    partial [branches, parts, 2, C], as `statistics_kernel` makes them. weights [KERNEL^2, C, branches * C].

    A program has one part's rows: the number of sums does not depend on the tile.
    """
    M, C, _, _ = sizes
    BM: tl.constexpr = TILE // SIDE
    columns = branches * C
    cols, part = block_of(0, BN), tl.program_id(1)
    branch, channel = cols // C, cols % C
    y += (branch * slot_size(sizes) + channel)[None, :]
    start, stop = rows_of(part, parts, M)
    mean = tl.zeros((BN,), ACC)
    squares = tl.zeros((BN,), ACC)
    for row in range(start, stop, BM):
        rows = row + tl.arange(0, BM)
        exist = rows < stop
        total = add_convolution(
            tl.zeros((BM, BN), ACC), x.data, x.row, weights, columns, rows, exist, cols, sizes,
            KERNEL, True, ACC, BK,
        )  # fmt: skip
        mask = exist[:, None] & (cols < columns)[None, :]
        stored = total.to(y.dtype.element_ty)
        tl.store(y + rows[:, None] * C, stored, mask=mask)
        if STATISTICS:
            # of what a BatchNorm reads
            mean, squares = add_to_moments(mean, squares, stored.to(ACC), mask, row, start, stop)
    if STATISTICS:
        target = partial + (branch * parts.count + part) * (2 * C) + channel
        tl.store(target, mean, mask=cols < columns)
        tl.store(target + C, squares, mask=cols < columns)


@tuned("KERNELS", "BN")
def nor_conv_backward_kernel(
    grads, weights, out, groups, sizes,
    KERNELS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr, TILE: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """out [M, C]: the sum of what all convolutions' output gradients grads [convolutions, M, C] send to
    relu(x). weights: of each group [convolutions, KERNEL^2, out, in], taps turned round; KERNELS: its kernel
    size."""
    M, C, _, _ = sizes
    BM: tl.constexpr = TILE // SIDE
    rows, cols = block_of(0, BM), block_of(1, BN)
    exist = rows < M
    total = tl.zeros((BM, BN), ACC)
    for k in tl.static_range(len(KERNELS)):
        group = group_at(groups.table, groups.first + k)
        taps = weights + group.weight
        for branch in range(group.first, group.last):
            total = add_convolution(
                total, grads + branch * slot_size(sizes), C, taps, C, rows, exist, cols, sizes,
                KERNELS[k], False, ACC, BK,
            )  # fmt: skip
            taps += KERNELS[k] * KERNELS[k] * C * C
    mask = exist[:, None] & (cols < C)[None, :]
    tl.store(out + rows[:, None] * C + cols[None, :], total.to(out.dtype.element_ty), mask=mask)
