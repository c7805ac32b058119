"""What surrounds the kernels: reasons, opcheck, instruction sets, the other convolutions."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.kernels.cpu.cells import Problem, make_cell, needs_kernels
from torch import library, nn

from rfdarts_fast import ops
from rfdarts_fast.nn.primitives import FactorizedReduce, ReLUConvBN
from rfdarts_fast.ops import reference, use_backend
from rfdarts_fast.ops.compiled import cpu
from rfdarts_fast.ops.compiled.plan import plan_of

pytestmark = needs_kernels


def test_status():
    status = cpu.status()
    assert status["isa"] in ("baseline", "avx2", "avx512")


def test_reasons():
    cell, x = list(make_cell(nodes=1)), [torch.randn(2, 16, 8, 8)] * 2
    assert cpu.why_not(cell, x) is None
    assert "float16" in cpu.why_not(cell, [t.half() for t in x])
    assert "channels" in cpu.why_not(cell, [t[:, :8] for t in x])
    assert "dtypes" in cpu.why_not(cell, [t.double() for t in x])
    assert "odd" in cpu.why_not(list(make_cell(nodes=1, reduce=True)), [t[:, :, 1:] for t in x])
    cell[0]._ops[4].op[1].weight.requires_grad_(True)
    assert "trained" in cpu.why_not(cell, x)
    cell[0]._ops[4].op[1].weight.requires_grad_(False)
    cell[0]._ops[4].op[3].eval()
    assert "evaluation" in cpu.why_not(cell, x)
    cell[0]._ops[4].op[3].train()
    # a replaced module is noticed
    cell[0]._ops[4].op[3] = nn.SyncBatchNorm(16)
    assert "SyncBatchNorm" in cpu.why_not(cell, x)


def test_changed_weights_are_noticed():
    cell, x, mix = list(make_cell(nodes=1)), [torch.randn(2, 16, 8, 8)] * 2, torch.rand(2, 8)
    before = cpu.mixed_cell(cell, x, mix)[0]
    with torch.no_grad():
        cell[0]._ops[4].op[1].weight.neg_()
    assert not torch.equal(before, cpu.mixed_cell(cell, x, mix)[0])


def test_single_value_is_refused():
    cell = list(make_cell(nodes=1, channels=4))
    with pytest.raises(ValueError, match="more than one value"):
        cpu.mixed_cell(cell, [torch.randn(1, 4, 1, 1)] * 2, torch.rand(2, 8))


def test_opcheck():
    cell = make_cell(nodes=1, channels=8, K=2)
    edges = list(cell)
    plan = plan_of(edges, 2)
    x = [torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last) for _ in range(2)]
    gamma, beta = torch.rand(len(plan.norms), 4), torch.rand(len(plan.norms), 4)
    mix, edge_weights = torch.rand(2, 8), torch.rand(2)
    ops = torch.ops.rfdarts
    common = (plan.weights(torch.float32), gamma, beta, mix)
    # aliases, shapes and dtypes; autograd lives in Python
    tests = ("test_schema", "test_faketensor")
    forward = (x, [], *common, edge_weights, None, plan.spec, 1e-5, False, True)
    library.opcheck(ops.cell_forward, forward, test_utils=tests)
    nodes, _, kept, moments = ops.cell_forward(*forward)
    again = (x, nodes, *common, moments, plan.spec, 1e-5, False)
    library.opcheck(ops.cell_branch_outputs, again, test_utils=tests)
    backward = (
        [nodes[0]],
        [0],
        x,
        nodes,
        [],
        *common,
        edge_weights,
        moments,
        kept,
        plan.spec,
        True,
        1e-5,
        False,
        [0, 1],
    )
    library.opcheck(ops.cell_backward, backward, test_utils=tests)
    for reduce in (False, True):
        widths = (4, 6)
        layers = (
            [torch.rand((4 if reduce else 2) * 8 * c) for c in widths],
            [torch.rand(c) for c in widths],
            [torch.rand(c) for c in widths],
        )
        library.opcheck(ops.relu_conv_bn_forward, (x[0], *layers, [], 1e-5, reduce), test_utils=tests)
        outs, ys, used = ops.relu_conv_bn_forward(x[0], *layers, [], 1e-5, reduce)
        backward = (outs, x[0], ys, *layers, used, 1e-5, True, reduce, True)
        library.opcheck(ops.relu_conv_bn_backward, backward, test_utils=tests)
    running = ([torch.zeros(4)], [torch.ones(4)], [torch.tensor(0)], moments[:, :1].contiguous(), 0.1, 32)
    library.opcheck(ops.update_running_stats, running, test_utils=tests)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_instruction_sets_agree(isa):
    """The same problem in a process that is told which instruction set to use."""
    code = """
import json, torch
from tests.kernels.cpu.cells import Problem, make_cell
from rfdarts_fast.ops.compiled import cpu
torch.manual_seed(3)
out = {}
for K, channels, reduce in ((1, 16, False), (4, 16, False), (1, 32, True), (2, 24, True)):
    problem = Problem(make_cell(channels=channels, K=K, reduce=reduce), 2, 8, 8, edge_weights=True)
    result = problem.run(cpu.mixed_cell)
    out |= {f"{K} {channels} {n}": v.flatten()[:40].tolist() for n, v in result.items()}
