# mypy: ignore-errors
"""Backward kernels; for what the arguments mean see kernels_forward.py.

Formulas: with G the gradient of a node's state, v = w e the weight of a branch y on an edge, xhat = (y -
mean) invstd and sums over the M rows, the gradient of BatchNorm's beta is v sum G, of gamma v sum G xhat, of
v itself sum over channels of gamma sum G xhat + beta sum G, and that of y is A G + B (y - mean) + C with
A = v gamma invstd, B = -A invstd sum(G xhat) / M, C = -A sum(G) / M (B = C = 0 with running statistics).
"""

import triton
import triton.language as tl

from rfdarts_fast.ops.triton.kernels_forward import load_bypass, load_row, state_of, tile_rows
from rfdarts_fast.ops.triton.tuning import tuned, untuned


@untuned
def sums_kernel(
    g, y, partial, table, first, mean, M, W, rows_each, parts,
    ACC: tl.constexpr, TILE: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """partial [terms, parts, 2, W]: sums of g [M, W] and of g (y - mean) over each part's rows."""
    BM: tl.constexpr = TILE // BW
    term = tl.program_id(0)
    part = tl.program_id(1)
    cols = tl.program_id(2) * BW + tl.arange(0, BW)
    slot = tl.load(table + 4 * (first + term))
    norm = tl.load(table + 4 * (first + term) + 1)
    center = load_row(mean, norm, W, cols, 0.0, ACC)
    y += slot * (tl.cast(M, tl.int64) * W)
    start = part * rows_each
    stop = tl.minimum(start + rows_each, M)
    plain = tl.zeros((BW,), ACC)
    product = tl.zeros((BW,), ACC)
    for row in range(start, stop, BM):
        rows = row + tl.arange(0, BM)
        mask = (rows < stop)[:, None] & (cols < W)[None, :]
        at = rows[:, None] * W + cols[None, :]
        grad = tl.load(g + at, mask=mask, other=0.0).to(ACC)
        value = tl.load(y + at, mask=mask, other=0.0).to(ACC) - center[None, :]
        plain += tl.sum(grad, 0)
        product += tl.sum(tl.where(mask, grad * value, 0.0), 0)
    target = partial + ((term * parts + part) * 2) * W + cols
    tl.store(target, plain, mask=cols < W)
    tl.store(target + W, product, mask=cols < W)


@untuned
def edge_sums_kernel(
    g, states, partial, table, first, M, W, OH, OW, nodes_at, node_step, node_row, rows_each, parts,
    INPUTS: tl.constexpr, STRIDE: tl.constexpr, K: tl.constexpr, ACC: tl.constexpr, TILE: tl.constexpr,
    BW: tl.constexpr,
):  # fmt: skip
    """partial [channel blocks, parts, edges, 2]: sums of g x over the identity, and over bypassed channels,
    of each edge into a node; g [M, W * K] in the node's order of channels."""
    BM: tl.constexpr = TILE // (BW * K)
    place = tl.program_id(0)
    part = tl.program_id(1)
    cols = tl.program_id(2) * BW + tl.arange(0, BW)
    source = tl.load(table + 4 * (first + place))
    identity = tl.load(table + 4 * (first + place) + 2)
    x, row_step = state_of(states, source, M, W, nodes_at, node_step, node_row, INPUTS, STRIDE, K)
    start = part * rows_each
    stop = tl.minimum(start + rows_each, M)
    mixed = tl.zeros((BW,), ACC)
    bypassed = tl.zeros((BW,), ACC)
    for row in range(start, stop, BM):
        rows = row + tl.arange(0, BM)
        exist = rows < stop
        mask = exist[:, None] & (cols < W)[None, :]
        at = rows[:, None] * (W * K) + cols[None, :] * K
        taken = (rows < tl.where(identity >= 0, stop, 0))[:, None] & (cols < W)[None, :]
        grad = tl.load(g + at, mask=taken, other=0.0).to(ACC)
        value = tl.load(x + rows[:, None] * row_step + cols[None, :], mask=taken, other=0.0)
        mixed += tl.sum(grad * value.to(ACC), 0)
        if K > 1:
            n = rows // (OH * OW)
            rest = rows % (OH * OW)
            lanes = tl.arange(0, K)[None, None, :]
            around = tl.load(g + at[:, :, None] + lanes, mask=mask[:, :, None] & (lanes > 0), other=0.0)
            value = load_bypass(
                states, source, rows, exist, n, rest // OW, rest % OW, cols, M, W, OH, OW, nodes_at,
                node_step,
                node_row, INPUTS, STRIDE, K, ACC,
            )  # fmt: skip
            bypassed += tl.sum(tl.sum(around.to(ACC) * value, 2), 0)
    block = tl.program_id(2) * parts + part
    target = partial + (block * tl.num_programs(0) + place) * 2
    tl.store(target, tl.sum(mixed, 0))
    tl.store(target + 1, tl.sum(bypassed, 0))


@untuned
def coefficients_kernel(
    partial, coefficients, grad_gamma, grad_beta, grad_weight, table, first, mix, edge_weights, invstd, gamma,
    beta, M, W, norms, primitives, parts,
    WEIGHTED: tl.constexpr, TRAINING: tl.constexpr, ACC: tl.constexpr, TILE: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """From the partial sums of terms: A, B, C into coefficients [3, norms, W], the gradients of gamma and
    beta [norms, W], and with WEIGHTED that of v into grad_weight [edges, primitives]; otherwise v is 1."""
    BM: tl.constexpr = TILE // BW
    term = tl.program_id(0)
    row = table + 4 * (first + term)
    norm = tl.load(row + 1)
    weight = tl.full((1,), 1.0, ACC)
    if WEIGHTED:
        edge = tl.load(row + 2)
        place = edge * primitives + tl.load(row + 3)
        weight *= tl.load(mix + place).to(ACC) * tl.load(edge_weights + edge).to(ACC)
    partial += term * parts * 2 * W
    of_weight = tl.zeros((BW,), ACC)
    for block in range(0, W, BW):
        cols = block + tl.arange(0, BW)
        plain = tl.zeros((BW,), ACC)
        product = tl.zeros((BW,), ACC)
        for first_part in range(0, parts, BM):
            part = first_part + tl.arange(0, BM)
            mask = (part < parts)[:, None] & (cols < W)[None, :]
            at = partial + part[:, None] * (2 * W) + cols[None, :]
            plain += tl.sum(tl.load(at, mask=mask, other=0.0), 0)
            product += tl.sum(tl.load(at + W, mask=mask, other=0.0), 0)
        inverse = load_row(invstd, norm, W, cols, 1.0, ACC)
        scale = load_row(gamma, norm, W, cols, 1.0, ACC)
        product *= inverse
        of_weight += tl.where(
            cols < W, scale * product + load_row(beta, norm, W, cols, 0.0, ACC) * plain, 0.0
        )
        target = norm * W + cols
        mask = cols < tl.where(norm >= 0, W, 0)
        tl.store(grad_gamma + target, weight * product, mask=mask)
        tl.store(grad_beta + target, weight * plain, mask=mask)
        a = weight * scale * inverse
        tl.store(coefficients + target, a, mask=mask)
        if TRAINING:
            a = -a / tl.cast(M, ACC)
            tl.store(coefficients + norms * W + target, a * inverse * product, mask=mask)
            tl.store(coefficients + 2 * norms * W + target, a * plain, mask=mask)
        else:
            zero = tl.zeros((BW,), ACC)
            tl.store(coefficients + norms * W + target, zero, mask=mask)
            tl.store(coefficients + 2 * norms * W + target, zero, mask=mask)
    if WEIGHTED:
        tl.store(grad_weight + place, tl.sum(of_weight, 0))


@untuned
def branch_gradient_kernel(
    g, y, out, table, first, coefficients, mean, M, W, norms,
    ACC: tl.constexpr, TILE: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """out [programs, M, W]: the gradient at the input of a BatchNorm, A g + B (y - mean) + C, or the sum over
    the BatchNorms that share it. Program i has the rows of the table that row `first` + i names; g [.., M,
    W]."""
    BM: tl.constexpr = TILE // BW
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BW + tl.arange(0, BW)
    mask = (rows < M)[:, None] & (cols < W)[None, :]
    at = rows[:, None] * W + cols[None, :]
    size = tl.cast(M, tl.int64) * W
    range_of = table + 4 * (first + tl.program_id(2))
    total = tl.zeros((BM, BW), ACC)
    for place in range(tl.load(range_of), tl.load(range_of + 1)):
        slot = tl.load(table + 4 * place)
        norm = tl.load(table + 4 * place + 1)
        image = tl.load(table + 4 * place + 2)
        grad = tl.load(g + image * size + at, mask=mask, other=0.0).to(ACC)
        value = tl.load(y + slot * size + at, mask=mask, other=0.0).to(ACC)
        value -= load_row(mean, norm, W, cols, 0.0, ACC)[None, :]
        total += load_row(coefficients, norm, W, cols, 0.0, ACC)[None, :] * grad
        total += load_row(coefficients, norms + norm, W, cols, 0.0, ACC)[None, :] * value
        total += load_row(coefficients, 2 * norms + norm, W, cols, 0.0, ACC)[None, :]
    tl.store(out + tl.program_id(2) * size + at, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def depthwise_transposed(
    total, z, weights, exist, n, iy, ix, cols, W, OH, OW,
    KERNEL: tl.constexpr, DILATION: tl.constexpr, STRIDE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """`total` plus what a depthwise convolution's output gradient z [N, OH, OW, W] sends to its input."""
    PAD: tl.constexpr = DILATION * (KERNEL - 1) // 2
    # a row of taps at a time: all at once would not fit into the registers
    for i in range(KERNEL):
        ty = iy + (PAD - i * DILATION)
        in_image = exist & (ty >= 0) & (ty < OH * STRIDE)
        if STRIDE == 2:
            in_image = in_image & (ty % 2 == 0)
        row = z + ((n * OH + ty // STRIDE) * (OW * W))[:, None] + cols[None, :]
        for j in tl.static_range(KERNEL):
            tx = ix + (PAD - j * DILATION)
            inside = in_image & (tx >= 0) & (tx < OW * STRIDE)
            if STRIDE == 2:
                inside = inside & (tx % 2 == 0)
            mask = inside[:, None] & (cols < W)[None, :]
            value = tl.load(row + (tx // STRIDE * W)[:, None], mask=mask, other=0.0).to(ACC)
            weight = tl.load(weights + (i * KERNEL + j) * W + cols, mask=cols < W, other=0.0).to(ACC)
            total += value * weight[None, :]
    return total


@untuned
def inner_gradient_kernel(
    z, weights, y, out, partial, table, first, mean, invstd, gamma, beta, M, W, OH, OW, rows_each, parts,
    KERNEL: tl.constexpr, DILATION: tl.constexpr, ACC: tl.constexpr, TILE: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Through the second depthwise convolution of separable ones and the ReLU before it: out [branches, M, W]
    from z [branches, M, W]; partial [branches, parts, 2, W] as in `sums_kernel`, for the BatchNorm before."""
    BM: tl.constexpr = TILE // BW
    branch = tl.program_id(0)
    part = tl.program_id(1)
    cols = tl.program_id(2) * BW + tl.arange(0, BW)
    size = tl.cast(M, tl.int64) * W
    slot = tl.load(table + 4 * (first + branch))
    norm = tl.load(table + 4 * (first + branch) + 1)
    center = load_row(mean, norm, W, cols, 0.0, ACC)
    scale = load_row(invstd, norm, W, cols, 1.0, ACC) * load_row(gamma, norm, W, cols, 1.0, ACC)
    shift = load_row(beta, norm, W, cols, 0.0, ACC)
    start = part * rows_each
    stop = tl.minimum(start + rows_each, M)
    plain = tl.zeros((BW,), ACC)
    product = tl.zeros((BW,), ACC)
    for row in range(start, stop, BM):
        rows = row + tl.arange(0, BM)
        exist = rows < stop
        n = rows // (OH * OW)
        rest = rows % (OH * OW)
        mask = exist[:, None] & (cols < W)[None, :]
        at = rows[:, None] * W + cols[None, :]
        grad = depthwise_transposed(
            tl.zeros((BM, BW), ACC), z + branch * size, weights + branch * (KERNEL * KERNEL) * W, exist, n,
            rest // OW, rest % OW, cols, W, OH, OW, KERNEL, DILATION, 1, ACC,
        )  # fmt: skip
        value = tl.load(y + slot * size + at, mask=mask, other=0.0).to(ACC) - center[None, :]
        grad = tl.where(mask & ~(value * scale[None, :] + shift[None, :] <= 0), grad, 0.0)
        tl.store(out + branch * size + at, grad.to(out.dtype.element_ty), mask=mask)
        plain += tl.sum(grad, 0)
        product += tl.sum(tl.where(mask, grad * value, 0.0), 0)
    target = partial + ((branch * parts + part) * 2) * W + cols
    tl.store(target, plain, mask=cols < W)
    tl.store(target + W, product, mask=cols < W)


@triton.jit
def add_pools(
    total, grads, places, exist, n, iy, ix, cols, M, W, OH, OW,
    STRIDE: tl.constexpr, MAX: tl.constexpr, AVERAGE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """`total` plus what the gradients [MAX + AVERAGE, M, W] of 3x3 pools send to their input."""
    average = grads
    if MAX:
        average = grads + tl.cast(M, tl.int64) * W
    # a window at a time: all nine at once would not fit into the registers
    for i in range(3):
        for j in range(3):
            # the window in which this pixel has place (i, j)
            ty = iy + (1 - i)
            tx = ix + (1 - j)
            inside = exist & (ty >= 0) & (ty < OH * STRIDE) & (tx >= 0) & (tx < OW * STRIDE)
            if STRIDE == 2:
                inside = inside & (ty % 2 == 0) & (tx % 2 == 0)
            at = ((n * OH + ty // STRIDE) * OW + tx // STRIDE)[:, None] * W + cols[None, :]
            mask = inside[:, None] & (cols < W)[None, :]
            if MAX:
                place = tl.load(places + at, mask=mask, other=9).to(tl.int32)
                # whole rows are loaded, eight numbers at once
                value = tl.load(grads + at, mask=mask, other=0.0).to(ACC)
                total += tl.where(place == i * 3 + j, value, 0.0)
            if AVERAGE:
                high = tl.minimum(ty + 1, OH * STRIDE - 1) - tl.maximum(ty - 1, 0) + 1
                wide = tl.minimum(tx + 1, OW * STRIDE - 1) - tl.maximum(tx - 1, 0) + 1
                count = tl.maximum(high * wide, 1).to(ACC)[:, None]
                total += tl.load(average + at, mask=mask, other=0.0).to(ACC) / count
    return total


@tuned("STRIDE", "KINDS", "REDUCES")
def input_gradient_kernel(
    x, z, weights, grads, places, reduced, g, given, out, table, first_kind, first_edge, last_edge, mix,
    edge_weights, x_row, M, W, OH, OW, primitives, width, given_n, given_c, given_h, given_w,
    KINDS: tl.constexpr, STRIDE: tl.constexpr, MAX: tl.constexpr, AVERAGE: tl.constexpr,
    REDUCES: tl.constexpr,
    ACC: tl.constexpr, TILE: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """The gradient of a state's mixed channels, from all edges that leave it, in one write.

    x, out: the state [M * STRIDE^2, x_row] and its gradient [M * STRIDE^2, width]. z [.., M, W]: gradients of
    the first depthwise convolutions' outputs; KINDS: their kernel sizes and dilations, the branches of each
    in a row of the table from `first_kind` on. grads, places: see `add_pools`. reduced [REDUCES, M, 2 W]:
    gradients of the two pixels that FactorizedReduce reads. g [nodes, M, W]: gradients of nodes. given: the
    gradient from outside, of any strides.
    """
    BM: tl.constexpr = TILE // BW
    rows, exist, n, iy, ix = tile_rows(tl.program_id(0), M * (STRIDE * STRIDE), OH * STRIDE, OW * STRIDE, BM)
    cols = tl.program_id(1) * BW + tl.arange(0, BW)
    mask = exist[:, None] & (cols < W)[None, :]
    size = tl.cast(M, tl.int64) * W
    total = tl.zeros((BM, BW), ACC)
    for kind in tl.static_range(len(KINDS)):
        row = table + 4 * (first_kind + kind)
        kernels = weights + tl.load(row + 2)
        first = tl.load(row)
        for branch in range(first, tl.load(row + 1)):
            total = depthwise_transposed(
                total, z + branch * size, kernels + (branch - first) * (KINDS[kind][0] * KINDS[kind][0]) * W,
                exist, n, iy, ix, cols, W, OH, OW, KINDS[kind][0], KINDS[kind][1], STRIDE, ACC,
            )  # fmt: skip
    if REDUCES > 0:
        # the first convolution reads pixels (even, even), the second (odd, odd)
        read = exist & (iy % 2 == ix % 2)
        at = ((n * OH + iy // 2) * OW + ix // 2) * (2 * W) + (iy % 2) * W
        for branch in range(REDUCES):
            value = tl.load(
                reduced + branch * 2 * size + at[:, None] + cols[None, :],
                mask=mask & read[:, None],
                other=0.0,
            )
            total += value.to(ACC)
    value = tl.load(x + rows[:, None] * x_row + cols[None, :], mask=mask, other=0.0)
    total = tl.where(value.to(ACC) <= 0, 0.0, total)
    if MAX + AVERAGE > 0:
        total = add_pools(
            total, grads, places, exist, n, iy, ix, cols, M, W, OH, OW, STRIDE, MAX, AVERAGE, ACC
        )
    if STRIDE == 1:
        for place in range(first_edge, last_edge):
            edge = tl.load(table + 4 * place + 1)
            identity = tl.load(table + 4 * place + 2)
            weight = tl.load(mix + edge * primitives + identity, mask=identity >= 0, other=0.0).to(ACC)
            weight *= tl.load(edge_weights + edge).to(ACC)
            at = tl.load(table + 4 * place + 3) * size + rows[:, None] * W + cols[None, :]
            taken = (rows < tl.where(identity >= 0, M, 0))[:, None] & (cols < W)[None, :]
            value = tl.load(g + at, mask=taken, other=0.0)
            total += weight * value.to(ACC)
    at = n * given_n + iy * given_h + ix * given_w
    total += tl.load(given + at[:, None] + cols[None, :] * given_c, mask=mask, other=0.0).to(ACC)
    target = out + rows[:, None] * width + cols[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=mask)


@untuned
def bypass_gradient_kernel(
    x, g, given, out, table, first_edge, last_edge, edge_weights, x_row, M, W, OH, OW, given_n, given_c,
    given_h, given_w,
    STRIDE: tl.constexpr, K: tl.constexpr, ACC: tl.constexpr, TILE: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """The gradient of a state's bypassed channels; g [nodes, M, W * K]: gradients of the nodes' states, in
    their order of channels. With stride 2 it goes to the first maximum of each 2x2 window."""
    BM: tl.constexpr = TILE // (BW * K)
    rows, exist, n, iy, ix = tile_rows(tl.program_id(0), M * (STRIDE * STRIDE), OH * STRIDE, OW * STRIDE, BM)
    cols = tl.program_id(1) * BW + tl.arange(0, BW)
    lanes = tl.arange(0, K)[None, None, :]
    mask = exist[:, None, None] & (cols < W)[None, :, None] & (lanes > 0)
    channel = lanes * W + cols[None, :, None]
    at = (n * OH + iy // STRIDE) * OW + ix // STRIDE
    reached = mask
    if STRIDE == 2:
        own = tl.load(x + rows[:, None, None] * x_row + channel, mask=mask, other=0.0).to(ACC)
        for q in tl.static_range(4):
            corner = (n * (2 * OH) + iy - iy % 2 + q // 2) * (2 * OW) + ix - ix % 2 + q % 2
            other = tl.load(x + corner[:, None, None] * x_row + channel, mask=mask, other=0.0).to(ACC)
            earlier = ((iy % 2) * 2 + ix % 2 > q)[:, None, None]
            reached = reached & tl.where(earlier, ~(other >= own), ~(other > own))
    total = tl.zeros((BM, BW, K), ACC)
    for place in range(first_edge, last_edge):
        weight = tl.load(edge_weights + tl.load(table + 4 * place + 1)).to(ACC)
        image = tl.load(table + 4 * place + 3) * (tl.cast(M, tl.int64) * W * K)
        source = g + image + at[:, None, None] * (W * K) + cols[None, :, None] * K + lanes
        total += weight * tl.load(source, mask=reached, other=0.0).to(ACC)
    at = (n * given_n + iy * given_h + ix * given_w)[:, None, None]
    total += tl.load(given + at + channel * given_c, mask=mask, other=0.0).to(ACC)
    target = out + rows[:, None, None] * (W * K) + channel
    tl.store(target, total.to(out.dtype.element_ty), mask=mask)
