# mypy: ignore-errors
"""Arguments of the kernels, grouped, and what all kernels do with them.

A tensor of N images is a matrix: a row per pixel, its channels side by side. Names that kernels share:
    x: a state; y: branch outputs [slots, M, C], before their BatchNorms; g: gradients of the nodes.
    rows, exist: rows of a tile, and which of them there are; n, oy, ox: image and place of a pixel in an
        output, n, iy, ix in a state of the cell's input size.
    cols: mixed channels of a tile.
    ACC: the dtype of all arithmetic; values are stored as whatever the pointer says.
    TILE: elements of a tile, BM rows of BC channels, or of BC times some lanes; in products, of SIDE inputs.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Sizes(NamedTuple):
    """Rows (pixels of all images) and mixed channels C/K of a branch output, height and width of an image."""

    M: int
    C: int
    OH: int
    OW: int


class Parts(NamedTuple):
    """Sums over M rows are made of `count` partial sums over `rows` rows each."""

    rows: int
    count: int


class State(NamedTuple):
    """One state: channel c of pixel i is at i * row + c."""

    data: Tensor
    row: int


class States(NamedTuple):
    """All states: inputs one after the other, densely; node i from nodes_at + i * node_step on."""

    data: Tensor
    nodes_at: int
    node_step: int
    node_row: int


class View(NamedTuple):
    """A tensor [N, C, H, W] of any strides."""

    data: Tensor
    n: int
    c: int
    h: int
    w: int


class Norms(NamedTuple):
    """All BatchNorms of a cell, [norms, C] each: z = gamma (y - mean) rstd + beta."""

    mean: Tensor
    rstd: Tensor
    gamma: Tensor
    beta: Tensor


class NormBackward(NamedTuple):
    """The backward of all BatchNorms, grad_y = scale g + slope (y - mean) + shift: rows [3, norms, C]."""

    rows: Tensor
    norms: int


class Weights(NamedTuple):
    """op_weights [edges, primitives], edge_weights [edges]."""

    op_weights: Tensor
    edge_weights: Tensor
    primitives: int


# the shortest side of matrices that tensor cores multiply
SIDE = tl.constexpr(16)
# numbers in a row of a table: a power of two, so that addresses are shifts
ROW = tl.constexpr(8)


class Rows(NamedTuple):
    """Rows from `first` to `last` of a table int32 [rows, ROW], of one of the formats below."""

    table: Tensor
    first: int
    last: int


class TermRow(NamedTuple):
    """A branch output and a BatchNorm behind it (-1: none), for `primitive` of `edge`; `grad`: index of the
    gradient that comes back to it, of a node or, inside a separable convolution, of the state's branch."""

    slot: int
    norm: int
    edge: int
    primitive: int
    grad: int


class EdgeRow(NamedTuple):
    """An edge from state `source` to node `node`; `identity`: its primitive that is one, or -1."""

    index: int
    source: int
    node: int
    identity: int


class Span(NamedTuple):
    """Rows from `first` to `last` of a table; in the table of spans, of the table of terms."""

    first: int
    last: int

    @property
    def size(self) -> int:
        return self.last - self.first


class ConvGroup(NamedTuple):
    """Convolutions of one kernel size and dilation, first depthwise ones or NOR_CONVs: `first` to `last` of
    a state's branches of that sort; `weight`: offset of their weights."""

    kernel: int
    dilation: int
    first: int
    last: int
    weight: int

    @property
    def size(self) -> int:
        return self.last - self.first


class Depthwise(NamedTuple):
    """Gradients [branches, M, C] of a state's first depthwise convolutions, their weights and groups."""

    grads: Tensor
    weights: Tensor
    groups: Rows


class Pools(NamedTuple):
    """Gradients [max pool, average pool, M, C] of a state's 3x3 pools; argmax uint8 [M, C]: which of the nine
    is the maximum."""

    grads: Tensor
    argmax: Tensor


@triton.jit
def term_at(table, row):
    at = table + ROW * row
    return TermRow(tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4))


@triton.jit
def edge_at(table, row):
    at = table + ROW * row
    return EdgeRow(tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3))


@triton.jit
def span_at(table, row):
    at = table + ROW * row
    return Span(tl.load(at), tl.load(at + 1))


@triton.jit
def group_at(table, row):
    at = table + ROW * row
    return ConvGroup(tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4))


@triton.jit
def term_weight(weights, edge, primitive, ACC: tl.constexpr):
    """Op weight times edge weight; 0 where the primitive is -1."""
    at = weights.op_weights + edge * weights.primitives + primitive
    weight = tl.load(at, mask=primitive >= 0, other=0.0).to(ACC)
    return weight * tl.load(weights.edge_weights + edge).to(ACC)


@triton.jit
def block_of(axis: tl.constexpr, SIZE: tl.constexpr):
    """Indices of this program's block."""
    return tl.program_id(axis) * SIZE + tl.arange(0, SIZE)


@triton.jit
def pixel_of(rows, H, W):
    """Image, y and x of rows."""
    n = rows // (H * W)
    rest = rows % (H * W)
    return n, rest // W, rest % W


