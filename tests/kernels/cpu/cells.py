"""Random cells of mixed ops, and what the engine and the reference make of them."""

import copy
import math

import pytest
import torch
from torch import nn

from rfdarts_fast.nn.supernet import MixedOp
from rfdarts_fast.ops import reference
from rfdarts_fast.ops.compiled import cpu
from rfdarts_fast.spaces import DARTS_PRIMITIVES

needs_kernels = pytest.mark.skipif(not cpu.status()["built"], reason="the kernels were not built")


def make_cell(
    inputs=2, nodes=2, channels=16, K=1, reduce=False, primitives=DARTS_PRIMITIVES, affine=True, track=True
):
    cell = nn.ModuleList()
    for node in range(nodes):
        for j in range(inputs + node):
            stride = 2 if reduce and j < inputs else 1
            cell.append(MixedOp(primitives, channels, stride, K, affine, track))
    for module in cell.modules():
        if isinstance(module, nn.Conv2d):
            module.requires_grad_(False)
        elif isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    return cell


class Problem:
    """A cell with inputs, weights and output gradients, in any dtype."""

    def __init__(self, cell, n, h, w, inputs=2, edge_weights=False, dtype=torch.float32):
        self.cell = cell.to(dtype)
        edges = list(cell)
        self.inputs = inputs
        channels, primitives = edges[0].channels, len(edges[0].primitives)
        self.x = [torch.randn(n, channels, h, w, dtype=dtype) for _ in range(self.inputs)]
        self.mix = torch.randn(len(edges), primitives, dtype=dtype).softmax(-1)
        self.edge_weights = torch.rand(len(edges), dtype=dtype) if edge_weights else None
        stride = edges[0].stride
        nodes = _whole(len(edges), self.inputs)
        self.grads = [torch.randn(n, channels, h // stride, w // stride, dtype=dtype) for _ in range(nodes)]

    def run(self, engine, dtype=None, **options):
        """Outputs, gradients (inputs, mix, edge weights, BatchNorm parameters) and buffers, by name."""
        cell = copy.deepcopy(self.cell).to(dtype)
        cast = lambda t: t.detach().to(dtype).clone(memory_format=torch.preserve_format)  # noqa: E731
        x = [cast(t).requires_grad_() for t in self.x]
        mix = cast(self.mix).requires_grad_()
        edge_weights = None if self.edge_weights is None else cast(self.edge_weights).requires_grad_()
        nodes = engine(list(cell), x, mix, edge_weights, **options)
        result = {f"node {i}": node.detach() for i, node in enumerate(nodes)}
        loss = sum((node * grad.to(node.dtype)).sum() for node, grad in zip(nodes, self.grads, strict=True))
        leaves = {f"input {i}": t for i, t in enumerate(x)} | {"mix": mix}
        if edge_weights is not None:
            leaves["edge weights"] = edge_weights
        leaves |= {name: p for name, p in cell.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
            result[f"gradient of {name}"] = torch.zeros_like(leaf) if gradient is None else gradient
        return result | {name: buffer.clone() for name, buffer in cell.named_buffers()}


def nearest_kink(problem):
    """How close in float64 a ReLU's input comes to 0, or a maximum to the next: there derivatives jump."""
    cell, found = copy.deepcopy(problem.cell).double(), [math.inf]

    def relu(_, x):
        found.append(x[0].abs().min().item())

    def pool(module, x):
        padded = nn.functional.pad(x[0], (1, 1, 1, 1), value=-1e9)
        windows = nn.functional.unfold(padded, 3, stride=module.stride).unflatten(1, (-1, 9))
        first, second = windows.topk(2, dim=2).values.unbind(2)
        found.append((first - second).min().item())

    for module in cell.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_pre_hook(relu)
        elif isinstance(module, nn.MaxPool2d):
            module.register_forward_pre_hook(pool)
    weights = problem.edge_weights
    with torch.no_grad():
        inputs = [x.double() for x in problem.x]
        reference.mixed_cell(
            list(cell), inputs, problem.mix.double(), None if weights is None else weights.double()
        )
    return min(found)


def _whole(edges, inputs):
    """Nodes of a cell with that many edges, or 0."""
    nodes = 0
    while edges > 0:
        edges -= inputs + nodes
        nodes += 1
    return nodes if edges == 0 else 0


def assert_as_good_as_torch(problem, *more, gradients=True, **options):
    """Error against float64: at most twice torch's own (gradients: three times), and a floor.

    gradients=False: of values and running statistics only. more: other problems of that shape; errors of the
    few edge weights count in the mean square over all of them, for a sum may be exact by luck.
    """
    first, *others = (_errors(p, **options) for p in (problem, *more))
    for name, row in first.items():
        if name.startswith("gradient") and not gradients:
            continue
        if name == "gradient of edge weights":
            rows = torch.tensor([row, *(other[name] for other in others)], dtype=torch.float64)
            row = rows.square().mean(0).sqrt().tolist()
        error, allowed, floor = row
        factor = 3 if name.startswith("gradient") else 2
        assert error <= factor * allowed + floor, (
            f"{name}: {error:.2e}, torch {allowed:.2e}, floor {floor:.2e}"
        )


def _errors(problem, **options):
    """{name: (largest error, torch's, floor)}"""
    assert cpu.why_not(list(problem.cell), problem.x) is None
    truth = problem.run(reference.mixed_cell, torch.float64)
    plain = problem.run(reference.mixed_cell, problem.x[0].dtype)
    ours = problem.run(cpu.mixed_cell, problem.x[0].dtype, **options)
    # sums over the images cancel, so that errors are measured against the largest entry of their kind
    scale = {}
    for name, value in truth.items():
        kind = name.rsplit(".", 1)[-1]
        scale[kind] = max(scale.get(kind, 0.0), value.abs().max().item() if value.numel() else 0.0)
    eps = torch.finfo(problem.x[0].dtype).eps
    # in float64 torch is the truth itself
    share = (8 if eps > 1e-10 else 1e4) * eps
    found = {}
    for name, value in truth.items():
        error, allowed = ((a[name].double() - value).abs().max().item() for a in (ours, plain))
        found[name] = error, allowed, share * scale[name.rsplit(".", 1)[-1]]
    return found