print(json.dumps([cpu.status()["isa"], out]))
"""
    here = Path(__file__).parent
    results = []
    for name in ("baseline", isa):
        path = os.pathsep.join([str(here.parents[2]), os.environ.get("PYTHONPATH", "")])
        env = {**os.environ, "RFDARTS_CPU_ISA": name, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
        )
        results.append(json.loads(done.stdout))
    (_, expected), (ran, found) = results
    if ran != isa:
        pytest.skip(f"this processor runs {ran}")
    for name in expected:
        torch.testing.assert_close(
            torch.tensor(found[name]), torch.tensor(expected[name]), rtol=1e-3, atol=2e-4, msg=name
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("c_in", "c_out"), [(64, 16), (48, 8), (5, 6)])
@pytest.mark.parametrize("kind", [ReLUConvBN, FactorizedReduce])
def test_relu_conv_bn(kind, c_in, c_out, training, dtype):
    module = (kind(c_in, c_out, 1) if kind is ReLUConvBN else kind(c_in, c_out)).to(dtype).train(training)
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.dim() == 1)
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, -1, 1)
    x, grad = torch.randn(3, c_in, 6, 8, dtype=dtype), None
    results = []
    for fused in (False, True):
        copied = copy.deepcopy(module)
        norm = copied.op[2] if kind is ReLUConvBN else copied.bn
        convs = (copied.op[1],) if kind is ReLUConvBN else (copied.conv_1, copied.conv_2)
        assert cpu.why_not_conv(x, convs, norm) is None
        leaf = x.clone().requires_grad_()
        memory = "recompute" if training else "fast"
        out = cpu.relu_conv_bn(leaf, convs, norm, memory) if fused else copied(leaf)
        grad = torch.randn_like(out) if grad is None else grad
        gradients = torch.autograd.grad(out, [leaf, norm.weight, norm.bias], grad)
        results.append([out, *gradients, *copied.buffers()])
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-11, "atol": 1e-11}
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("widths", [(16, 16), (16, 32), (5, 3, 8)], ids=str)
@pytest.mark.parametrize("kind", [ReLUConvBN, FactorizedReduce])
def test_layers_that_share_a_read_are_what_each_is_by_itself(kind, widths, training):
    widths = [c + c % 2 for c in widths] if kind is FactorizedReduce else widths
    modules = [kind(12, c, 1) if kind is ReLUConvBN else kind(12, c) for c in widths]
    for parameter in nn.ModuleList(modules).train(training).double().parameters():
        parameter.requires_grad_(parameter.dim() == 1)
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, -1, 1)
    x, grads = torch.randn(3, 12, 6, 8, dtype=torch.double), None
    results = []
    for memory in (None, "fast", "recompute"):
        copied = copy.deepcopy(modules)
        leaf = x.clone().requires_grad_()
        if memory is None:
            outs = [reference.relu_conv_bn(leaf, *module.layer()) for module in copied]
        else:
            outs = cpu.relu_conv_bns(leaf, [module.layer() for module in copied], memory)
        grads = [torch.randn_like(out) for out in outs] if grads is None else grads
        # the last is not used
        parameters = [p for module in copied[:-1] for p in module.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(outs[:-1], [leaf, *parameters], grads[:-1])
        results.append([*outs, *gradients, *(b for module in copied for b in module.buffers())])
    for ours, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    for ours, theirs in zip(results[2], results[1], strict=True):
        assert torch.equal(ours, theirs)


def test_outputs_past_the_caches_where_images_begin_amidst_a_vector():
    module, x = ReLUConvBN(3, 4, 1).requires_grad_(False), torch.randn(400, 3, 15, 15)
    with use_backend("reference"):
        expected = copy.deepcopy(module)(x)
    torch.testing.assert_close(cpu.relu_conv_bn(x, *module.layer()), expected, rtol=1e-4, atol=1e-5)


def test_memory_returns_to_the_pool():
    problem = Problem(make_cell(), 2, 8, 8)
    problem.run(cpu.mixed_cell)
    before = torch.ops.rfdarts.pool_cached()
    problem.run(cpu.mixed_cell)
    assert torch.ops.rfdarts.pool_cached() == before > 0
    torch.ops.rfdarts.pool_release()
    assert torch.ops.rfdarts.pool_cached() == 0


@pytest.mark.parametrize("memory", ["fast", "recompute"])
def test_autocast_on_the_cpu_keeps_branch_outputs_in_bfloat16(memory):
    edges = list(make_cell(channels=4))
    inputs = [torch.randn(2, 4, 6, 6) for _ in range(2)]
    weights = torch.rand(5, 8).softmax(-1)
    half = [x.bfloat16() for x in inputs]
    with use_backend("native", memory), torch.autocast("cpu", torch.bfloat16):
        found = [ops.mixed_cell(edges, x, weights) for x in (inputs, half)]
        together = ops.concatenated_cell(edges, inputs, weights)
    kept = "bfloat16" if memory == "fast" else memory
    expected = [cpu.mixed_cell(edges, [y.float() for y in x], weights, memory=kept) for x in (inputs, half)]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(torch.cat(expected[0], 1), together, rtol=0, atol=0)
    exact = cpu.mixed_cell(edges, inputs, weights)
    same = all(torch.equal(a, b) for a, b in zip(exact, expected[0], strict=True))
    assert same == (memory == "recompute")