@triton.jit
def rows_of(part, parts, M):
    """First and last row of a part."""
    start = part * parts.rows
    return start, tl.minimum(start + parts.rows, M)


@triton.jit
def slot_size(sizes):
    """Elements of one branch output."""
    return tl.cast(sizes.M, tl.int64) * sizes.C


@triton.jit
def load_row(matrix, row, C, cols, default, ACC: tl.constexpr):
    """Channels of one row of a [norms, C] matrix; `default` where there is no such row."""
    return tl.load(matrix + row * C + cols, mask=cols < tl.where(row >= 0, C, 0), other=default).to(ACC)


@triton.jit
def load_norm(norms, norm, C, cols, ACC: tl.constexpr):
    """mean, gamma rstd and beta: z = (y - mean) (gamma rstd) + beta; of the identity where `norm` is -1."""
    scale = load_row(norms.rstd, norm, C, cols, 1.0, ACC) * load_row(norms.gamma, norm, C, cols, 1.0, ACC)
    mean = load_row(norms.mean, norm, C, cols, 0.0, ACC)
    return mean, scale, load_row(norms.beta, norm, C, cols, 0.0, ACC)


@triton.jit
def load_norm_backward(norm_backward, norm, C, cols, ACC: tl.constexpr):
    """scale, slope and shift; 0 where `norm` is -1."""
    rows, norms = norm_backward
    scale = load_row(rows, norm, C, cols, 0.0, ACC)
    slope = load_row(rows, tl.where(norm >= 0, norms + norm, norm), C, cols, 0.0, ACC)
    shift = load_row(rows, tl.where(norm >= 0, 2 * norms + norm, norm), C, cols, 0.0, ACC)
    return scale, slope, shift


@triton.jit
def divide(a, b, ACC: tl.constexpr):
    """a / b, rounded correctly; in float32 `/` is an approximation."""
    if tl.float64 == ACC:
        return a / b
    else:
        a, b = tl.broadcast(a, b)
        return tl.div_rn(a, b)


@triton.jit
def add_to_moments(mean, squares, value, mask, row, start, stop):
    """Mean, and sum of squared distances from it, of rows from `start` to `row`, merged with those of a tile
    (0 outside of `mask`) from `row` on by the rule of Chan, Golub and LeVeque (1983)."""
    count = tl.cast(tl.minimum(stop - row, value.shape[0]), value.dtype)
    before = tl.cast(row - start, value.dtype)
    own_mean = tl.sum(value, 0) / count
    # a sum of values far from zero is rounded by more than their spread: add what it missed
    own_mean += tl.sum(tl.where(mask, value - own_mean[None, :], 0.0), 0) / count
    distance = tl.where(mask, value - own_mean[None, :], 0.0)
    delta = own_mean - mean
    mean += delta * (count / (before + count))
    squares += tl.sum(distance * distance, 0) + delta * delta * (before * count / (before + count))
    return mean, squares


@triton.jit
def state_of(states, source, sizes, INPUTS: tl.constexpr, STRIDE: tl.constexpr, K: tl.constexpr):
    size = tl.cast(sizes.M, tl.int64) * (STRIDE * STRIDE) * sizes.C * K
    node = tl.cast(states.nodes_at, tl.int64) + tl.cast(states.node_step, tl.int64) * (source - INPUTS)
    at = tl.where(source < INPUTS, size * source, node)
    return State(states.data + at, tl.where(source < INPUTS, sizes.C * K, states.node_row))


@triton.jit
def load_bypass(
    states, source, rows, exist, pixel, cols, sizes,
    INPUTS: tl.constexpr, STRIDE: tl.constexpr, K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """[rows, channels, K]: at [.., c, lane] channel lane * C + c of a state, 2x2 max-pooled where its edge
    has stride 2; 0 for lane 0, the mixed channels."""
    lanes = tl.arange(0, K)[None, None, :]
    mask = exist[:, None, None] & (cols < sizes.C)[None, :, None] & (lanes > 0)
    channel = lanes * sizes.C + cols[None, :, None]
    x = state_of(states, source, sizes, INPUTS, STRIDE, K)
    if STRIDE == 1:
        value = tl.load(x.data + rows[:, None, None] * x.row + channel, mask=mask, other=0.0).to(ACC)
    else:
        at = window_row(source, rows, pixel, sizes, 0, INPUTS)
        value = tl.load(x.data + at[:, None, None] * x.row + channel, mask=mask, other=0.0).to(ACC)
        for q in tl.static_range(1, 4):
            at = window_row(source, rows, pixel, sizes, q, INPUTS)
            other = tl.load(x.data + at[:, None, None] * x.row + channel, mask=mask, other=0.0).to(ACC)
            # a NaN has to come through
            value = tl.where((other > value) | (other != other), other, value)
    return value


@triton.jit
def window_row(source, rows, pixel, sizes, q: tl.constexpr, INPUTS: tl.constexpr):
    """In a reduction cell, the row of pixel q of the 2x2 window in an input; a node has the output's size."""
    n, oy, ox = pixel
    in_window = (n * (2 * sizes.OH) + 2 * oy + q // 2) * (2 * sizes.OW) + 2 * ox + q % 2
    return tl.where(source < INPUTS, in_window, rows)
