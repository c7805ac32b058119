"""The Triton kernels cut as large problems cut them, and in 16 bits."""

import dataclasses
import importlib

import pytest
import torch

from tests.kernels.oracles import on, over
from tests.kernels.problems import CellProblem
from tests.kernels.tolerances import assert_as_good_as_torch, assert_same_bits
from tests.kernels.triton.device import DEVICE

THREE = ("max_pool_3x3", "skip_connect", "sep_conv_3x3")
SIX = ("none", "max_pool_3x3", "avg_pool_3x3", "skip_connect", "sep_conv_3x3", "dil_conv_3x3")


@pytest.fixture
def small_tiles(monkeypatch):
    """Cuts a small case as a large one is: several tiles, several parts of sums, several tiles in each."""
    tuning = importlib.import_module("rfdarts_fast.ops.triton.tuning")
    for name, value in {"TILE": 128, "CHUNK": 40, "PARTS": 3, "WIDEST": 2}.items():
        monkeypatch.setattr(tuning, name, value)
    assert tuning.parts(200) == (80, 3)


@pytest.mark.parametrize("options", [dict(K=2, channels=8), dict(stride=2)], ids=str)
@on("triton")
def test_many_tiles_and_parts(backend, small_tiles, options):
    assert_as_good_as_torch(backend, CellProblem((2, 10, 10), primitives=THREE, inputs=1, nodes=1, **options))


@on("triton")
def test_results_do_not_depend_on_the_order_of_programs(backend, small_tiles, monkeypatch):
    """A GPU runs a kernel's programs in any order: sums that several of them add to would differ."""
    problem = CellProblem((3, 8, 8), torch.float32, primitives=THREE, K=2, channels=8, inputs=1, nodes=1)
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
@on("triton")
def test_no_index_overflows(backend, monkeypatch):
    builder = importlib.import_module("triton.runtime.interpreter").interpreter_builder
    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=True))
    assert_as_good_as_torch(backend, CellProblem((2, 4, 6), primitives=SIX, K=2, stride=2, inputs=1, nodes=1))


@over(
    (
        "triton",
        (torch.float32, torch.bfloat16, torch.float16),
        {
            "stride 1": dict(inputs=1, nodes=2),
            "K=4, stride 2": dict(inputs=2, nodes=1, K=4, channels=16, stride=2),
        },
    )
)
def test_as_good_as_plain_pytorch(backend, dtype, options, monkeypatch):
    tuning = importlib.import_module("rfdarts_fast.ops.triton.tuning")
    # the interpreter adds a tile's rows one after the other, a GPU adds them in a tree
    monkeypatch.setattr(tuning, "TILE", 256 if DEVICE == "cpu" else tuning.TILE)
    # one gradient of two edge weights is a matter of luck where PyTorch rounds well
    draws = 3 if dtype == torch.float32 else 1
    problems = [CellProblem((4, 6, 10), dtype, primitives=SIX[1:], **options) for _ in range(draws)]
    assert_as_good_as_torch(backend, *problems)


@on("triton")
def test_statistics_of_values_far_from_zero(backend):
    """A sum of squares in float32 would be all rounding."""
    problem = CellProblem(
        (4, 8, 8), torch.float32, primitives=SIX[1:3], inputs=1, nodes=1, place=lambda x: x.add_(1000)
    )
    assert_as_good_as_torch(backend, problem, gradients=False)


@on("triton")
def test_memory_modes_keep_less(backend):
    def kept(memory):
        problem, held = CellProblem((2, 4, 6), torch.float32, primitives=SIX, inputs=1, nodes=1), {}
        module, inputs, weights = problem.leaves(backend)

        def hold(x):
            held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(hold, lambda x: x):
            alive = problem.compute(backend, module, inputs, *weights, memory=memory)
        assert alive
        return sum(held.values())

    assert kept("fast") > kept("bfloat16") > kept("recompute")


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: nothing is tuned under the interpreter")
@on("triton")
def test_tuned_kernels(backend):
    for options in (dict(channels=16, inputs=1, nodes=4), dict(channels=32, K=4, stride=2)):
        assert_as_good_as_torch(backend, CellProblem((4, 32, 32), **options), poison=False)
