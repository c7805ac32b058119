"""Tiles, parts of sums, tuning, 16-bit types; cells of all backends are in tests/kernels/test_cells.py."""

import dataclasses
import importlib

import pytest
import torch

from rfdarts_fast.spaces import DARTS_PRIMITIVES
from tests.kernels.oracles import Oracle, on
from tests.kernels.problems import CellProblem
from tests.kernels.tolerances import TRUTH, assert_as_good_as_torch, assert_same_bits, errors
from tests.kernels.triton.device import DEVICE

pytestmark = on("triton")
FEW = ("max_pool_3x3", "skip_connect", "sep_conv_3x3")


def cell(shape=(2, 4, 6), dtype=torch.float64, **options):
    return CellProblem(shape, dtype, **dict(inputs=1, nodes=1, primitives=FEW) | options)


def change_tuning(monkeypatch, **values):
    tuning = importlib.import_module("rfdarts_fast.ops.triton.tuning")
    for name, value in values.items():
        monkeypatch.setattr(tuning, name, value)
    return tuning


@pytest.fixture
def small_tiles(backend, monkeypatch):
    """Cuts a small case as a large one is: several tiles, several parts of sums, several tiles in each."""
    tuning = change_tuning(monkeypatch, TILE=128, CHUNK=40, PARTS=3, WIDEST=2)
    assert tuning.parts(200) == (80, 3)


@pytest.mark.parametrize("options", [dict(K=2, channels=8), dict(stride=2)], ids=str)
def test_many_tiles_and_parts(backend, small_tiles, options):
    assert_as_good_as_torch(backend, cell((2, 10, 10), **options))


def test_results_do_not_depend_on_the_order_of_programs(backend, small_tiles, monkeypatch):
    """A GPU runs a kernel's programs in any order: sums that several of them add to would differ."""
    problem = cell((3, 8, 8), torch.float32, K=2, channels=8)
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
def test_no_index_overflows(backend, monkeypatch):
    builder = importlib.import_module("triton.runtime.interpreter").interpreter_builder
    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=True))
    assert_as_good_as_torch(backend, cell(K=2, stride=2, primitives=(*FEW, "avg_pool_3x3", "dil_conv_3x3")))


@pytest.fixture
def short_sums(backend, monkeypatch):
    """Small tiles: the interpreter adds a tile's rows one after the other, a GPU adds them in a tree."""
    if DEVICE == "cpu":
        change_tuning(monkeypatch, TILE=256)


@pytest.mark.parametrize("options", [dict(nodes=2), dict(stride=2, K=4, channels=16, inputs=2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_as_good_as_plain_pytorch_in_the_same_dtype(backend, short_sums, dtype, options):
    primitives = (*FEW, "avg_pool_3x3", "dil_conv_3x3")
    assert_as_good_as_torch(backend, cell((4, 6, 10), dtype, primitives=primitives, **options))


def test_statistics_of_values_far_from_zero(backend, monkeypatch):
    """A sum of squares in float32 would be all rounding here."""
    if DEVICE == "cpu":
        change_tuning(monkeypatch, TILE=64)
    problem = cell((4, 8, 8), torch.float32, primitives=("avg_pool_3x3", "max_pool_3x3"))
    problem.inputs = [x + 1000 for x in problem.inputs]
    truth = problem.run(TRUTH, torch.float64)
    ours, plain = errors(problem.run(backend), truth), errors(problem.run(Oracle(DEVICE)), truth)
    for name, floor in {"output 0": 1e-6, "running_mean": 1e-6, "running_var": 1e-5}.items():
        size = torch.stack([x.norm() for x in truth[name]]).norm()
        assert ours[name][-1] <= 2 * plain[name][-1] + floor * size, name


def test_memory_modes_keep_less(backend):
    def saved(memory):
        problem, held = cell(dtype=torch.float32), {}

        def hold(x):
            held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(hold, lambda x: x):
            edges, inputs, weights = problem.leaves(backend)
            alive = problem.compute(backend, edges, inputs, *weights, memory=memory)
        assert alive
        return sum(held.values())

    assert saved("fast") > saved("bfloat16") > saved("recompute")


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: nothing is tuned under the interpreter")
@pytest.mark.parametrize("options", [dict(nodes=4), dict(K=4, stride=2, inputs=2, nodes=2)], ids=str)
def test_tuned_kernels(backend, options):
    problem = cell((4, 32, 32), primitives=DARTS_PRIMITIVES, channels=32, **options)
    # Triton tunes where algorithms need not be deterministic
    assert_as_good_as_torch(backend, problem, poison=False)
