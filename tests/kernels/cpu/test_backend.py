"""The CPU backend as the package sees it: its refusals, instruction sets, memory and autocast."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from rfdarts_fast import ops
from rfdarts_fast.ops import dispatch, use_backend
from tests.kernels.oracles import on
from tests.kernels.problems import CellProblem

ROOT = Path(__file__).resolve().parents[3]
ISAS = "baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16"


@on("cpu")
def test_reasons_against_a_cell(backend):
    edges, inputs, weights = CellProblem(dtype=torch.float32, nodes=1).leaves(backend)

    def reason(*inputs, edges=edges):
        call = dispatch.cell_call(list(edges), inputs, *weights)
        return call if isinstance(call, str) else backend.backend.unsupported_cell(call)

    x = inputs[0]
    assert reason(x, x) is None
    assert "float16" in reason(x.half(), x.half())
    assert reason(x, x.double()) == "inputs of different dtypes"
    assert "channels" in reason(x[:, :2], x[:, :2])
    assert "dtypes" in reason(x.double(), x.double())
    reduced = CellProblem(dtype=torch.float32, nodes=1, stride=2).module
    assert "odd" in reason(x[:, :, 1:], x[:, :, 1:], edges=reduced)
    half = edges[0]._ops[4].op
    half[1].weight.requires_grad_(True)
    assert "trained" in reason(x, x)
    half[1].weight.requires_grad_(False)
    half[3].eval()
    assert "evaluation" in reason(x, x)
    half[3].train()
    # a replaced module is noticed
    half[3] = nn.SyncBatchNorm(4)
    assert "SyncBatchNorm" in reason(x, x)


@pytest.mark.parametrize("isa", ISAS)
@on("cpu")
def test_every_instruction_set_is_as_good_as_plain_pytorch(backend, isa):
    """In a process that is told which one to use."""
    status = backend.backend.status()
    if ISAS.index(isa) > ISAS.index(status["isa_best"]):
        pytest.skip(f"the best here is {status['isa_best']}, AMX: {status['amx']}")
    code = """
import torch
from rfdarts_fast.ops import backends
from tests.kernels.oracles import CPUKernels
from tests.kernels.problems import CellProblem, LayerProblem
from tests.kernels.tolerances import assert_as_good_as_torch

torch.manual_seed(3)
kernels = CPUKernels(backends()["cpu"])
for K, channels, stride in (1, 16, 1), (4, 16, 1), (1, 32, 2), (2, 24, 2):
    problem = CellProblem(dtype=torch.float32, channels=channels, K=K, stride=stride, edge_weights=True)
    assert_as_good_as_torch(kernels, problem)
for reduce in (False, True):
    assert_as_good_as_torch(kernels, LayerProblem(dtype=torch.float32, channels=(24, 10), reduce=reduce))
print(kernels.backend.status()["isa"])
"""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    variables = {**os.environ, "RFDARTS_CPU_ISA": isa, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [isa]


@on("cpu")
def test_memory_returns_to_the_pool(backend):
    problem, pool = CellProblem(dtype=torch.float32), torch.ops.rfdarts
    problem.run(backend)
    before = pool.pool_cached()
    problem.run(backend)
    assert pool.pool_cached() == before > 0
    pool.pool_release()
    assert pool.pool_cached() == 0


@pytest.mark.parametrize("memory", ["fast", "recompute"])
@on("cpu")
def test_autocast_keeps_branch_outputs_in_bfloat16(backend, memory):
    # six channels are multiplied in float32
    edges, inputs, weights = CellProblem((2, 6, 6), torch.float32, channels=6).leaves(backend)
    edges, half = list(edges), [x.bfloat16() for x in inputs]
    with use_backend("cpu", memory), torch.autocast("cpu", torch.bfloat16):
        found = [ops.mixed_cell(edges, x, *weights) for x in (inputs, half)]
        concat = ops.concat_cell(edges, inputs, *weights)
    kept = "bfloat16" if memory == "fast" else memory
    expected = [backend.cell(edges, [y.float() for y in x], *weights, memory=kept) for x in (inputs, half)]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(torch.cat(expected[0], 1), concat, rtol=0, atol=0)
    exact = backend.cell(edges, inputs, *weights)
    assert all(map(torch.equal, exact, expected[0])) == (memory == "recompute")


@on("cpu")
def test_status(backend):
    status = backend.backend.status()
    assert status["isa"] in ISAS
    assert (status["amx"] == "available") == (status["isa_best"] == "amx_bf16")
