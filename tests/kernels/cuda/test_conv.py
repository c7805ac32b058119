"""The CUDA kernels of a cell's preprocessing, run on the CPU thread by thread, against the reference."""

import pytest
import torch

from rfdarts_fast.nn.primitives import FactorizedReduce, ReLUConvBN
from rfdarts_fast.ops import reference
from rfdarts_fast.ops.compiled import cuda
from tests.kernels.cuda.convs import ConvCase
from tests.kernels.cuda.emulated import errors
from tests.kernels.cuda.test_kernels import assert_as_good_as_torch, assert_exact

SHAPES = [(1, 7, 5), (3, 1, 3), (2, 5, 1), (2, 18, 10)]
EVEN_SHAPES = [(1, 2, 6), (3, 10, 2), (2, 14, 34)]
CHANNELS = [(1, 1), (3, 5), (5, 3), (7, 1), (1, 7), (16, 16), (48, 16), (64, 80), (96, 64), (33, 70)]
# tensor cores take: one chunk, several, several groups of columns, more weights than shared memory keeps;
# the outputs, not the gradients; nothing
TENSOR_CHANNELS = [(16, 16), (64, 16), (80, 48), (160, 80), (336, 64), (24, 16), (20, 12), (7, 6)]


@pytest.mark.parametrize("channels", CHANNELS, ids=str)
def test_forward_and_backward_at_odd_shapes(emulation, channels):
    for shape in SHAPES:
        assert_exact(ConvCase(shape, channels=channels))


@pytest.mark.parametrize("channels", [(1, 2), (3, 10), (7, 6), (32, 32), (80, 72), (40, 140)], ids=str)
def test_reductions(emulation, channels):
    for shape in EVEN_SHAPES:
        assert_exact(ConvCase(shape, channels=channels, reduce=True))


@pytest.mark.parametrize("reduce", [False, True])
def test_not_affine(emulation, reduce):
    assert_exact(ConvCase(reduce=reduce, affine=False))


@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("channels", [(6, 4), (16, 16)], ids=str)
def test_evaluation_mode_uses_running_statistics(emulation, channels, reduce):
    assert_exact(ConvCase(channels=channels, reduce=reduce, train=False))


