"""The rule for errors: at most twice those of plain PyTorch in the same dtype, of gradients three times.

Errors are differences from the reference in float64. Their norm over all tensors of a name (the gradients of all
gammas, say) is measured, and, but for 16-bit types, the largest in each tensor: in 16 bits, rounding takes single
values to the other side of a kink.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.kernels.oracles import Kernels, Oracle
from tests.kernels.problems import Problem, Result

TRUTH = Oracle()
# What is allowed beside, in eps of the largest entry (of the norm: `Kernels.floor_of_norm`), for plain PyTorch may be
# exact by luck.
FLOOR_OF_LARGEST = 8.0
# In float64 plain PyTorch is the truth itself.
FLOOR_IN_FLOAT64 = 100.0


def assert_as_good_as_torch(
    backend: Kernels, problem: Problem, *draws: Problem, gradients: bool = True, **options
) -> None:
    """Measures what a backend makes of a problem by the rule; in float64, in each of its schedules.

    Args:
        draws: more problems of that shape: errors of the few edge weights are the root of the mean square over all.
        gradients: False for outputs and running statistics alone.
        options: of `Problem.run`.
    """
    dtype, problems = problem.dtype, [problem, *draws]
    exact = dtype == torch.float64
    truths = [each.run(TRUTH, torch.float64) for each in problems]
    sizes = [_sizes(truth) for truth in truths]
    plain = [
        errors(truth if exact and backend.device == "cpu" else each.run(Oracle(backend.device)), truth)
        for each, truth in zip(problems, truths, strict=True)
    ]
    for _ in backend.schedules():
        ours = [
            errors(each.run(backend, **options), truth) for each, truth in zip(problems, truths, strict=True)
        ]
        for name in truths[0]:
            if name.startswith("gradient") and not gradients:
                continue
            used = slice(None) if name == "gradient of edge_weights" else slice(1)
            error, theirs, size = (
                torch.stack([each[name] for each in measured[used]]).square().mean(0).sqrt()
                for measured in (ours, plain, sizes)
            )
            floor = torch.full_like(size, FLOOR_IN_FLOAT64 if exact else FLOOR_OF_LARGEST)
            floor[-1] = FLOOR_IN_FLOAT64 if exact else backend.floor_of_norm
            bound = (3 if name.startswith("gradient") else 2) * theirs + floor * torch.finfo(dtype).eps * size
            measured = slice(-1, None) if dtype.itemsize == 2 else slice(None)
            # a NaN is an error too
            assert (error <= bound)[measured].all(), (
                f"{name}: errors {error}, allowed {bound}, PyTorch's {theirs}"
            )
        if not exact:
            break


def assert_same_bits(found: Result, expected: Result) -> None:
    assert found.keys() == expected.keys()
    for name, tensors in expected.items():
        for a, b in zip(found[name], tensors, strict=True):
            assert (a is b is None) or torch.equal(a, b), name


def errors(found: Result, truth: Result) -> dict[str, Tensor]:
    """{name: the largest difference in each tensor, then the norm of all}, in float64."""
    assert found.keys() == truth.keys()
    measured = {}
    for name, tensors in truth.items():
        gaps = []
        for a, b in zip(found[name], tensors, strict=True):
            assert (a is None) == (b is None), f"{name}: a gradient is missing"
            if a is not None and b is not None:
                assert a.shape == b.shape, f"{name}: expected {[*b.shape]}, got {[*a.shape]}"
                gaps.append((a.double() - b.double()).flatten())
        gaps = gaps or [torch.zeros(1, dtype=torch.float64)]
        measured[name] = torch.stack([*(gap.abs().max() for gap in gaps), torch.cat(gaps).norm()])
    return measured


def _sizes(truth: Result) -> dict[str, Tensor]:
    """{name: the largest entry of all tensors, once for each, then the norm of all}."""
    zeros = {name: [x if x is None else torch.zeros_like(x) for x in group] for name, group in truth.items()}
    sizes = errors(truth, zeros)
    for size in sizes.values():
        size[:-1] = size[:-1].max()
    return sizes
