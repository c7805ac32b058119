"""The Triton kernels cut as large problems cut them, and in 16 bits."""

import dataclasses
import importlib

import pytest
import torch

from rfdarts_fast.ops.plan import plan_of
from tests.kernels.oracles import on, over
from tests.kernels.problems import NASBENCH201, CellProblem
from tests.kernels.tolerances import assert_as_good_as_torch, assert_same_bits
from tests.kernels.triton.device import DEVICE

THREE = ("max_pool_3x3", "skip_connect", "sep_conv_3x3")
SIX = ("none", "max_pool_3x3", "avg_pool_3x3", "skip_connect", "sep_conv_3x3", "dil_conv_3x3")


@pytest.fixture
def small_tiles(monkeypatch):
    """Cuts a small case as a large one is: several tiles, several parts of sums, several tiles in each."""
    tuning = importlib.import_module("rfdarts_fast.ops.triton.tuning")
    values = {"TILE": 128, "CHUNK": 40, "PARTS": 3, "WIDEST": 2, "PRODUCT_CHUNK": 21, "PRODUCT_PARTS": 3}
    for name, value in values.items():
        monkeypatch.setattr(tuning, name, value)
    # of products the last tile of a part is not whole
    assert tuning.parts(200) == (80, 3) and tuning.product_parts(200) == (84, 3)
    assert tuning.product_blocks(20, 60, 8) == {"BN": 16, "BK": 16}


MANY = {
    "K=2": dict(K=2, channels=8, primitives=THREE),
    "stride 2": dict(stride=2, primitives=THREE),
    "NAS-Bench-201": NASBENCH201 | dict(channels=20, nodes=1),
}


@pytest.mark.parametrize("options", MANY.values(), ids=MANY)
@on("triton")
def test_many_tiles_and_parts(backend, small_tiles, options):
    assert_as_good_as_torch(backend, CellProblem((2, 10, 10), **{"inputs": 1, "nodes": 1} | options))


@pytest.mark.parametrize("name", ["K=2", "NAS-Bench-201"])
@on("triton")
def test_results_do_not_depend_on_the_order_of_programs(backend, small_tiles, monkeypatch, name):
    """A GPU runs a kernel's programs in any order: sums that several of them add to would differ."""
    problem = CellProblem((3, 8, 8), torch.float32, **{"inputs": 1, "nodes": 1} | MANY[name])
    expected = problem.run(backend)
    programs = []
    if DEVICE == "cpu":
        builder = importlib.import_module("triton.runtime.interpreter").interpreter_builder
        set_grid_idx = builder.set_grid_idx

        def backwards(*index):
            programs.append(index)
            set_grid_idx(*(count - 1 - i for i, count in zip(index, builder.grid_dim, strict=True)))

        monkeypatch.setattr(builder, "set_grid_idx", backwards)
    assert_same_bits(problem.run(backend), expected)
    assert DEVICE == "cuda" or max(programs) > (2, 0, 0)


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter checks this")
@pytest.mark.parametrize(
    "options",
    [dict(primitives=SIX, K=2, stride=2, inputs=1, nodes=1), NASBENCH201 | dict(channels=3, nodes=1)],
    ids=["K=2, stride 2", "NAS-Bench-201"],
)
@on("triton")
def test_no_index_overflows(backend, monkeypatch, options):
    builder = importlib.import_module("triton.runtime.interpreter").interpreter_builder
    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=True))
    assert_as_good_as_torch(backend, CellProblem((2, 4, 6), **options))


@over(
    (
        "triton",
        (torch.float32, torch.bfloat16, torch.float16),
        {
            "stride 1": dict(inputs=1, nodes=2),
            "K=4, stride 2": dict(inputs=2, nodes=1, K=4, channels=16, stride=2),
            "NAS-Bench-201": NASBENCH201 | dict(nodes=2),
        },
    )
)
def test_as_good_as_plain_pytorch(backend, dtype, options, monkeypatch):
    tuning = importlib.import_module("rfdarts_fast.ops.triton.tuning")
    # the interpreter adds a tile's rows one after the other, a GPU adds them in a tree
    monkeypatch.setattr(tuning, "TILE", 256 if DEVICE == "cpu" else tuning.TILE)
    # one gradient of two edge weights is a matter of luck where PyTorch rounds well
    draws = 3 if dtype == torch.float32 else 1
    options = {"primitives": SIX[1:]} | options
    problems = [CellProblem((4, 6, 10), dtype, **options) for _ in range(draws)]
    assert_as_good_as_torch(backend, *problems)


@pytest.mark.parametrize("primitives", [SIX[1:3], ("nor_conv_1x1", "nor_conv_3x3")], ids=["pools", "convs"])
@on("triton")
def test_statistics_of_values_far_from_zero(backend, primitives):
    """A sum of squares in float32 would be all rounding."""
    problem = CellProblem(
        (4, 8, 8), torch.float32, primitives=primitives, inputs=1, nodes=1, place=lambda x: x.add_(1000)
    )
    assert_as_good_as_torch(backend, problem, gradients=False)


@pytest.mark.parametrize("options", [dict(primitives=SIX, inputs=1), NASBENCH201], ids=["DARTS", "201"])
@on("triton")
def test_memory_modes_keep_less(backend, options):
    def kept(memory):
        problem, held = CellProblem((2, 4, 6), torch.float32, **options | {"nodes": 1}), {}
        module, inputs, weights = problem.leaves(backend)

        def hold(x):
            held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(hold, lambda x: x):
            alive = problem.compute(backend, module, inputs, *weights, memory=memory)
        assert alive
        return sum(held.values())

    assert kept("fast") > kept("bfloat16") > kept("recompute")
    # as a memory budget counts
    plan = plan_of(list(CellProblem(**options | {"nodes": 1}).module), 1)
    outputs = 2 * 4 * 6 * 4 * 4 * backend.backend.kept_outputs(plan)
    # beside the places of maxima
    assert kept("fast") - kept("recompute") in (outputs, outputs + 2 * 4 * 6 * 4)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: nothing is tuned under the interpreter")
@on("triton")
def test_tuned_kernels(backend):
    for options in (
        dict(channels=16, inputs=1, nodes=4),
        dict(channels=32, K=4, stride=2),
        NASBENCH201 | dict(channels=32),
    ):
        assert_as_good_as_torch(backend, CellProblem((4, 32, 32), **options), poison=False)
