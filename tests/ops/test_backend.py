"""The choice of a backend, and the way of a call to it."""

import contextlib
from types import MappingProxyType

import pytest
import torch
from torch import nn

from rfdarts_fast import ops
from rfdarts_fast.nn import MixedOp
from rfdarts_fast.nn.primitives import FactorizedReduce, ReLUConvBN
from rfdarts_fast.ops import (
    BackendError,
    ReLUConvBNLayer,
    backends,
    contract,
    dispatch,
    reference,
    register_backend,
    use_backend,
)
from rfdarts_fast.ops.backend import backend_name, fall_back


class Recorder:
    """A backend that notes what it is asked, and leaves the computing to the reference."""

    def __init__(self, name, priority=30, devices=("cpu",), against=None):
        self.name, self.priority, self.devices = name, priority, frozenset(devices)
        self.against = against
        self.synchronises = False
        self.calls = []

    def unsupported_cell(self, call):
        return self.against

    def mixed_cell(self, call):
        self.calls.append(call)
        return [call.inputs[0]] * call.plan.nodes

    def kept_outputs(self, plan):
        return len(plan.edges)

    def unsupported_layer(self, x, layer):
        return self.against

    def relu_conv_bns(self, x, layers, memory):
        self.calls.append(layers)
        return [reference.relu_conv_bn(x, *layer) for layer in layers]

    def status(self):
        return {"built": True}


@pytest.fixture
def registry(monkeypatch):
    """An empty registry; what is put into it is gone afterwards."""
    empty = {}
    monkeypatch.setattr(contract, "_backends", empty)
    return empty


def frozen(module):
    return module.requires_grad_(False)


def edge(channels=4, **options):
    return frozen(MixedOp(("skip_connect", "sep_conv_3x3"), channels, 1, **options))


def run(edges=None):
    edges = edges or [edge()]
    return ops.mixed_cell(edges, [torch.randn(2, 4, 6, 6)], torch.rand(len(edges), 2))


def test_an_unknown_backend_in_the_environment_is_named(monkeypatch):
    monkeypatch.setattr(use_backend, "name", "cudnn")
    with pytest.raises(BackendError, match=r"RFDARTS_BACKEND: expected one of .*, got 'cudnn'"):
        backend_name()


@pytest.mark.parametrize(("arguments", "named"), [(("cudnn",), "backend"), (("auto", "small"), "memory")])
def test_unknown_names_are_refused(arguments, named):
    with pytest.raises(ValueError, match=f"{named}: expected one of"):
        use_backend(*arguments)


def test_a_block_puts_the_choice_back():
    before = use_backend.name, use_backend.memory
    with use_backend("reference", "recompute"):
        assert (use_backend.name, use_backend.memory) == ("reference", "recompute")
    assert (use_backend.name, use_backend.memory) == before


def test_falling_back_is_told_once_and_raises_where_a_backend_was_named():
    with use_backend("auto"), pytest.warns(RuntimeWarning, match="a reason of its own") as told:
        fall_back("a reason of its own")
        fall_back("a reason of its own")
    assert len(told) == 1
    with use_backend("cpu"), pytest.raises(BackendError, match="cpu cannot run: a reason"):
        fall_back("a reason of its own")


def test_the_package_registers_its_three():
    assert set(backends()) == {"cpu", "cuda", "triton"}
    assert isinstance(backends(), MappingProxyType)


def test_names_are_taken_once(registry):
    ops.register_backend(Recorder("one"))
    for name in ("one", "auto", "reference"):
        with pytest.raises(ValueError, match=f"backend: expected a name of its own, got '{name}'"):
            ops.register_backend(Recorder(name))


def test_auto_asks_by_priority_and_only_for_its_device(registry):
    low, high = Recorder("low", 1), Recorder("high", 2)
    other = Recorder("other", 3, devices=("cuda",))
    for backend in (low, high, other):
        ops.register_backend(backend)
    run()
    assert [len(b.calls) for b in (low, high, other)] == [0, 1, 0]
    high.against = "not now"
    run()
    assert [len(b.calls) for b in (low, high, other)] == [1, 1, 0]
    with use_backend("other"):
        run()
    assert len(other.calls) == 1


def test_reasons_are_told_together(registry):
    ops.register_backend(Recorder("one", against="no one"))
    ops.register_backend(Recorder("two", against="no two"))
    with pytest.warns(RuntimeWarning, match="no one; no two"):
        run()


