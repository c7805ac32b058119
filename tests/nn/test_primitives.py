"""Every registered primitive keeps what its entry says."""

import pytest
import torch
from torch import nn

from rfdarts_fast.nn import PRIMITIVES, MixedOp, Primitive, make_primitive, register_primitive


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", PRIMITIVES)
def test_shape_gradient_and_flags(name, stride):
    op = make_primitive(name, 4, stride)
    x = torch.randn(2, 4, 6, 8, requires_grad=True)
    y = op(x)
    assert y.shape == (2, 4, 6 // stride, 8 // stride)
    if name != "noise":
        (grad,) = torch.autograd.grad(y.square().sum(), x)
        assert grad.isfinite().all() and bool(grad.any()) == (name != "none")
    if stride == 1:
        assert PRIMITIVES[name].parameter_free == (not list(op.parameters()))
    assert not [m for m in make_primitive(name, 4, stride, affine=False).modules() if getattr(m, "affine", 0)]
    assert not list(make_primitive(name, 4, stride, track=False).buffers())


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("name", PRIMITIVES)
def test_batch_norm_stands_behind_the_primitives_that_say_so(name, batch_norm):
    op = MixedOp([name], 8, 1, K=2, batch_norm=batch_norm)._ops[0]
    behind = isinstance(op, nn.Sequential) and isinstance(op[-1], nn.BatchNorm2d)
    assert behind == (batch_norm and name in ("max_pool_3x3", "avg_pool_3x3"))


def test_no_name_means_a_batch_norm(monkeypatch):
    monkeypatch.setitem(PRIMITIVES, "pool_of_mine", Primitive("pool_of_mine", lambda *_: nn.Identity()))
    assert type(MixedOp(["pool_of_mine"], 4, 1)._ops[0]) is nn.Identity


@pytest.mark.parametrize(
    ("primitive", "message"),
    [
        (Primitive("none", nn.Identity), "primitive: expected a new name, an identifier, got 'none'"),
        (Primitive("a|b", nn.Identity), "primitive: expected a new name, an identifier, got 'a|b'"),
        (Primitive("mine", "Mine"), "primitive mine: expected make.channels, stride, .*, got 'Mine'"),
    ],
    ids=["taken", "no-name", "no-function"],
)
def test_bad_entries_are_refused(primitive, message):
    before = dict(PRIMITIVES)
    with pytest.raises(ValueError, match=message):
        register_primitive(primitive)
    assert before == PRIMITIVES


def test_an_unknown_name():
    with pytest.raises(ValueError, match=r"primitive: expected one of none, noise, .*, got 'blur_3x3'"):
        make_primitive("blur_3x3", 4, 1)
