# mypy: ignore-errors
"""Forward kernels. A tensor of N images is a matrix: a row per pixel, its channels side by side.

Arguments that kernels share:
    M, W: rows (pixels of all images) and mixed channels C/K of the output.
    OH, OW: height and width of an output image.
    mean, invstd, gamma, beta: [norms, W] of all BatchNorms of a cell.
    table: int32 [rows, 4], the cell's wiring; see layout.py for what the rows say.
    ACC: the dtype of all arithmetic; values are stored as whatever the pointer says.
    TILE, BW: elements and channels of a tile.
"""

import triton
import triton.language as tl

from rfdarts_fast.ops.triton.tuning import tuned, untuned


@triton.jit
def tile_rows(index, M, OH, OW, BM: tl.constexpr):
    """Rows of a tile, which of them exist, and their image, y and x."""
    rows = index * BM + tl.arange(0, BM)
    n = rows // (OH * OW)
    rest = rows % (OH * OW)
    return rows, rows < M, n, rest // OW, rest % OW


@triton.jit
def load_row(matrix, row, W, cols, default, ACC: tl.constexpr):
    """Channels of one row of a [norms, W] matrix; `default` where there is no such row."""
    return tl.load(matrix + row * W + cols, mask=cols < tl.where(row >= 0, W, 0), other=default).to(ACC)


@triton.jit
def divide(a, b, ACC: tl.constexpr):
    """a / b, rounded correctly; in float32 `/` is an approximation."""
    if tl.float64 == ACC:
        return a / b
    else:
        a, b = tl.broadcast(a, b)
        return tl.div_rn(a, b)


