"""The reference mixed op against its definition, written out primitive by primitive in float64."""

import pytest
import torch
import torch.nn.functional as F

from rfdarts_fast.nn import MixedOp
from rfdarts_fast.ops import reference
from rfdarts_fast.spaces import DARTS_PRIMITIVES, NASBENCH201_PRIMITIVES, SPACES


def batch_norm(x, norm):
    mean = x.mean(dim=(0, 2, 3), keepdim=True)
    variance = ((x - mean) ** 2).mean(dim=(0, 2, 3), keepdim=True)
    scaled = (x - mean) / (variance + 1e-5).sqrt()
    if norm.weight is None:
        return scaled
    return scaled * norm.weight[:, None, None] + norm.bias[:, None, None]


def depthwise(x, weight, stride, dilation=1):
    padding = dilation * (weight.shape[-1] - 1) // 2
    return F.conv2d(x, weight, None, stride, padding, dilation, groups=x.shape[1])


def separable(x, layers, stride):
    """ReLU, depthwise, pointwise, BatchNorm, twice."""
    _, dw1, pw1, bn1, _, dw2, pw2, bn2 = layers
    x = batch_norm(F.conv2d(depthwise(x.relu(), dw1.weight, stride), pw1.weight), bn1)
    return batch_norm(F.conv2d(depthwise(x.relu(), dw2.weight, 1), pw2.weight), bn2)


def dilated(x, layers, stride):
    _, dw, pw, bn = layers
    return batch_norm(F.conv2d(depthwise(x.relu(), dw.weight, stride, 2), pw.weight), bn)


def average_pool(x, stride):
    """The mean over the pixels inside the image."""
    total = F.avg_pool2d(x, 3, stride, 1, divisor_override=1)
    return total / F.avg_pool2d(torch.ones_like(x), 3, stride, 1, divisor_override=1)


def max_pool(x, stride):
    padded = F.pad(x, (1, 1, 1, 1), value=-torch.inf)
    return padded.unfold(2, 3, stride).unfold(3, 3, stride).flatten(-2).max(dim=-1).values


def factorized_reduce(x, op):
    x = x.relu()
    halves = [F.conv2d(x, op.conv_1.weight, None, 2), F.conv2d(x[:, :, 1:, 1:], op.conv_2.weight, None, 2)]
    return batch_norm(torch.cat(halves, dim=1), op.bn)


def literal(name, op, x, stride):
    """What a primitive computes, with the weights of the module `op`."""
    match name:
        case "none":
            return torch.zeros_like(x[:, :, ::stride, ::stride])
        case "skip_connect":
            return x if stride == 1 else factorized_reduce(x, op)
        case "max_pool_3x3" | "avg_pool_3x3":
            pooled = (max_pool if name.startswith("max") else average_pool)(x, stride)
            # NAS-Bench-201 has no BatchNorm behind its pool
            return batch_norm(pooled, op[1]) if isinstance(op, torch.nn.Sequential) else pooled
        case "sep_conv_3x3" | "sep_conv_5x5":
            return separable(x, op.op, stride)
        case "dil_conv_3x3" | "dil_conv_5x5":
            return dilated(x, op.op, stride)
        case "nor_conv_1x1" | "nor_conv_3x3":
            padding = 1 if name.endswith("3x3") else 0
            _, conv, bn = op.op
            return batch_norm(F.conv2d(x.relu(), conv.weight, None, stride, padding), bn)
    raise AssertionError(name)


