"""Each CPU kernel by itself, on every instruction set of this processor, against PyTorch in float64."""

import importlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F

try:
    kernels = importlib.import_module("rfdarts_fast.ops._kernels")
except ImportError as error:
    pytest.skip(f"the kernels by themselves were not built ({error})", allow_module_level=True)

# products of bfloat16: this processor's and emulated ones
PRODUCTS = [
    pytest.param("Float", isa, marks=pytest.mark.skipif(not kernels.has(isa), reason=f"needs {isa}"))
    for isa in ("emulated_bf16", "avx512_bf16", "amx_bf16")
]
# float64 has one set of kernels
CODES = [("Float", isa) for isa in ("baseline", "avx2", "avx512") if kernels.has(isa)] + [
    ("Double", "baseline")
]
# C that fills vectors, divides them, and neither; images smaller than a kernel's reach
SHAPES = [
    (8, 8, 16),
    (7, 5, 4),
    (5, 3, 5),
    (1, 1, 1),
    (9, 16, 8),
    (3, 17, 32),
    (4, 4, 24),
    (11, 2, 2),
    (9, 19, 64),
]
CONVS = [(3, 1, 1), (5, 1, 1), (3, 2, 1), (5, 2, 1), (3, 1, 2), (5, 1, 2), (3, 2, 2), (5, 2, 2)]

codes = pytest.mark.parametrize(("kind", "isa"), CODES)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


class Run:
    """The kernels for one instruction set and random arrays in their dtype."""

    def __init__(self, kind, isa):
        self.kernels = getattr(kernels, kind)(isa)
        self.dtype = np.float32 if kind == "Float" else np.float64
        self.tolerance = 1e-5 if kind == "Float" else 1e-13
        self.generator = np.random.default_rng(0)

    def random(self, *shape):
        return self.generator.standard_normal(shape).astype(self.dtype)

    def close(self, ours, truth):
        ours, truth = np.asarray(ours, np.float64), np.asarray(truth, np.float64)
        assert np.abs(ours - truth).max() <= self.tolerance * max(1, np.abs(truth).max())


def tensor(image):
    """[H, W, C] as [1, C, H, W] in float64."""
    return torch.from_numpy(np.asarray(image, np.float64)).permute(2, 0, 1)[None]


def image(tensor):
    return tensor[0].permute(1, 2, 0).detach().numpy()


def separable(x, depthwise, pointwise, dilation, stride):
    c, kernel = x.shape[1], len(depthwise)
    taps = torch.from_numpy(depthwise.astype(np.float64)).permute(2, 0, 1)[:, None]
    mix = torch.from_numpy(pointwise.astype(np.float64)).T[:, :, None, None]
    padding = (kernel - 1) * dilation // 2
    return F.conv2d(F.conv2d(x, taps, None, stride, padding, dilation, c), mix)


@codes
@shapes
@pytest.mark.parametrize("conv", CONVS, ids=str)
def test_convolution(kind, isa, shape, conv):
    run, (h, w, c), (kernel, dilation, stride) = Run(kind, isa), shape, conv
    x, depthwise, pointwise = run.random(h, w, c), run.random(kernel, kernel, c), run.random(c, c)
    y, mean, deviation = run.kernels.conv_forward(x, depthwise, pointwise, dilation, stride)
    truth = image(separable(tensor(x).relu(), depthwise, pointwise, dilation, stride))
    run.close(y, truth)
    run.close(mean, truth.mean((0, 1)))
    run.close(deviation, ((truth - truth.mean((0, 1))) ** 2).sum((0, 1)))

    g, coefficients = run.random(*y.shape), run.random(4, c)
    dx = run.kernels.conv_backward(g, y, coefficients, depthwise, pointwise, dilation, stride, h, w)
    scale, slope, mean, shift = coefficients
    d = scale * g + slope * (y - mean) + shift
    leaf = torch.zeros(1, c, h, w, dtype=torch.float64, requires_grad=True)
    (truth,) = torch.autograd.grad(separable(leaf, depthwise, pointwise, dilation, stride), leaf, tensor(d))
    run.close(dx, 2 * image(truth))


def bfloat16(values):
    return torch.from_numpy(np.asarray(values, np.float32)).bfloat16().double()


@pytest.mark.parametrize(("kind", "isa"), PRODUCTS)
@pytest.mark.parametrize(
    "shape", [(7, 5, 16), (3, 17, 32), (9, 19, 64), (4, 8, 4), (9, 6, 8), (5, 3, 12)], ids=str
)
@pytest.mark.parametrize("conv", CONVS, ids=str)
def test_products_of_bfloat16(kind, isa, shape, conv):
    """Both operands are rounded, and nothing else: what comes out is that of rounded ones in float64."""
    run, (h, w, c), (kernel, dilation, stride) = Run(kind, isa), shape, conv
    x, depthwise, pointwise = run.random(h, w, c), run.random(kernel, kernel, c), run.random(c, c)
    # sums of few terms of few digits are exact in float32: the same number is rounded here and there
    x, depthwise = np.round(x * 8), np.round(depthwise * 8)
    y, mean, deviation = run.kernels.conv_forward(x, depthwise, pointwise, dilation, stride)
    identity, weights = np.eye(c, dtype=run.dtype), bfloat16(pointwise).numpy()
    d = bfloat16(image(separable(tensor(x).relu(), depthwise, identity, dilation, stride))).numpy()
    truth, exact = d @ weights, image(separable(tensor(x).relu(), depthwise, pointwise, dilation, stride))
    run.close(y, truth)
    run.close(mean, truth.mean((0, 1)))
    run.close(deviation, ((truth - truth.mean((0, 1))) ** 2).sum((0, 1)))
    assert np.abs(truth - exact).max() > 0.1

    g, y, coefficients = np.round(run.random(*y.shape) * 8), np.round(y), np.round(run.random(4, c) * 8)
    dx = run.kernels.conv_backward(g, y, coefficients, depthwise, pointwise, dilation, stride, h, w)
    scale, slope, mean, shift = coefficients
    d = bfloat16(scale * g + slope * (y - mean) + shift).numpy() @ weights.T
    leaf = torch.zeros(1, c, h, w, dtype=torch.float64, requires_grad=True)
    (truth,) = torch.autograd.grad(separable(leaf, depthwise, identity, dilation, stride), leaf, tensor(d))
    run.close(dx, 2 * image(truth))