@untuned
def depthwise_kernel(
    x, weights, out, table, first, mean, invstd, gamma, beta, x_group, x_row, M, W, OH, OW, branches,
    KERNEL: tl.constexpr, DILATION: tl.constexpr, STRIDE: tl.constexpr, NORM: tl.constexpr, NB: tl.constexpr,
    ACC: tl.constexpr, TILE: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """out [groups * branches, M, W]: depthwise convolutions of relu(x), or of relu(BatchNorm(x)) with NORM.

    Each group of `branches` convolutions reads one x, x_group elements after that of the group before, so
    that all edges that leave a state share its reads. weights [groups * branches, KERNEL^2, W]; rows of the
    table from `first` on: the BatchNorm of each group.
    """
    BM: tl.constexpr = TILE // (NB * BW)
    PAD: tl.constexpr = DILATION * (KERNEL - 1) // 2
    rows, exist, n, oy, ox = tile_rows(tl.program_id(0), M, OH, OW, BM)
    cols = tl.program_id(1) * BW + tl.arange(0, BW)
    group = tl.program_id(2)
    branch = tl.arange(0, NB)
    own = (branch < branches)[:, None] & (cols < W)[None, :]
    if NORM:
        norm = tl.load(table + 4 * (first + group) + 1)
        scale = load_row(invstd, norm, W, cols, 1.0, ACC) * load_row(gamma, norm, W, cols, 1.0, ACC)
        center = load_row(mean, norm, W, cols, 0.0, ACC)
        shift = load_row(beta, norm, W, cols, 0.0, ACC)
    IH = OH * STRIDE
    IW = OW * STRIDE
    y = oy * STRIDE - PAD
    left = ox * STRIDE - PAD
    corner = x + tl.cast(group, tl.int64) * x_group
    corner = corner + ((n * IH + y) * IW + left)[:, None] * x_row + cols[None, :]
    kernels = weights + ((group * branches + branch) * (KERNEL * KERNEL * W))[:, None] + cols[None, :]
    total = tl.zeros((BM, NB, BW), ACC)
    # a row of taps at a time: all at once would not fit into the registers
    for i in range(KERNEL):
        iy = y + i * DILATION
        in_image = exist & (iy >= 0) & (iy < IH)
        for j in tl.static_range(KERNEL):
            ix = left + j * DILATION
            mask = (in_image & (ix >= 0) & (ix < IW))[:, None] & (cols < W)[None, :]
            value = tl.load(corner + j * DILATION * x_row, mask=mask, other=0.0).to(ACC)
            if NORM:
                value = (value - center[None, :]) * scale[None, :] + shift[None, :]
                # the padding is one of zeros after the ReLU
                value = tl.where(mask & ~(value < 0), value, 0.0)
            else:
                # not tl.maximum: a NaN has to come through
                value = tl.where(value < 0, 0.0, value)
            weight = tl.load(kernels + j * W, mask=own, other=0.0).to(ACC)
            total += value[:, None, :] * weight[None, :, :]
        corner += DILATION * IW * x_row
        kernels += KERNEL * W
    size = tl.cast(M, tl.int64) * W
    target = out + (group * branches + branch)[None, :, None] * size
    target += rows[:, None, None] * W + cols[None, None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=exist[:, None, None] & own[None, :, :])


@untuned
def pools_kernel(
    x, y, places, x_row, M, W, OH, OW,
    STRIDE: tl.constexpr, MAX: tl.constexpr, AVERAGE: tl.constexpr,
    ACC: tl.constexpr, TILE: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """y [MAX + AVERAGE, M, W]: 3x3 max pool and average pool of x, the latter without its padding; places
    uint8 [M, W]: which of the nine is the maximum, the first of equals."""
    BM: tl.constexpr = TILE // BW
    rows, exist, n, oy, ox = tile_rows(tl.program_id(0), M, OH, OW, BM)
    cols = tl.program_id(1) * BW + tl.arange(0, BW)
    largest = tl.full((BM, BW), float("-inf"), ACC)
    place = tl.zeros((BM, BW), tl.int32)
    total = tl.zeros((BM, BW), ACC)
    count = tl.zeros((BM,), tl.int32)
    IH = OH * STRIDE
    IW = OW * STRIDE
    center = x + ((n * IH + oy * STRIDE) * IW + ox * STRIDE)[:, None] * x_row + cols[None, :]
    for i in tl.static_range(3):
        iy = oy * STRIDE + (i - 1)
        in_image = exist & (iy >= 0) & (iy < IH)
        for j in tl.static_range(3):
            ix = ox * STRIDE + (j - 1)
            inside = in_image & (ix >= 0) & (ix < IW)
            mask = inside[:, None] & (cols < W)[None, :]
            value = tl.load(center + ((i - 1) * IW + (j - 1)) * x_row, mask=mask, other=0.0).to(ACC)
            total += value
            count += inside.to(tl.int32)
            larger = mask & ((value > largest) | (value != value))
            largest = tl.where(larger, value, largest)
            place = tl.where(larger, i * 3 + j, place)
    mask = exist[:, None] & (cols < W)[None, :]
    at = rows[:, None] * W + cols[None, :]
    if MAX:
        tl.store(y + at, largest.to(y.dtype.element_ty), mask=mask)
        tl.store(places + at, place.to(tl.uint8), mask=mask)
        y += tl.cast(M, tl.int64) * W
    if AVERAGE:
        average = divide(total, tl.maximum(count, 1).to(ACC)[:, None], ACC)
        tl.store(y + at, average.to(y.dtype.element_ty), mask=mask)


@untuned
def statistics_kernel(
    y, partial, slot, M, W, rows_each, parts,
    ACC: tl.constexpr, TILE: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """partial [slots, parts, 2, W]: mean, and sum of squared distances from it, of each part's rows of each
    slot from `slot` on; blocks merged by the rule of Chan, Golub and LeVeque (1983)."""
    BM: tl.constexpr = TILE // BW
    part = tl.program_id(1)
    cols = tl.program_id(2) * BW + tl.arange(0, BW)
    y += (tl.cast(slot, tl.int64) + tl.program_id(0)) * M * W
    start = part * rows_each
    stop = tl.minimum(start + rows_each, M)
    mean = tl.zeros((BW,), ACC)
    squares = tl.zeros((BW,), ACC)
    for row in range(start, stop, BM):
        rows = row + tl.arange(0, BM)
        mask = (rows < stop)[:, None] & (cols < W)[None, :]
        value = tl.load(y + rows[:, None] * W + cols[None, :], mask=mask, other=0.0).to(ACC)
        count = tl.cast(tl.minimum(stop - row, BM), ACC)
        before = tl.cast(row - start, ACC)
        own_mean = tl.sum(value, 0) / count
        distance = tl.where(mask, value - own_mean[None, :], 0.0)
        delta = own_mean - mean
        mean += delta * (count / (before + count))
        squares += tl.sum(distance * distance, 0) + delta * delta * (before * count / (before + count))
    target = partial + ((tl.program_id(0) * parts + part) * 2) * W + cols
    tl.store(target, mean, mask=cols < W)
    tl.store(target + W, squares, mask=cols < W)


@untuned
def moments_kernel(
    partial, mean, variance, invstd, table, first, slot, M, W, rows_each, parts,
    EPS: tl.constexpr, ACC: tl.constexpr, TILE: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """mean, variance (biased) and 1 / sqrt(variance + EPS) of the BatchNorms in the rows of the table from
    `first` on, from the partial sums of the slots from `slot` on."""
    BM: tl.constexpr = TILE // BW
    own = tl.load(table + 4 * (first + tl.program_id(0))) - slot
    norm = tl.load(table + 4 * (first + tl.program_id(0)) + 1)
    cols = tl.program_id(1) * BW + tl.arange(0, BW)
    partial += own * parts * 2 * W
    total = tl.zeros((BW,), ACC)
    for block in range(0, parts, BM):
        part = block + tl.arange(0, BM)
        mask = (part < parts)[:, None] & (cols < W)[None, :]
        count = tl.minimum(rows_each, M - part * rows_each).to(ACC)
        value = tl.load(partial + part[:, None] * (2 * W) + cols[None, :], mask=mask, other=0.0)
        total += tl.sum(tl.where(mask, value * count[:, None], 0.0), 0)
    center = total / tl.cast(M, ACC)
    squares = tl.zeros((BW,), ACC)
    for block in range(0, parts, BM):
        part = block + tl.arange(0, BM)
        mask = (part < parts)[:, None] & (cols < W)[None, :]
        count = tl.minimum(rows_each, M - part * rows_each).to(ACC)
        place = partial + part[:, None] * (2 * W) + cols[None, :]
        distance = tl.load(place, mask=mask, other=0.0) - center[None, :]
        value = tl.load(place + W, mask=mask, other=0.0) + distance * distance * count[:, None]
        squares += tl.sum(tl.where(mask, value, 0.0), 0)
    value = squares / tl.cast(M, ACC)
    target = norm * W + cols
    tl.store(mean + target, center, mask=cols < W)
    tl.store(variance + target, value, mask=cols < W)
    root = tl.sqrt(value + EPS) if tl.float64 == ACC else tl.sqrt_rn(value + EPS)
    tl.store(invstd + target, divide(1.0 + 0.0 * root, root, ACC), mask=cols < W)


@triton.jit
def load_bypass(
    states, source, rows, exist, n, oy, ox, cols, M, W, OH, OW, nodes_at, node_step, node_row,
    INPUTS: tl.constexpr, STRIDE: tl.constexpr, K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """[rows, channels, K]: at [.., c, g] channel g * W + c of a state, 2x2 max-pooled where its edge has
    stride 2; 0 for g = 0, the mixed channels."""
    g = tl.arange(0, K)
    mask = exist[:, None, None] & (cols < W)[None, :, None] & (g > 0)[None, None, :]
    channel = g[None, None, :] * W + cols[None, :, None]
    x, row = state_of(states, source, M, W, nodes_at, node_step, node_row, INPUTS, STRIDE, K)
    if STRIDE == 1:
        value = tl.load(x + rows[:, None, None] * row + channel, mask=mask, other=0.0).to(ACC)
    else:
        value = tl.load(
            x + pixel(source, rows, n, oy, ox, OH, OW, 0, INPUTS)[:, None, None] * row + channel,
            mask=mask, other=0.0,
        ).to(ACC)  # fmt: skip
        for q in tl.static_range(1, 4):
            at = pixel(source, rows, n, oy, ox, OH, OW, q, INPUTS)
            next_value = tl.load(x + at[:, None, None] * row + channel, mask=mask, other=0.0).to(ACC)
            value = tl.where((next_value > value) | (next_value != next_value), next_value, value)
    return value


@triton.jit
def pixel(source, rows, n, oy, ox, OH, OW, q: tl.constexpr, INPUTS: tl.constexpr):
    """In a reduction cell, the row of pixel q of the 2x2 window in an input; a node has the output's size."""
    in_window = (n * (2 * OH) + 2 * oy + q // 2) * (2 * OW) + 2 * ox + q % 2
    return tl.where(source < INPUTS, in_window, rows)


@triton.jit
def state_of(
    states, source, M, W, nodes_at, node_step, node_row,
    INPUTS: tl.constexpr, STRIDE: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Where a state lies: inputs one after the other, then the nodes; and the distance of its rows."""
    size = tl.cast(M, tl.int64) * (STRIDE * STRIDE) * W * K
    node = tl.cast(nodes_at, tl.int64) + tl.cast(node_step, tl.int64) * (source - INPUTS)
    at = tl.where(source < INPUTS, size * source, node)
    return states + at, tl.where(source < INPUTS, W * K, node_row)


@tuned("STRIDE", "K")
def node_kernel(
    states, y, out, table, first_term, last_term, first_edge, last_edge, mix, edge_weights, mean, invstd,
    gamma, beta, M, W, OH, OW, primitives, nodes_at, node_step, node_row,
    INPUTS: tl.constexpr, STRIDE: tl.constexpr, K: tl.constexpr, ACC: tl.constexpr, TILE: tl.constexpr,
    BW: tl.constexpr,
):  # fmt: skip
    """out: a node's state, the sum over its incoming edges of their weighted, normalised branches, identities
    and, with partial channels, bypassed channels, written in their shuffled places.

    Its terms and edges are the rows of the table from `first` to `last`.
    """
    BM: tl.constexpr = TILE // (BW * K)
    rows, exist, n, oy, ox = tile_rows(tl.program_id(0), M, OH, OW, BM)
    cols = tl.program_id(1) * BW + tl.arange(0, BW)
    mask = exist[:, None] & (cols < W)[None, :]
    at = rows[:, None] * W + cols[None, :]
    size = tl.cast(M, tl.int64) * W
    total = tl.zeros((BM, BW), ACC)
    for term in range(first_term, last_term):
        slot = tl.load(table + 4 * term)
        norm = tl.load(table + 4 * term + 1)
        edge = tl.load(table + 4 * term + 2)
        weight = tl.load(mix + edge * primitives + tl.load(table + 4 * term + 3)).to(ACC)
        weight *= tl.load(edge_weights + edge).to(ACC)
        scale = load_row(invstd, norm, W, cols, 1.0, ACC) * load_row(gamma, norm, W, cols, 1.0, ACC)
        center = load_row(mean, norm, W, cols, 0.0, ACC)
        shift = load_row(beta, norm, W, cols, 0.0, ACC)
        value = tl.load(y + slot * size + at, mask=mask, other=0.0).to(ACC)
        total += weight * ((value - center[None, :]) * scale[None, :] + shift[None, :])
    if K > 1:
        bypass = tl.zeros((BM, BW, K), ACC)
    for place in range(first_edge, last_edge):
        source = tl.load(table + 4 * place)
        edge = tl.load(table + 4 * place + 1)
        identity = tl.load(table + 4 * place + 2)
        edge_weight = tl.load(edge_weights + edge).to(ACC)
        weight = tl.load(mix + edge * primitives + identity, mask=identity >= 0, other=0.0).to(ACC)
        x, row = state_of(states, source, M, W, nodes_at, node_step, node_row, INPUTS, STRIDE, K)
        where = rows[:, None] * row + cols[None, :]
        taken = (rows < tl.where(identity >= 0, M, 0))[:, None] & (cols < W)[None, :]
        value = tl.load(x + where, mask=taken, other=0.0).to(ACC)
        total += edge_weight * weight * value
        if K > 1:
            bypass += edge_weight * load_bypass(
                states, source, rows, exist, n, oy, ox, cols, M, W, OH, OW, nodes_at, node_step, node_row,
                INPUTS, STRIDE, K, ACC,
            )  # fmt: skip
    if K == 1:
        tl.store(out + rows[:, None] * node_row + cols[None, :], total.to(out.dtype.element_ty), mask=mask)
    else:
        g = tl.arange(0, K)[None, None, :]
        target = out + rows[:, None, None] * node_row + cols[None, :, None] * K + g
        value = tl.where(g == 0, total[:, :, None], bypass)
        tl.store(target, value.to(out.dtype.element_ty), mask=mask[:, :, None])