def literal_mixed_op(edge, x, weights):
    """PC-DARTS model_search.py `MixedOp.forward` and `channel_shuffle`; DARTS's for K = 1."""
    k = edge.K
    xtemp = x[:, : x.shape[1] // k]
    xtemp2 = x[:, x.shape[1] // k :]
    terms = zip(weights, edge.primitives, edge._ops, strict=True)
    temp1 = sum(w * literal(name, op, xtemp, edge.stride) for w, name, op in terms)
    if k == 1:
        return temp1
    if temp1.shape[2] == x.shape[2]:
        ans = torch.cat([temp1, xtemp2], dim=1)
    else:
        ans = torch.cat([temp1, F.max_pool2d(xtemp2, 2, 2)], dim=1)
    batchsize, num_channels, height, width = ans.shape
    ans = ans.view(batchsize, k, num_channels // k, height, width)
    return torch.transpose(ans, 1, 2).contiguous().view(batchsize, -1, height, width)


def mixed_op(primitives, channels=8, stride=1, K=1, **options):
    edge = MixedOp(primitives, channels, stride, K, **options).double()
    for module in edge.modules():
        if isinstance(module, torch.nn.BatchNorm2d) and module.affine:
            torch.nn.init.uniform_(module.weight, 0.5, 2.0)
            torch.nn.init.normal_(module.bias)
    return edge


def images(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def softmax(*shape):
    return torch.randn(*shape, dtype=torch.float64).softmax(dim=-1)


CASES = {
    "darts": (DARTS_PRIMITIVES, {}),
    "darts-not-affine": (DARTS_PRIMITIVES, {"affine": False}),
    "nasbench201": (NASBENCH201_PRIMITIVES, {"batch_norm": False}),
    "s1-edge": (("max_pool_3x3", "skip_connect"), {}),
    "none-only": (("none",), {}),
}


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize(("primitives", "options"), CASES.values(), ids=CASES.keys())
def test_mixed_op_equals_its_definition(primitives, options, K, stride):
    edge = mixed_op(primitives, stride=stride, K=K, **options)
    x, weights = images(3, 8, 6, 6), softmax(len(primitives))
    expected = literal_mixed_op(edge, x, weights)
    assert expected.shape == (3, 8, 6 // stride, 6 // stride)
    torch.testing.assert_close(reference.mixed_op(edge, x, weights), expected, rtol=1e-12, atol=1e-12)


def test_channel_shuffle_interleaves_the_groups():
    x = torch.arange(8.0).view(1, 8, 1, 1)
    assert reference.channel_shuffle(x, 4).flatten().tolist() == [0, 2, 4, 6, 1, 3, 5, 7]


@pytest.mark.parametrize("stride", [1, 2])
def test_noise_is_standard_normal_and_drawn_anew(stride):
    edge = mixed_op(("noise", "none"), stride=stride)
    x = torch.full((4, 8, 32, 32), 7.0, dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([1.0, 0.0], dtype=torch.float64)
    first, second = (reference.mixed_op(edge, x, weights) for _ in range(2))
    assert first.shape == (4, 8, 32 // stride, 32 // stride)
    assert not torch.equal(first, second)
    # 8,192 values or more: the mean's deviation is at most 0.011
    assert abs(first.mean().item()) < 0.06
    assert abs(first.std().item() - 1) < 0.06
    assert not first.requires_grad


def wired_by_hand(edges, s0, s1, weights, edge_weights):
    """quark0/darts and PC-DARTS `Cell.forward`."""
    states = [s0, s1]
    offset = 0
    for _ in range(4):
        s = sum(
            (1 if edge_weights is None else edge_weights[offset + j])
            * literal_mixed_op(edges[offset + j], h, weights[offset + j])
            for j, h in enumerate(states)
        )
        offset += len(states)
        states.append(s)
    return states[2:]


@pytest.mark.parametrize("kind", ["normal", "reduce"])
@pytest.mark.parametrize(("K", "edge_norm"), [(1, False), (2, True)], ids=["darts", "pc-darts"])
@pytest.mark.parametrize("space", ["s1", "s3"])
def test_cell_equals_wiring_by_hand(space, K, edge_norm, kind):
    names = SPACES[space].cells[kind]
    sources = [j for node in range(4) for j in range(node + 2)]
    edges = [mixed_op(names[e], 4, 2 if kind == "reduce" and sources[e] < 2 else 1, K) for e in range(14)]
    s0, s1 = images(2, 4, 4, 4), images(2, 4, 4, 4)
    weights, edge_weights = softmax(14, len(names[0])), softmax(14) if edge_norm else None
    nodes = reference.mixed_cell(edges, [s0, s1], weights, edge_weights)
    expected = wired_by_hand(edges, s0, s1, weights, edge_weights)
    assert len(nodes) == 4
    for node, wanted in zip(nodes, expected, strict=True):
        torch.testing.assert_close(node, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("K", "stride"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_gradients_of_a_small_cell(K, stride):
    primitives = ("none", "max_pool_3x3", "avg_pool_3x3", "skip_connect", "sep_conv_3x3")
    sources = [0, 1, 0, 1, 2]
    edges = [mixed_op(primitives, 4, stride if j < 2 else 1, K) for j in sources]
    gamma = [p for edge in edges for p in edge.parameters() if p.ndim == 1]
    inputs = [images(2, 4, 4, 4), images(2, 4, 4, 4), softmax(5, 5), softmax(5)]
    for tensor in inputs:
        tensor.requires_grad_()

    def cell(s0, s1, weights, edge_weights, *_):
        return reference.mixed_cell(edges, [s0, s1], weights, edge_weights)[-1]

    assert torch.autograd.gradcheck(cell, (*inputs, *gamma[:4]), fast_mode=True)


def test_the_weight_of_none_gets_a_zero_gradient():
    edge = mixed_op(("none", "skip_connect"))
    weights = softmax(2).requires_grad_()
    reference.mixed_op(edge, images(2, 8, 4, 4), weights).sum().backward()
    assert weights.grad[0] == 0
    assert weights.grad[1] != 0


def test_module_forwards_to_the_mixed_op():
    edge = mixed_op(DARTS_PRIMITIVES, K=2)
    x, weights = images(2, 8, 4, 4), softmax(8)
    torch.testing.assert_close(edge(x, weights), literal_mixed_op(edge, x, weights), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("K", [0, 3])
def test_partial_channels_must_divide(K):
    with pytest.raises(ValueError, match="K: expected a divisor of the edge's 8 channels"):
        MixedOp(("skip_connect",), 8, 1, K)
