# mypy: ignore-errors
"""Backward kernels; for what the arguments mean see arguments.py.

Formulas (derived in csrc/README.md): with g the gradient of a node's state, v the term weight of a branch,
y_hat = (y - mean) rstd and sums over the M rows, the gradient of BatchNorm's beta is v sum g, of gamma v sum
g y_hat, of v itself sum over channels of gamma sum g y_hat + beta sum g, and grad_y = scale g + slope (y -
mean) + shift with scale = v gamma rstd, slope = -scale rstd sum(g y_hat) / M, shift = -scale sum(g) / M;
slope = shift = 0 with running statistics.
"""

import triton
import triton.language as tl

from rfdarts_fast.ops.triton.arguments import (
    block_of,
    edge_at,
    group_at,
    load_bypass,
    load_norm,
    load_norm_backward,
    load_row,
    pixel_of,
    rows_of,
    slot_size,
    span_at,
    state_of,
    term_at,
    term_weight,
)
from rfdarts_fast.ops.triton.tuning import tuned, untuned


@untuned
def sums_kernel(
    g, y, partial, terms, norms, sizes, parts, ACC: tl.constexpr, TILE: tl.constexpr, BC: tl.constexpr
):
    """partial [terms, parts, 2, C]: sums of g [M, C] and of g (y - mean) over each part's rows."""
    M, C, _, _ = sizes
    BM: tl.constexpr = TILE // BC
    index, part, cols = tl.program_id(0), tl.program_id(1), block_of(2, BC)
    term = term_at(terms.table, terms.first + index)
    mean = load_row(norms.mean, term.norm, C, cols, 0.0, ACC)
    y += term.slot * slot_size(sizes)
    start, stop = rows_of(part, parts, M)
    sum_g = tl.zeros((BC,), ACC)
    sum_gy = tl.zeros((BC,), ACC)
    for row in range(start, stop, BM):
        rows = row + tl.arange(0, BM)
        mask = (rows < stop)[:, None] & (cols < C)[None, :]
        at = rows[:, None] * C + cols[None, :]
        grad = tl.load(g + at, mask=mask, other=0.0).to(ACC)
        value = tl.load(y + at, mask=mask, other=0.0).to(ACC) - mean[None, :]
        sum_g += tl.sum(grad, 0)
        sum_gy += tl.sum(tl.where(mask, grad * value, 0.0), 0)
    target = partial + ((index * parts.count + part) * 2) * C + cols
    tl.store(target, sum_g, mask=cols < C)
    tl.store(target + C, sum_gy, mask=cols < C)


