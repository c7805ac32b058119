"""ReLU-conv-BN layers on every backend that has kernels: against plain PyTorch; memory, layouts, bits."""

import pytest
import torch
from torch import nn

from rfdarts_fast.ops.contract import ReLUConvBNLayer
from tests.kernels.oracles import Kernels, RecordedOps, grid, on, over
from tests.kernels.problems import LayerProblem
from tests.kernels.tolerances import TRUTH, assert_as_good_as_torch, assert_same_bits
from tests.kernels.views import ALIGNED, GRADIENT_VIEWS, not_aligned

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
EVERYWHERE = on("cpu", "emulated", "gpu")
BOTH = [False, True]

# several layers share a read of x
CPU = grid(
    channels=[(64, 16), (48, 8), (5, 6), (12, 16, 16), (12, 16, 32), (12, 6, 4, 8)], reduce=BOTH, train=BOTH
)
CPU = {name: dict(shapes=[(3, 6, 8)], **options) for name, options in CPU.items()}
CPU |= {
    "the last is not used": dict(channels=(12, 16, 32), unused=True),
    "not affine": dict(affine=False),
}

ODD = [(1, 7, 5), (3, 1, 3), (2, 5, 1), (2, 18, 10)]
EMULATED = grid(
    shapes=[ODD],
    channels=[(1, 1), (3, 5), (5, 3), (7, 1), (1, 7), (16, 16), (48, 16), (64, 80), (96, 64), (33, 70)],
)
EVEN = [(1, 2, 6), (3, 10, 2), (2, 14, 34)]
EMULATED |= grid(
    shapes=[EVEN], channels=[(1, 2), (3, 10), (7, 6), (32, 32), (80, 72), (40, 140)], reduce=[True]
)
EMULATED |= grid(affine=[False], reduce=BOTH)
EMULATED |= grid(train=[False], channels=[(6, 4), (16, 16)], reduce=BOTH)
SEVERAL = grid(shapes=[[(3, 6, 10)]], channels=[(12, 8, 8), (40, 6, 4, 10), (5, 70, 2, 4)], reduce=BOTH)
# more than a launch takes; more gradients than shared memory keeps
SEVERAL |= {"ten layers": dict(channels=(6, *range(2, 12))), "wide layers": dict(channels=(70, 100, 80))}
SEVERAL |= {"the last is not used": dict(channels=(12, 16, 32), unused=True)}
SEVERAL |= {"evaluation mode": dict(channels=(12, 16, 32), train=False)}
EMULATED |= SEVERAL
# tensor cores take: one chunk, several, several groups of columns, more weights than shared memory keeps;
# the outputs, not the gradients; nothing
EMULATED_ROUNDED = grid(
    shapes=[[(3, 12, 20)]],
    channels=[(16, 16), (64, 16), (80, 48), (160, 80), (336, 64), (24, 16), (20, 12), (7, 6)],
    reduce=BOTH,
)
# two layers; three of unequal channels, one with more groups of columns; some not for tensor cores
EMULATED_ROUNDED |= grid(
    shapes=[[(2, 8, 12)]],
    channels=[(64, 16, 16), (48, 32, 160, 32), (72, 64, 128, 64), (32, 16, 24), (16, 16, 6)],
    reduce=BOTH,
)
GPU = grid(
    shapes=[[(3, 18, 10), (2, 32, 32), (1, 8, 8)]],
    channels=[(16, 16), (64, 16), (192, 48), (256, 64), (40, 140), (5, 6), (64, 16, 32), (256, 64, 128, 6)],
    reduce=BOTH,
    train=BOTH,
)


@over(
    ("cpu", (F64, F32), CPU),
    (
        "cpu",
        (F32,),
        {"past the caches, images begin amidst a vector": dict(shapes=[(400, 15, 15)], channels=(3, 4))},
    ),
    ("emulated", (F64,), EMULATED),
    ("emulated", (F32, BF16, F16), EMULATED_ROUNDED),
    ("gpu", (F64, F32, BF16, F16), GPU),
)
def test_as_good_as_plain_pytorch(backend, dtype, options):
    for problem in problems(dtype, **options):
        assert_as_good_as_torch(backend, problem)