@pytest.mark.parametrize(
    "module", [ReLUConvBN(4, 4, 1), FactorizedReduce(4, 4)], ids=["ReLUConvBN", "FactorizedReduce"]
)
def test_a_named_backend_raises_for_cells_and_for_preprocessing(module):
    x = torch.randn(2, 4, 6, 6)
    backend = Recorder("mine", against="a reason")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contract, "_backends", {"mine": backend})
        with use_backend("mine"):
            with pytest.raises(BackendError, match="mine cannot run: a reason"):
                run()
            with pytest.raises(BackendError, match="mine cannot run: a reason"):
                module(x)
            backend.against = None
            module(x)
    assert len(backend.calls) == 1


@pytest.mark.parametrize("name", ["cpu", "cuda", "triton"])
def test_trained_convolutions_are_refused_by_name_and_left_to_the_reference_without(name):
    module, x = ReLUConvBN(4, 4, 1), torch.randn(2, 4, 6, 6)
    if name != "triton":
        with use_backend(name), pytest.raises(BackendError, match=f"{name} cannot run"):
            module(x)
    with use_backend(name), pytest.raises(BackendError, match=f"{name} cannot run"):
        run([MixedOp(("skip_connect", "sep_conv_3x3"), 4, 1)])
    with use_backend("auto"):
        module(x)


def test_the_plan_is_looked_up_once_a_call(registry, monkeypatch):
    ops.register_backend(Recorder("one", against="not this one"))
    ops.register_backend(Recorder("two"))
    looked_up = []
    plan_of = dispatch.plan_of
    monkeypatch.setattr(dispatch, "plan_of", lambda *a: looked_up.append(a) or plan_of(*a))
    edges = [edge()]
    run(edges)
    run(edges)
    assert len(looked_up) == 2
    assert registry["two"].calls[0].plan is registry["two"].calls[1].plan


def test_an_exchanged_module_is_noticed(registry):
    ops.register_backend(Recorder("one"))
    edges = [edge()]
    run(edges)
    edges[0]._ops[1].op[3] = nn.BatchNorm2d(4)
    run(edges)
    first, second = registry["one"].calls
    assert first.plan is not second.plan and second.plan.norms[0] is not first.plan.norms[0]


@pytest.mark.parametrize("name", ["auto", "reference"])
@pytest.mark.parametrize(
    ("op_weights", "edge_weights", "message"),
    [
        ((2, 2), (3,), r"op_weights: expected \[3, 2\], got \[2, 2\]"),
        ((3, 3), (3,), r"op_weights: expected \[3, 2\], got \[3, 3\]"),
        ((3, 2), (2,), r"edge_weights: expected \[3\], got \[2\]"),
        ((3, 2), (3, 1), r"edge_weights: expected \[3\], got \[3, 1\]"),
    ],
)
def test_weights_of_another_shape_are_refused(name, op_weights, edge_weights, message):
    edges = [edge(K=2) for _ in range(3)]
    inputs = [torch.randn(2, 4, 6, 6)]
    with use_backend(name), pytest.raises(ValueError, match=message):
        ops.mixed_cell(edges, inputs, torch.rand(op_weights), torch.rand(edge_weights))


def test_unfit_numbers_of_edges_are_left_to_the_reference():
    assert "no whole number of nodes" in dispatch.cell_call(
        [edge(), edge()], [torch.zeros(1)], torch.rand(2, 2)
    )


@pytest.mark.parametrize("able", [False, True])
def test_a_backend_sees_synchronised_batch_norms_only_if_it_can_take_them(registry, monkeypatch, able):
    monkeypatch.setattr(dispatch, "synchronised", lambda norms: True)
    backend = Recorder("theirs")
    backend.synchronises = able
    register_backend(backend)
    edge = frozen(MixedOp(("skip_connect", "sep_conv_3x3"), 4, 1))
    x, op_weights = torch.randn(2, 4, 4, 4), torch.rand(1, 2)
    layer = ReLUConvBNLayer((frozen(nn.Conv2d(4, 4, 1, bias=False)),), nn.BatchNorm2d(4))
    with use_backend("theirs"), contextlib.ExitStack() as stack:
        if not able:
            reason = "no BatchNorm over several processes in the backend theirs"
            stack.enter_context(pytest.raises(BackendError, match=reason))
        dispatch.mixed_cell([edge], [x], op_weights)
    with use_backend("theirs"), contextlib.ExitStack() as stack:
        if not able:
            stack.enter_context(pytest.raises(BackendError, match=reason))
        dispatch.relu_conv_bns(x, [layer])
    assert len(backend.calls) == (2 if able else 0)
    assert all(call.synchronised for call in backend.calls[:1])