@untuned
def edge_sums_kernel(
    g, states, partial, edges, sizes, parts,
    INPUTS: tl.constexpr, STRIDE: tl.constexpr, K: tl.constexpr, ACC: tl.constexpr, TILE: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """partial [channel blocks, parts, edges, 2]: sums of g x over the identity, and over bypassed channels,
    of each edge into a node; g [M, C * K] in the node's order of channels."""
    M, C, OH, OW = sizes
    BM: tl.constexpr = TILE // (BC * K)
    index, part, cols = tl.program_id(0), tl.program_id(1), block_of(2, BC)
    edge = edge_at(edges.table, edges.first + index)
    x = state_of(states, edge.source, sizes, INPUTS, STRIDE, K)
    start, stop = rows_of(part, parts, M)
    identity = tl.zeros((BC,), ACC)
    bypassed = tl.zeros((BC,), ACC)
    for row in range(start, stop, BM):
        rows = row + tl.arange(0, BM)
        exist = rows < stop
        at = rows[:, None] * (C * K) + cols[None, :] * K
        taken = (rows < tl.where(edge.identity >= 0, stop, 0))[:, None] & (cols < C)[None, :]
        grad = tl.load(g + at, mask=taken, other=0.0).to(ACC)
        value = tl.load(x.data + rows[:, None] * x.row + cols[None, :], mask=taken, other=0.0)
        identity += tl.sum(grad * value.to(ACC), 0)
        if K > 1:
            lanes = tl.arange(0, K)[None, None, :]
            mask = exist[:, None, None] & (cols < C)[None, :, None] & (lanes > 0)
            around = tl.load(g + at[:, :, None] + lanes, mask=mask, other=0.0)
            pixel = pixel_of(rows, OH, OW)
            value = load_bypass(states, edge.source, rows, exist, pixel, cols, sizes, INPUTS, STRIDE, K, ACC)
            bypassed += tl.sum(tl.sum(around.to(ACC) * value, 2), 0)
    block = tl.program_id(2) * parts.count + part
    target = partial + (block * tl.num_programs(0) + index) * 2
    tl.store(target, tl.sum(identity, 0))
    tl.store(target + 1, tl.sum(bypassed, 0))


@untuned
def norm_backward_kernel(
    partial, norm_backward, grad_gamma, grad_beta, grad_term_weights, terms, weights, norms, sizes, parts,
    WEIGHTED: tl.constexpr, TRAINING: tl.constexpr, ACC: tl.constexpr, TILE: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """From the partial sums of terms: scale, slope and shift, the gradients of gamma and beta [norms, C], and
    with WEIGHTED those of the term weights [edges, primitives]; otherwise the term weight is 1."""
    M, C, _, _ = sizes
    BM: tl.constexpr = TILE // BC
    term = term_at(terms.table, terms.first + tl.program_id(0))
    weight = tl.full((1,), 1.0, ACC)
    if WEIGHTED:
        weight *= term_weight(weights, term.edge, term.primitive, ACC)
    partial += tl.program_id(0) * parts.count * 2 * C
    grad_weight = tl.zeros((BC,), ACC)
    for block in range(0, C, BC):
        cols = block + tl.arange(0, BC)
        sum_g = tl.zeros((BC,), ACC)
        sum_gy = tl.zeros((BC,), ACC)
        for first_part in range(0, parts.count, BM):
            part = first_part + tl.arange(0, BM)
            mask = (part < parts.count)[:, None] & (cols < C)[None, :]
            at = partial + part[:, None] * (2 * C) + cols[None, :]
            sum_g += tl.sum(tl.load(at, mask=mask, other=0.0), 0)
            sum_gy += tl.sum(tl.load(at + C, mask=mask, other=0.0), 0)
        rstd = load_row(norms.rstd, term.norm, C, cols, 1.0, ACC)
        gamma = load_row(norms.gamma, term.norm, C, cols, 1.0, ACC)
        beta = load_row(norms.beta, term.norm, C, cols, 0.0, ACC)
        sum_gy_hat = sum_gy * rstd
        grad_weight += tl.where(cols < C, gamma * sum_gy_hat + beta * sum_g, 0.0)
        target = term.norm * C + cols
        mask = cols < tl.where(term.norm >= 0, C, 0)
        tl.store(grad_gamma + target, weight * sum_gy_hat, mask=mask)
        tl.store(grad_beta + target, weight * sum_g, mask=mask)
        scale = weight * gamma * rstd
        slope = tl.zeros((BC,), ACC)
        shift = tl.zeros((BC,), ACC)
        if TRAINING:
            per_row = -scale / tl.cast(M, ACC)
            slope = per_row * rstd * sum_gy_hat
            shift = per_row * sum_g
        target += norm_backward.rows
        tl.store(target, scale, mask=mask)
        tl.store(target + norm_backward.norms * C, slope, mask=mask)
        tl.store(target + 2 * norm_backward.norms * C, shift, mask=mask)
    if WEIGHTED:
        at = term.edge * weights.primitives + term.primitive
        tl.store(grad_term_weights + at, tl.sum(grad_weight, 0))


@untuned
def branch_gradient_kernel(
    g, y, out, terms, spans, weights, norm_backward, norms, sizes,
    ACC: tl.constexpr, TILE: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """out [spans, M, C]: grad_y = scale g + slope (y - mean) + shift, summed over the terms in a span, which
    share a branch output; without a BatchNorm the scale is the term weight. g [.., M, C]."""
    M, C, _, _ = sizes
    BM: tl.constexpr = TILE // BC
    rows, cols = block_of(0, BM), block_of(1, BC)
    mask = (rows < M)[:, None] & (cols < C)[None, :]
    at = rows[:, None] * C + cols[None, :]
    size = slot_size(sizes)
    span = span_at(spans.table, spans.first + tl.program_id(2))
    total = tl.zeros((BM, BC), ACC)
    for place in range(span.first, span.last):
        term = term_at(terms, place)
        grad = tl.load(g + term.grad * size + at, mask=mask, other=0.0).to(ACC)
        scale, slope, shift = load_norm_backward(norm_backward, term.norm, C, cols, ACC)
        scale = tl.where(term.norm >= 0, scale, term_weight(weights, term.edge, term.primitive, ACC))
        # with running statistics slope is 0, whatever y is: an infinity or NaN too
        needed = mask & (slope != 0)[None, :]
        value = tl.load(y + term.slot * size + at, mask=needed, other=0.0).to(ACC)
        value -= load_row(norms.mean, term.norm, C, cols, 0.0, ACC)[None, :]
        total += scale[None, :] * grad
        total += slope[None, :] * value
        total += shift[None, :]
    tl.store(out + tl.program_id(2) * size + at, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def depthwise_backward(
    total, grads, weights, exist, n, iy, ix, cols, sizes,
    KERNEL: tl.constexpr, DILATION: tl.constexpr, STRIDE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """`total` plus what a depthwise convolution's output gradient [N, OH, OW, C] sends to its input."""
    _, C, OH, OW = sizes
    PAD: tl.constexpr = DILATION * (KERNEL - 1) // 2
    # a row of taps at a time: all at once would not fit into the registers
    for i in range(KERNEL):
        ty = iy + (PAD - i * DILATION)
        in_image = exist & (ty >= 0) & (ty < OH * STRIDE)
        if STRIDE == 2:
            in_image = in_image & (ty % 2 == 0)
        row = grads + ((n * OH + ty // STRIDE) * (OW * C))[:, None] + cols[None, :]
        for j in tl.static_range(KERNEL):
            tx = ix + (PAD - j * DILATION)
            inside = in_image & (tx >= 0) & (tx < OW * STRIDE)
            if STRIDE == 2:
                inside = inside & (tx % 2 == 0)
            mask = inside[:, None] & (cols < C)[None, :]
            value = tl.load(row + (tx // STRIDE * C)[:, None], mask=mask, other=0.0).to(ACC)
            weight = tl.load(weights + (i * KERNEL + j) * C + cols, mask=cols < C, other=0.0).to(ACC)
            total += value * weight[None, :]
    return total


@untuned
def inner_gradient_kernel(
    grads, weights, y, out, partial, terms, norms, sizes, parts,
    KERNEL: tl.constexpr, DILATION: tl.constexpr, ACC: tl.constexpr, TILE: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Through the second depthwise convolution of separable ones and the ReLU before it: out [branches, M, C]
    from grads [branches, M, C]; partial [branches, parts, 2, C] as in `sums_kernel`, for the BatchNorm before
    the ReLU, that of `terms`."""
    M, C, OH, OW = sizes
    BM: tl.constexpr = TILE // BC
    branch, part, cols = tl.program_id(0), tl.program_id(1), block_of(2, BC)
    size = slot_size(sizes)
    term = term_at(terms.table, terms.first + branch)
    mean, scale, shift = load_norm(norms, term.norm, C, cols, ACC)
    start, stop = rows_of(part, parts, M)
    sum_g = tl.zeros((BC,), ACC)
    sum_gy = tl.zeros((BC,), ACC)
    for row in range(start, stop, BM):
        rows = row + tl.arange(0, BM)
        exist = rows < stop
        n, oy, ox = pixel_of(rows, OH, OW)
        mask = exist[:, None] & (cols < C)[None, :]
        at = rows[:, None] * C + cols[None, :]
        grad = depthwise_backward(
            tl.zeros((BM, BC), ACC), grads + branch * size, weights + branch * (KERNEL * KERNEL) * C, exist,
            n, oy, ox, cols, sizes, KERNEL, DILATION, 1, ACC,
        )  # fmt: skip
        value = tl.load(y + term.slot * size + at, mask=mask, other=0.0).to(ACC) - mean[None, :]
        grad = tl.where(mask & ~(value * scale[None, :] + shift[None, :] <= 0), grad, 0.0)
        tl.store(out + branch * size + at, grad.to(out.dtype.element_ty), mask=mask)
        sum_g += tl.sum(grad, 0)
        sum_gy += tl.sum(tl.where(mask, grad * value, 0.0), 0)
    target = partial + ((branch * parts.count + part) * 2) * C + cols
    tl.store(target, sum_g, mask=cols < C)
    tl.store(target + C, sum_gy, mask=cols < C)


@triton.jit
def pools_backward(
    total, pools, exist, n, iy, ix, cols, sizes,
    STRIDE: tl.constexpr, MAX: tl.constexpr, AVERAGE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """`total` plus what the gradients of 3x3 pools send to their input."""
    _, C, OH, OW = sizes
    average = pools.grads
    if MAX:
        average = pools.grads + slot_size(sizes)
    # a window at a time: all nine at once would not fit into the registers
    for i in range(3):
        for j in range(3):
            # the window in which this pixel has place (i, j)
            ty = iy + (1 - i)
            tx = ix + (1 - j)
            inside = exist & (ty >= 0) & (ty < OH * STRIDE) & (tx >= 0) & (tx < OW * STRIDE)
            if STRIDE == 2:
                inside = inside & (ty % 2 == 0) & (tx % 2 == 0)
            at = ((n * OH + ty // STRIDE) * OW + tx // STRIDE)[:, None] * C + cols[None, :]
            mask = inside[:, None] & (cols < C)[None, :]
            if MAX:
                place = tl.load(pools.argmax + at, mask=mask, other=9).to(tl.int32)
                # whole rows are loaded, eight numbers at once
                value = tl.load(pools.grads + at, mask=mask, other=0.0).to(ACC)
                total += tl.where(place == i * 3 + j, value, 0.0)
            if AVERAGE:
                high = tl.minimum(ty + 1, OH * STRIDE - 1) - tl.maximum(ty - 1, 0) + 1
                wide = tl.minimum(tx + 1, OW * STRIDE - 1) - tl.maximum(tx - 1, 0) + 1
                count = tl.maximum(high * wide, 1).to(ACC)[:, None]
                total += tl.load(average + at, mask=mask, other=0.0).to(ACC) / count
    return total


@triton.jit
def reduces_backward(total, grads, exist, n, iy, ix, cols, sizes, REDUCES: tl.constexpr, ACC: tl.constexpr):
    """`total` plus the gradients [REDUCES, M, 2, C] of the two pixels of a window that FactorizedReduce
    reads: the first convolution's (even, even), the second's (odd, odd)."""
    _, C, OH, OW = sizes
    read = (exist & (iy % 2 == ix % 2))[:, None] & (cols < C)[None, :]
    at = ((n * OH + iy // 2) * OW + ix // 2) * (2 * C) + (iy % 2) * C
    for branch in range(REDUCES):
        place = grads + branch * 2 * slot_size(sizes) + at[:, None] + cols[None, :]
        total += tl.load(place, mask=read, other=0.0).to(ACC)
    return total


@triton.jit
def identities_backward(total, g, edges, weights, rows, cols, sizes, ACC: tl.constexpr):
    """`total` plus what the identities of the edges pass on from their nodes' gradients g [nodes, M, C]."""
    M, C, _, _ = sizes
    for place in range(edges.first, edges.last):
        edge = edge_at(edges.table, place)
        weight = term_weight(weights, edge.index, edge.identity, ACC)
        at = edge.node * slot_size(sizes) + rows[:, None] * C + cols[None, :]
        taken = (rows < tl.where(edge.identity >= 0, M, 0))[:, None] & (cols < C)[None, :]
        total += weight * tl.load(g + at, mask=taken, other=0.0).to(ACC)
    return total


@tuned("STRIDE", "KERNELS", "REDUCES")
def input_gradient_kernel(
    x, out, outside, depthwise, reduce_grads, nor_conv_grads, pools, g, edges, weights, sizes,
    KERNELS: tl.constexpr, REDUCES: tl.constexpr, NOR_CONVS: tl.constexpr, MAX: tl.constexpr,
    AVERAGE: tl.constexpr,
    STRIDE: tl.constexpr, K: tl.constexpr, ACC: tl.constexpr, TILE: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The gradient of a state's mixed channels, from all edges that leave it, in one write.

    x, out: the state and its gradient [M * STRIDE^2, C * K]; outside: the gradient that the cell is given for
    it; g [nodes, M, C]: gradients of nodes; edges: those that leave the state; KERNELS: kernel size and
    dilation of each group of depthwise convolutions; reduce_grads: see `reduces_backward`; nor_conv_grads
    [M, C]: what `nor_conv_backward_kernel` makes, with NOR_CONVS.
    """
    M, C, OH, OW = sizes
    BM: tl.constexpr = TILE // BC
    rows = block_of(0, BM)
    n, iy, ix = pixel_of(rows, OH * STRIDE, OW * STRIDE)
    exist = rows < M * (STRIDE * STRIDE)
    cols = block_of(1, BC)
    mask = exist[:, None] & (cols < C)[None, :]
    size = slot_size(sizes)
    total = tl.zeros((BM, BC), ACC)
    for k in tl.static_range(len(KERNELS)):
        group = group_at(depthwise.groups.table, depthwise.groups.first + k)
        weights_of_group = depthwise.weights + group.weight
        for branch in range(group.first, group.last):
            total = depthwise_backward(
                total, depthwise.grads + branch * size,
                weights_of_group + (branch - group.first) * (KERNELS[k][0] * KERNELS[k][0]) * C,
                exist, n, iy, ix, cols, sizes, KERNELS[k][0], KERNELS[k][1], STRIDE, ACC,
            )  # fmt: skip
    if REDUCES > 0:
        total = reduces_backward(total, reduce_grads, exist, n, iy, ix, cols, sizes, REDUCES, ACC)
    if NOR_CONVS:
        at = rows[:, None] * C + cols[None, :]
        total += tl.load(nor_conv_grads + at, mask=mask, other=0.0).to(ACC)
    # the ReLU before all convolutions
    value = tl.load(x.data + rows[:, None] * x.row + cols[None, :], mask=mask, other=0.0)
    total = tl.where(value.to(ACC) <= 0, 0.0, total)
    if MAX + AVERAGE > 0:
        total = pools_backward(total, pools, exist, n, iy, ix, cols, sizes, STRIDE, MAX, AVERAGE, ACC)
    if STRIDE == 1:
        total = identities_backward(total, g, edges, weights, rows, cols, sizes, ACC)
    at = n * outside.n + iy * outside.h + ix * outside.w
    given = outside.data + at[:, None] + cols[None, :] * outside.c
    total += tl.load(given, mask=mask, other=0.0).to(ACC)
    target = out + rows[:, None] * (C * K) + cols[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=mask)


@untuned
def bypass_backward_kernel(
    x, out, outside, g, edges, weights, sizes,
    STRIDE: tl.constexpr, K: tl.constexpr, ACC: tl.constexpr, TILE: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The gradient of a state's bypassed channels; g [nodes, M, C * K]: gradients of the nodes' states, in
    their order of channels. With stride 2 it goes to the first maximum, or last NaN, of each 2x2 window."""
    M, C, OH, OW = sizes
    BM: tl.constexpr = TILE // (BC * K)
    rows = block_of(0, BM)
    n, iy, ix = pixel_of(rows, OH * STRIDE, OW * STRIDE)
    exist = rows < M * (STRIDE * STRIDE)
    cols = block_of(1, BC)
    lanes = tl.arange(0, K)[None, None, :]
    mask = exist[:, None, None] & (cols < C)[None, :, None] & (lanes > 0)
    channel = lanes * C + cols[None, :, None]
    at = (n * OH + iy // STRIDE) * OW + ix // STRIDE
    reached = mask
    if STRIDE == 2:
        own = tl.load(x.data + rows[:, None, None] * x.row + channel, mask=mask, other=0.0).to(ACC)
        for q in tl.static_range(4):
            corner = (n * (2 * OH) + iy - iy % 2 + q // 2) * (2 * OW) + ix - ix % 2 + q % 2
            other = tl.load(x.data + corner[:, None, None] * x.row + channel, mask=mask, other=0.0).to(ACC)
            place = ((iy % 2) * 2 + ix % 2)[:, None, None]
            taken = (other > own) | ((other == own) & (place > q))
            taken |= (other != other) & ((own == own) | (place < q))
            reached = reached & ~taken
    total = tl.zeros((BM, BC, K), ACC)
    for place in range(edges.first, edges.last):
        edge = edge_at(edges.table, place)
        weight = tl.load(weights.edge_weights + edge.index).to(ACC)
        source = g + edge.node * (slot_size(sizes) * K) + at[:, None, None] * (C * K)
        source += cols[None, :, None] * K + lanes
        total += weight * tl.load(source, mask=reached, other=0.0).to(ACC)
    at = (n * outside.n + iy * outside.h + ix * outside.w)[:, None, None]
    total += tl.load(outside.data + at + channel * outside.c, mask=mask, other=0.0).to(ACC)
    target = out + rows[:, None, None] * (C * K) + channel
    tl.store(target, total.to(out.dtype.element_ty), mask=mask)
