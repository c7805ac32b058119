"""The one rule for errors: at most twice those of plain PyTorch in the same dtype, three times for gradients.

Errors are the differences from the reference in float64, measured in each tensor by the largest and over all tensors
of a name, such as the gradients of all gammas, by the norm.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.kernels.oracles import ORACLE, Oracle
from tests.kernels.problems import Problem, Result
LOG = []

def _gaps(found: Result, truth: Result) -> dict[str, Tensor]:
    """{name: the largest difference in each tensor, and the norm of all}, in float64."""
    gaps = {}
    assert found.keys() == truth.keys()
    for name, group in truth.items():
        parts = []
        for a, b in zip(found[name], group, strict=True):
            assert (a is None) == (b is None), f"{name}: a gradient of None"
            if a is not None:
                assert a.shape == b.shape, f"{name}: expected shape {b.shape}, got {a.shape}"
                parts.append((a.double() - b.double()).flatten())
        gaps[name] = torch.stack([*(part.abs().max() for part in parts), torch.cat(parts).norm()]) if parts else torch.zeros(1)
    return gaps


def _sizes(truth: Result) -> dict[str, Tensor]:
    zero = {name: [None if x is None else torch.zeros_like(x) for x in group] for name, group in truth.items()}
    sizes = _gaps(truth, zero)
    return {name: torch.cat([size[:-1].max().expand(len(size)-1), size[-1:]]) if len(size) > 1 else size for name, size in sizes.items()}


def assert_as_good_as_torch(backend, problem, gradients=True, log=LOG, **options):
    truth = problem.run(ORACLE, torch.float64)
    plain = _gaps(problem.run(Oracle(backend.device)), truth)
    size = _sizes(truth)
    eps = torch.finfo(problem.dtype).eps
    for order in backend.orders(problem.dtype):
        ours = _gaps(problem.run(backend, **options), truth)
        for name, error in ours.items():
            times = 3 if name.startswith("gradient") else 2
            excess = (error - times * plain[name]) / (eps * size[name].clamp(min=1e-300))
            log.append((backend.name, str(problem.dtype), name, order, excess[:-1].max().item() if len(excess)>1 else 0., excess[-1].item()))