@codes
@shapes
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("values", ["random", "ties", "constant"])
def test_pools(kind, isa, shape, stride, values):
    run = Run(kind, isa)
    x = run.random(*shape)
    if values != "random":
        # a pool's gradient goes to the first of equal maxima
        x = np.round(x) if values == "ties" else np.zeros_like(x)
    leaf = tensor(x).requires_grad_()
    pools = F.max_pool2d(leaf, 3, stride, 1), F.avg_pool2d(leaf, 3, stride, 1, count_include_pad=False)
    for rows in (1, 3, 100):
        for ours, truth in zip(run.kernels.pool_forward(x, stride, rows), pools, strict=True):
            run.close(ours, image(truth))
    d_max, d_avg = (run.random(*image(pool).shape) for pool in pools)
    (truth,) = torch.autograd.grad(pools, leaf, (tensor(d_max), tensor(d_avg)))
    run.close(run.kernels.pool_backward(x, d_max, d_avg, stride), image(truth))


@codes
@shapes
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("largest", [np.inf, "finite"])
def test_maxima_of_windows_whose_sums_are_no_numbers(kind, isa, shape, stride, largest):
    run = Run(kind, isa)
    for share in (0.05, 0.5, 1):
        x = run.random(*shape)
        value = np.finfo(x.dtype).max if largest == "finite" else largest
        x = np.where(run.generator.random(shape) < share, np.copysign(value, x), x).astype(x.dtype)
        leaf = tensor(x).requires_grad_()
        pool = F.max_pool2d(leaf, 3, stride, 1)
        np.testing.assert_array_equal(run.kernels.pool_forward(x, stride)[0], image(pool))
        d_max = run.random(*image(pool).shape)
        (truth,) = torch.autograd.grad(pool, leaf, tensor(d_max))
        run.close(run.kernels.pool_backward(x, d_max, np.zeros_like(d_max), stride), image(truth))


@codes
@shapes
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_passes_the_pools(kind, isa, shape, stride, value):
    run = Run(kind, isa)
    for share in (0.05, 0.5, 1):
        x = run.random(*shape)
        x[run.generator.random(shape) < share] = value
        leaf = tensor(x).requires_grad_()
        pools = F.max_pool2d(leaf, 3, stride, 1), F.avg_pool2d(leaf, 3, stride, 1, count_include_pad=False)
        for ours, truth in zip(run.kernels.pool_forward(x, stride), pools, strict=True):
            np.testing.assert_allclose(ours, image(truth), 10 * run.tolerance, 10 * run.tolerance)
        d_max, d_avg = (run.random(*image(pool).shape) for pool in pools)
        (truth,) = torch.autograd.grad(pools, leaf, (tensor(d_max), tensor(d_avg)))
        run.close(run.kernels.pool_backward(x, d_max, d_avg, stride), image(truth))


@codes
@shapes
def test_moments_do_not_cancel(kind, isa, shape):
    run = Run(kind, isa)
    for x in (run.random(*shape) + run.dtype(1000), run.random(*shape)):
        # nor where the first pixel is far from all others
        x[0, 0] = 300
        exact = x.astype(np.float64)
        for rows in (1, 4, 100):
            mean, deviation = run.kernels.moments(x, rows)
            centred = exact - exact.mean((0, 1))
            np.testing.assert_allclose(mean, exact.mean((0, 1)), rtol=run.tolerance)
            np.testing.assert_allclose(
                deviation, (centred**2).sum((0, 1)), rtol=10 * run.tolerance, atol=1e-9
            )


@codes
@pytest.mark.parametrize("K", [2, 4, 8])
@pytest.mark.parametrize("mixed", [1, 2, 3, 4, 8, 16])
def test_channel_shuffle(kind, isa, K, mixed):
    run = Run(kind, isa)
    inner, around = run.random(3, 5, mixed), run.random(3, 5, mixed * K)
    whole = np.concatenate([inner, around[..., mixed:]], -1)
    shuffled = run.kernels.shuffle(inner, around, K)
    # yuhuixu1993/PC-DARTS channel_shuffle
    np.testing.assert_array_equal(
        shuffled, whole.reshape(3, 5, K, mixed).swapaxes(-1, -2).reshape(whole.shape)
    )
    back, planar = run.kernels.unshuffle(shuffled, K)
    np.testing.assert_array_equal(back, inner)
    np.testing.assert_array_equal(planar[..., mixed:], around[..., mixed:])
    assert not planar[..., :mixed].any()


def test_errors_name_what_was_expected():
    with pytest.raises(ValueError, match=r"isa: expected .*, got neon"):
        kernels.Float("neon")
    with pytest.raises(ValueError, match=r"d_max: expected shape \[2 3 4\]"):
        kernels.Float("baseline").pool_backward(*[np.zeros((4, 5, 4), np.float32)] * 3, stride=2)
    with pytest.raises(ValueError, match="non-empty image"):
        kernels.Float("baseline").pool_forward(np.zeros((0, 5, 4), np.float32))