@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("channels", TENSOR_CHANNELS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_that_of_pytorch_in_the_same_dtype(emulation, dtype, channels, reduce):
    case = ConvCase((3, 12, 20), dtype, channels, reduce)
    assert_as_good_as_torch(case, floor=2 * torch.finfo(dtype).eps)


FAR_OUT = {
    "first pixel": lambda x: x[:, :, :2, :2].uniform_(200, 400),
    "every few pixels": lambda x: x[:, :, ::8, ::8].uniform_(200, 400),
    "lower half": lambda x: x[:, :, x.shape[2] // 2 :].add_(50),
    "all pixels": lambda x: x.add_(100),
}


@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("channels", [(8, 6), (16, 40)], ids=str)
@pytest.mark.parametrize("place", FAR_OUT.values(), ids=FAR_OUT)
def test_error_is_that_of_pytorch_where_pixels_lie_far_out(emulation, place, channels, reduce):
    case = ConvCase((4, 12, 20), torch.float32, channels, reduce)
    place(case.inputs[0])
    case.inputs = [case.inputs[0].float().double()]
    assert_as_good_as_torch(case, floor=torch.finfo(torch.float32).eps / 2)


@pytest.mark.parametrize(
    ("dtype", "shape", "channels"),
    [(torch.float32, (2, 280, 260), (2, 36)), (torch.bfloat16, (2, 400, 340), (32, 8))],
)
def test_blocks_with_several_tiles(emulation, dtype, shape, channels):
    """More pixels than there are blocks for; some rows far from the others."""
    case = ConvCase(shape, dtype, channels)
    case.inputs[0][:, :, 100:200].add_(50)
    case.inputs = [case.inputs[0].to(dtype).double()]
    assert_as_good_as_torch(case, floor=torch.finfo(dtype).eps / 2)


def test_blocks_with_several_tiles_and_more_weights_than_they_keep(emulation):
    case = ConvCase((1, 364, 364), channels=(84, 64))
    convs, norm = case.parts(case.module)
    with torch.no_grad():
        found, expected = (engine.relu_conv_bn(case.inputs[0], convs, norm) for engine in (cuda, reference))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("channels", [(12, 10), (80, 32)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_thread_order_changes_no_bit(emulation, dtype, channels, reduce):
    case = ConvCase((2, 10, 18), dtype, channels, reduce)
    first = case.emulated()
    emulation.shuffle(True)
    for again in (case.emulated(), case.emulated(memory="recompute")):
        for name, group in first.items():
            for a, b in zip(group, again[name], strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_strided_inputs(emulation, dtype, reduce):
    """Channels of a wider tensor, aligned to vectors and not; NCHW; one image for the whole batch."""
    case = ConvCase((2, 6, 10), dtype, (16, 32), reduce)
    x = case.inputs[0].to(dtype)
    wide = torch.randn(2, 40, 8, 12).to(dtype).contiguous(memory_format=torch.channels_last)
    views = [wide[:, 8:24, 1:7, 1:11], wide[:, 3:19, 2:, 2:], x, x[:1].expand(2, -1, -1, -1)]
    convs, norm = case.parts(case.module.to(cuda.parameter_dtype(dtype)))
    for view in views:
        found = []
        for y in (view, view.contiguous(memory_format=torch.channels_last)):
            out = cuda.relu_conv_bn(y.requires_grad_(), convs, norm)
            found.append([out, torch.autograd.grad(out, y, torch.ones(()).to(out).expand_as(out))[0]])
        torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients_that_are_expanded_or_not_aligned(emulation, dtype):
    # where the mean goes into the gradient, the same sums in another order would differ
    case = ConvCase((2, 6, 10), dtype, (16, 32), train=False)
    convs, norm = case.parts(case.module.to(cuda.parameter_dtype(dtype)))
    x = case.inputs[0].to(dtype).requires_grad_()
    out = cuda.relu_conv_bn(x, convs, norm)
    shifted = torch.ones(out.numel() + 1).to(dtype)[1:].view(2, 6, 10, 32).permute(0, 3, 1, 2)
    grads = [torch.ones_like(out), torch.ones(()).to(dtype).expand_as(out), shifted]
    aligned, *found = [torch.autograd.grad(out, x, grad, retain_graph=True)[0] for grad in grads]
    for dx in found:
        torch.testing.assert_close(dx, aligned, rtol=0, atol=0)


@pytest.mark.parametrize("reduce", [False, True])
def test_nan_in_nan_out(emulation, reduce):
    case = ConvCase((1, 8, 8), reduce=reduce, train=False)
    case.inputs[0][0, 2, 4, 4] = torch.nan
    found, expected = case.emulated(), case.reference()
    torch.testing.assert_close(found["states"], expected["states"], equal_nan=True)


@pytest.mark.parametrize("kind", [ReLUConvBN, FactorizedReduce])
def test_gradcheck(emulation, kind):
    case = ConvCase((2, 4, 4), reduce=kind is FactorizedReduce)
    convs, norm = case.parts(case.module)

    def run(x, gamma, beta):
        norm._parameters.update(weight=gamma, bias=beta)
        return cuda.relu_conv_bn(x, convs, norm)

    leaves = [case.inputs[0], norm.weight, norm.bias]
    assert torch.autograd.gradcheck(run, [x.detach().clone().requires_grad_() for x in leaves])


def test_autocast_computes_in_its_dtype(emulation):
    case = ConvCase((2, 6, 6), torch.float32)
    expected = case.reference()["states"]
    convs, norm = case.parts(case.module.float())
    with torch.autocast("cpu", torch.bfloat16):
        out = cuda.relu_conv_bn(case.inputs[0].float(), convs, norm)
    assert out.dtype == torch.bfloat16 and norm.running_mean.dtype == torch.float32
    assert errors({"states": [out]}, {"states": expected})["states"] < 0.02


def test_why_not_names_the_reason():
    case = ConvCase()
    convs, norm = case.parts(case.module)
    x = case.inputs[0]
    assert cuda.why_not_conv(x, convs, norm) == "no CUDA kernels for device cpu"
    assert cuda.unsupported_conv(x, convs, norm) is None
    assert "dtype" in cuda.unsupported_conv(x.to(torch.int32), convs, norm)
    assert "devices" in cuda.unsupported_conv(x.to("meta"), convs, norm)
    assert "different dtypes" in cuda.unsupported_conv(x.bfloat16(), convs, norm)
    convs[0].requires_grad_(True)
    assert "trained" in cuda.unsupported_conv(x, convs, norm)
    uneven = tuple(torch.nn.Conv2d(6, c, 1, 2, bias=False).double().requires_grad_(False) for c in (1, 3))
    assert "halves" in cuda.unsupported_conv(x, uneven, norm)
    with pytest.raises(ValueError, match="even height"):
        reference.relu_conv_bn(x[:, :, 1:], uneven, norm)
