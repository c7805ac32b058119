# mypy: ignore-errors
"""Forward kernels; for what the arguments mean see arguments.py."""

import triton.language as tl

from rfdarts_fast.ops.triton.arguments import (
    add_to_moments,
    block_of,
    divide,
    edge_at,
    load_bypass,
    load_norm,
    pixel_of,
    rows_of,
    slot_size,
    state_of,
    term_at,
    term_weight,
)
from rfdarts_fast.ops.triton.tuning import tuned, untuned


@untuned
def depthwise_kernel(
    x, x_group, weights, out, terms, norms, sizes, branches,
    KERNEL: tl.constexpr, DILATION: tl.constexpr, STRIDE: tl.constexpr, NORM: tl.constexpr, NB: tl.constexpr,
    ACC: tl.constexpr, TILE: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """out [groups * branches, M, C]: depthwise convolutions of relu(x), or of relu(BatchNorm(x)) with NORM.

    Each group of `branches` convolutions reads one x, x_group elements after that of the group before, so
    that all edges that leave a state share its reads. weights [groups * branches, KERNEL^2, C]; terms: the
    BatchNorm of each group.
    """
    M, C, OH, OW = sizes
    BM: tl.constexpr = TILE // (NB * BC)
    PAD: tl.constexpr = DILATION * (KERNEL - 1) // 2
    rows = block_of(0, BM)
    n, oy, ox = pixel_of(rows, OH, OW)
    exist = rows < M
    cols, group = block_of(1, BC), tl.program_id(2)
    branch = tl.arange(0, NB)
    own = (branch < branches)[:, None] & (cols < C)[None, :]
    if NORM:
        mean, scale, shift = load_norm(norms, term_at(terms.table, terms.first + group).norm, C, cols, ACC)
    IH = OH * STRIDE
    IW = OW * STRIDE
    top = oy * STRIDE - PAD
    left = ox * STRIDE - PAD
    corner = x.data + tl.cast(group, tl.int64) * x_group
    corner = corner + ((n * IH + top) * IW + left)[:, None] * x.row + cols[None, :]
    kernels = weights + ((group * branches + branch) * (KERNEL * KERNEL * C))[:, None] + cols[None, :]
    total = tl.zeros((BM, NB, BC), ACC)
    # a row of taps at a time: all at once would not fit into the registers
    for i in range(KERNEL):
        iy = top + i * DILATION
        in_image = exist & (iy >= 0) & (iy < IH)
        for j in tl.static_range(KERNEL):
            ix = left + j * DILATION
            mask = (in_image & (ix >= 0) & (ix < IW))[:, None] & (cols < C)[None, :]
            value = tl.load(corner + j * DILATION * x.row, mask=mask, other=0.0).to(ACC)
            if NORM:
                value = (value - mean[None, :]) * scale[None, :] + shift[None, :]
                # the padding is one of zeros after the ReLU
                value = tl.where(mask & ~(value < 0), value, 0.0)
            else:
                # not tl.maximum: a NaN has to come through
                value = tl.where(value < 0, 0.0, value)
            weight = tl.load(kernels + j * C, mask=own, other=0.0).to(ACC)
            total += value[:, None, :] * weight[None, :, :]
        corner += DILATION * IW * x.row
        kernels += KERNEL * C
    size = slot_size(sizes)
    target = out + (group * branches + branch)[None, :, None] * size
    target += rows[:, None, None] * C + cols[None, None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=exist[:, None, None] & own[None, :, :])


@untuned
def pools_kernel(
    x, y, argmax, sizes, STRIDE: tl.constexpr, MAX: tl.constexpr, AVERAGE: tl.constexpr,
    ACC: tl.constexpr, TILE: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """y [MAX + AVERAGE, M, C]: 3x3 max pool and average pool of x, the latter without its padding; argmax
    uint8 [M, C]: which of the nine is the maximum, the first of equals or the last NaN."""
    M, C, OH, OW = sizes
    BM: tl.constexpr = TILE // BC
    rows = block_of(0, BM)
    n, oy, ox = pixel_of(rows, OH, OW)
    exist = rows < M
    cols = block_of(1, BC)
    largest = tl.full((BM, BC), float("-inf"), ACC)
    # where all are lowest, the first one inside the image
    place = tl.zeros((BM, BC), tl.int32) + ((oy == 0) * 3 + (ox == 0)).to(tl.int32)[:, None]
    total = tl.zeros((BM, BC), ACC)
    count = tl.zeros((BM,), tl.int32)
    IH = OH * STRIDE
    IW = OW * STRIDE
    center = x.data + ((n * IH + oy * STRIDE) * IW + ox * STRIDE)[:, None] * x.row + cols[None, :]
    for i in tl.static_range(3):
        iy = oy * STRIDE + (i - 1)
        in_image = exist & (iy >= 0) & (iy < IH)
        for j in tl.static_range(3):
            ix = ox * STRIDE + (j - 1)
            inside = in_image & (ix >= 0) & (ix < IW)
            mask = inside[:, None] & (cols < C)[None, :]
            value = tl.load(center + ((i - 1) * IW + (j - 1)) * x.row, mask=mask, other=0.0).to(ACC)
            total += value
            count += inside.to(tl.int32)
            larger = mask & ((value > largest) | (value != value))
            largest = tl.where(larger, value, largest)
            place = tl.where(larger, i * 3 + j, place)
    mask = exist[:, None] & (cols < C)[None, :]
    at = rows[:, None] * C + cols[None, :]
    if MAX:
        tl.store(y + at, largest.to(y.dtype.element_ty), mask=mask)
        tl.store(argmax + at, place.to(tl.uint8), mask=mask)
        y += slot_size(sizes)
    if AVERAGE:
        average = divide(total, tl.maximum(count, 1).to(ACC)[:, None], ACC)
        tl.store(y + at, average.to(y.dtype.element_ty), mask=mask)


@untuned
def statistics_kernel(y, partial, sizes, parts, ACC: tl.constexpr, TILE: tl.constexpr, BC: tl.constexpr):
    """partial [slots, parts, 2, C]: mean, and sum of squared distances from it, of each part's rows of each
    slot of y."""
    M, C, _, _ = sizes
    BM: tl.constexpr = TILE // BC
    slot, part, cols = tl.program_id(0), tl.program_id(1), block_of(2, BC)
    y += tl.cast(slot, tl.int64) * M * C
    start, stop = rows_of(part, parts, M)
    mean = tl.zeros((BC,), ACC)
    squares = tl.zeros((BC,), ACC)
    for row in range(start, stop, BM):
        rows = row + tl.arange(0, BM)
        mask = (rows < stop)[:, None] & (cols < C)[None, :]
        value = tl.load(y + rows[:, None] * C + cols[None, :], mask=mask, other=0.0).to(ACC)
        mean, squares = add_to_moments(mean, squares, value, mask, row, start, stop)
    target = partial + ((slot * parts.count + part) * 2) * C + cols
    tl.store(target, mean, mask=cols < C)
    tl.store(target + C, squares, mask=cols < C)


@untuned
def moments_kernel(
    partial, mean, variance, rstd, terms, first_slot, sizes, parts,
    EPS: tl.constexpr, ACC: tl.constexpr, TILE: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """mean, variance (biased) and 1 / sqrt(variance + EPS) of the terms' BatchNorms, from the partial sums of
    the slots from `first_slot` on."""
    M, C, _, _ = sizes
    BM: tl.constexpr = TILE // BC
    term = term_at(terms.table, terms.first + tl.program_id(0))
    cols = block_of(1, BC)
    partial += (term.slot - first_slot) * parts.count * 2 * C
    # means are summed as distances from the first one
    first = tl.load(partial + cols, mask=cols < C, other=0.0)
    total = tl.zeros((BC,), ACC)
    for block in range(0, parts.count, BM):
        part = block + tl.arange(0, BM)
        mask = (part < parts.count)[:, None] & (cols < C)[None, :]
        count = tl.minimum(parts.rows, M - part * parts.rows).to(ACC)
        value = tl.load(partial + part[:, None] * (2 * C) + cols[None, :], mask=mask, other=0.0)
        total += tl.sum(tl.where(mask, (value - first[None, :]) * count[:, None], 0.0), 0)
    center = first + total / tl.cast(M, ACC)
    squares = tl.zeros((BC,), ACC)
    for block in range(0, parts.count, BM):
        part = block + tl.arange(0, BM)
        mask = (part < parts.count)[:, None] & (cols < C)[None, :]
        count = tl.minimum(parts.rows, M - part * parts.rows).to(ACC)
        place = partial + part[:, None] * (2 * C) + cols[None, :]
        distance = tl.load(place, mask=mask, other=0.0) - center[None, :]
        value = tl.load(place + C, mask=mask, other=0.0) + distance * distance * count[:, None]
        squares += tl.sum(tl.where(mask, value, 0.0), 0)
    value = squares / tl.cast(M, ACC)
    target = term.norm * C + cols
    tl.store(mean + target, center, mask=cols < C)
    tl.store(variance + target, value, mask=cols < C)
    root = tl.sqrt(value + EPS) if tl.float64 == ACC else tl.sqrt_rn(value + EPS)
    tl.store(rstd + target, divide(1.0 + 0.0 * root, root, ACC), mask=cols < C)


@tuned("STRIDE", "K")
def node_kernel(
    states, y, out, terms, edges, weights, norms, sizes,
    INPUTS: tl.constexpr, STRIDE: tl.constexpr, K: tl.constexpr, ACC: tl.constexpr, TILE: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """out: a node's state, the sum over its incoming edges of their weighted, normalised branches, identities
    and, with partial channels, bypassed channels, written in their shuffled places."""
    M, C, OH, OW = sizes
    BM: tl.constexpr = TILE // (BC * K)
    rows, cols = block_of(0, BM), block_of(1, BC)
    exist = rows < M
    mask = exist[:, None] & (cols < C)[None, :]
    at = rows[:, None] * C + cols[None, :]
    total = tl.zeros((BM, BC), ACC)
    for place in range(terms.first, terms.last):
        term = term_at(terms.table, place)
        weight = term_weight(weights, term.edge, term.primitive, ACC)
        mean, scale, shift = load_norm(norms, term.norm, C, cols, ACC)
        value = tl.load(y + term.slot * slot_size(sizes) + at, mask=mask, other=0.0).to(ACC)
        total += weight * ((value - mean[None, :]) * scale[None, :] + shift[None, :])
    if K > 1:
        pixel = pixel_of(rows, OH, OW)
        bypass = tl.zeros((BM, BC, K), ACC)
    for place in range(edges.first, edges.last):
        edge = edge_at(edges.table, place)
        x = state_of(states, edge.source, sizes, INPUTS, STRIDE, K)
        taken = (rows < tl.where(edge.identity >= 0, M, 0))[:, None] & (cols < C)[None, :]
        value = tl.load(x.data + rows[:, None] * x.row + cols[None, :], mask=taken, other=0.0).to(ACC)
        total += term_weight(weights, edge.index, edge.identity, ACC) * value
        if K > 1:
            bypass += tl.load(weights.edge_weights + edge.index).to(ACC) * load_bypass(
                states, edge.source, rows, exist, pixel, cols, sizes, INPUTS, STRIDE, K, ACC
            )
    if K == 1:
        target = out.data + rows[:, None] * out.row + cols[None, :]
        tl.store(target, total.to(out.data.dtype.element_ty), mask=mask)
    else:
        lanes = tl.arange(0, K)[None, None, :]
        target = out.data + rows[:, None, None] * out.row + cols[None, :, None] * K + lanes
        value = tl.where(lanes == 0, total[:, :, None], bypass)
        tl.store(target, value.to(out.data.dtype.element_ty), mask=mask[:, :, None])