def problems(dtype, shapes=((2, 6, 10),), **options):
    return (LayerProblem(shape, dtype, **options) for shape in shapes)


FAR_OUT = {
    "first pixel": lambda x: x[:, :, :2, :2].uniform_(200, 400),
    "every few pixels": lambda x: x[:, :, ::8, ::8].uniform_(200, 400),
    "lower half": lambda x: x[:, :, x.shape[2] // 2 :].add_(50),
    "all pixels": lambda x: x.add_(100),
}


@pytest.mark.parametrize("place", FAR_OUT.values(), ids=FAR_OUT)
@over(("emulated", (F32,), grid(shapes=[[(4, 12, 20)]], channels=[(8, 6), (16, 40)], reduce=BOTH)))
def test_pixels_far_out(backend, dtype, options, place):
    for problem in problems(dtype, place=place, **options):
        assert_as_good_as_torch(backend, problem)


FAR_ROWS = {"place": lambda x: x[:, :, 100:200].add_(50)}


# more pixels than there are blocks for
@over(
    ("emulated", (F32,), {"float32": dict(shapes=[(2, 280, 260)], channels=(2, 36), **FAR_ROWS)}),
    ("emulated", (BF16,), {"tensor cores": dict(shapes=[(2, 400, 340)], channels=(32, 8), **FAR_ROWS)}),
)
def test_blocks_with_several_tiles(backend, dtype, options):
    [problem] = problems(dtype, **options)
    assert_as_good_as_torch(backend, problem)


@on("emulated")
def test_blocks_with_several_tiles_and_more_weights_than_they_keep(backend):
    problem = LayerProblem((1, 364, 364), channels=(84, 64))
    layers = [part.layer() for part in problem.module]
    with torch.no_grad():
        found, expected = (each.layers(problem.inputs[0], layers) for each in (backend, TRUTH))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@over(
    ("cpu", (F32,), grid(channels=[(12, 16, 32)], reduce=BOTH)),
    (
        "emulated",
        (F32, BF16),
        grid(shapes=[[(2, 10, 18)]], channels=[(12, 10, 4), (80, 32, 64)], reduce=BOTH),
    ),
    # several tiles a block
    ("gpu", (F32, BF16), grid(shapes=[[(64, 80, 80)]], channels=[(64, 16)], reduce=BOTH)),
)
def test_neither_order_nor_memory_changes_a_bit(backend, dtype, options):
    [problem] = problems(dtype, **options)
    results = [problem.run(backend, memory=m) for _ in backend.schedules() for m in ("fast", "recompute")]
    for result in results[1:]:
        assert_same_bits(result, results[0])


@over(*((name, (F32, BF16), grid(channels=[(16, 32, 32, 32)], reduce=BOTH)) for name in ("emulated", "gpu")))
def test_layers_that_share_launches_have_the_bits_of_each_alone(backend, dtype, options, monkeypatch):
    problem = LayerProblem((2, 12, 20), dtype, **options)
    together = problem.run(backend)
    monkeypatch.setattr(backend.backend, "groups", lambda layers: [[i] for i in range(len(layers))])
    alone = problem.run(backend)
    # a sum that is rounded once, or that of each layer
    for result in (together, alone):
        del result["gradient of input 0"]
    assert_same_bits(together, alone)


@pytest.mark.parametrize("reduce", BOTH)
@EVERYWHERE
def test_fresh_memory_changes_no_bit(backend, reduce):
    problem = LayerProblem((2, 12, 20), F32, channels=(24, 20, 8), reduce=reduce)
    assert_same_bits(problem.run(backend), problem.run(backend, poison=False))


ALL_DTYPES = over(
    *((name, (F64, F32, BF16), grid(reduce=BOTH)) for name in ("emulated", "gpu")),
    ("cpu", (F64, F32), grid(reduce=BOTH)),
)


@ALL_DTYPES
def test_inputs_in_any_layout(backend, dtype, options):
    problem = LayerProblem(dtype=dtype, channels=(16, 32), **options)
    expected = problem.run(backend)
    for view in (*ALIGNED, not_aligned):
        assert_same_bits(problem.run(backend, view=view), expected)


@ALL_DTYPES
def test_one_image_for_the_whole_batch(backend, dtype, options):
    problem = LayerProblem(dtype=dtype, channels=(16, 32), **options)
    problem.inputs[0][1] = problem.inputs[0][0]
    found, expected = (
        problem.run(backend, view=view) for view in (lambda x: x[:1].expand_as(x), torch.clone)
    )
    [grads] = expected.pop("gradient of input 0")
    [grad] = found.pop("gradient of input 0")
    assert torch.equal(grad[0], grads.sum(0))
    assert_same_bits(found, expected)


@ALL_DTYPES
def test_gradients_in_any_layout(backend, dtype, options):
    # where the mean goes into the gradient, the same sums in another order would differ
    problem = LayerProblem(dtype=dtype, channels=(16, 32), train=False, **options)
    problem.grads = [torch.ones_like(problem.grads[0])]
    expected = problem.run(backend)
    for view in GRADIENT_VIEWS:
        assert_same_bits(problem.run(backend, grad_view=view), expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("reduce", BOTH)
@EVERYWHERE
def test_what_is_not_finite_spreads_as_in_pytorch(backend, reduce, value):
    """FactorizedReduce's halves of the outputs read different pixels, and send gradients to these alone."""
    problem = LayerProblem((1, 8, 8), reduce=reduce, train=False)
    problem.inputs[0][0, 2, 4, 4] = problem.inputs[0][0, 1, 1, 1] = value
    problem.grads[0][0, 1, 3, 3] = problem.grads[0][0, 2, 3, 2] = value
    found, expected = problem.run(backend), problem.run(TRUTH)
    for key in ("output 0", "gradient of input 0"):
        assert not expected[key][0].isfinite().all()
    torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize(("halves", "taken"), [((2, 3), True), ((3, 2), False), ((1, 3), False)])
@on("cpu")
def test_halves_of_outputs(backend, halves, taken):
    """FactorizedReduce's first convolution has half of the outputs, rounded down; others are refused."""
    convs = tuple(nn.Conv2d(6, c, 1, 2, bias=False, dtype=F64).requires_grad_(False) for c in halves)
    layer = ReLUConvBNLayer(convs, nn.BatchNorm2d(sum(halves), dtype=F64))
    x = torch.randn(2, 6, 4, 8, dtype=F64)
    assert (backend.backend.unsupported_layer(x, layer) is None) == taken
    if taken:
        torch.testing.assert_close(*(each.layers(x, [layer]) for each in (backend, TRUTH)))


@pytest.mark.parametrize("reduce", BOTH)
@EVERYWHERE
def test_gradcheck(backend, reduce):
    problem = LayerProblem((2, 4, 4), reduce=reduce)
    [module], [x], _ = problem.leaves(backend)
    norm = module.layer().norm

    def layer(x, gamma, beta):
        norm._parameters.update(weight=gamma, bias=beta)
        return backend.layers(x, [module.layer()])[0]

    assert torch.autograd.gradcheck(layer, [x, *(p.detach().requires_grad_() for p in norm.parameters())])


@on("emulated", "gpu")
def test_autocast_decides_the_dtype(backend):
    problem = LayerProblem((2, 6, 6), F32)
    [module], [x], _ = problem.leaves(backend)
    with torch.autocast(backend.device, BF16):
        [out] = backend.layers(x, [module.layer()])
    assert out.dtype == BF16 and module.layer().norm.running_mean.dtype == F32
    [expected] = problem.run(TRUTH, F64)["output 0"]
    assert (out.cpu() - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("reduce", BOTH)
@EVERYWHERE
def test_opcheck(backend, reduce):
    """Aliases of every op that layers call, and its fake's shapes, strides and dtypes."""
    recorded = RecordedOps(backend.backend)
    kernels = Kernels(recorded.backend, backend.device)
    problem = LayerProblem(dtype=F32, channels=(8, 4, 6), reduce=reduce)
    for view in (torch.clone, torch.Tensor.detach):
        problem.run(kernels, view=view)
        recorded.opcheck("relu_conv_bn_forward", "relu_conv_bn_backward", "update_running_stats")
