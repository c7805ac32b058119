"""The rule for errors: at most twice those of plain PyTorch in the same dtype, of gradients three times.

Errors are differences from the reference in float64: their norm over all tensors of a name (the gradients of
all gammas, say), and the largest in each tensor. Plain PyTorch may be exact by luck, and in float64 is the
truth itself: `Kernels.floors` says what is allowed beside.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.kernels.oracles import Kernels, Oracle
from tests.kernels.problems import Problem, Result

TRUTH = Oracle()


def assert_as_good_as_torch(
    backend: Kernels, problem: Problem, *draws: Problem, gradients: bool = True, **options
) -> None:
    """Measures what a backend makes of a problem by the rule; in float64, in each of its schedules.

    Args:
        draws: more problems of that shape: errors of the few edge weights are the root mean square over
            all.
        gradients: False for outputs and running statistics alone.
        options: of `Problem.run`.
    """
    dtype, problems = problem.dtype, [problem, *draws]
    exact, eps = dtype == torch.float64, torch.finfo(dtype).eps
    truths = [each.run(TRUTH, torch.float64) for each in problems]
    sizes = [size_of(truth) for truth in truths]
    plain = [
        errors(truth if exact and backend.device == "cpu" else each.run(Oracle(backend.device)), truth)
        for each, truth in zip(problems, truths, strict=True)
    ]
    of_norm, of_largest = backend.floors(dtype)
    for _ in backend.schedules():
        ours = [
            errors(each.run(backend, **options), truth) for each, truth in zip(problems, truths, strict=True)
        ]
        for name in truths[0]:
            if name.startswith("gradient") and not gradients:
                continue
            times = 3 if name.startswith("gradient") else 2
            used = slice(None) if name == "gradient of edge_weights" else slice(1)
            error, theirs, size = (
                torch.stack([each[name] for each in measured[used]]).square().mean(0).sqrt()
                for measured in (ours, plain, sizes)
            )
            rows = [("norm", -1, of_norm)]
            if of_largest is not None:
                rows += [("largest", i, of_largest) for i in range(len(error) - 1)]
            for measure, i, floor in rows:
                allowed = times * theirs[i] + floor * eps * size[i]
                # a NaN is an error too
                assert error[i] <= allowed, (
                    f"{name}, {measure}: {error[i]:.2e}, allowed {allowed:.2e}, PyTorch's {theirs[i]:.2e}"
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


def size_of(truth: Result) -> dict[str, Tensor]:
    """{name: the largest entry of all tensors, once for each, then the norm of all}."""
    zeros = {name: [x if x is None else torch.zeros_like(x) for x in group] for name, group in truth.items()}
    sizes = errors(truth, zeros)
    for size in sizes.values():
        size[:-1] = size[:-1].max()
    return sizes
