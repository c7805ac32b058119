"""Random arguments for the compiled ops, good but for a few: python fuzz_arguments.py SECONDS SEED.

Each call returns or raises; a read or write outside a tensor ends the process where a sanitizer watches.
Prints how many calls returned and raised.
"""

import random
import sys
import time

import torch

from rfdarts_fast.ops.compiled.fakes import FAKES
from tests.kernels.test_arguments import arguments_of

NUMBERS = [-(2**63), -(2**40), -1, 0, 1, 2, 3, 7, 1000, 2**31, 2**40, 2**63 - 1]
FLOATS = [0.0, -1.0, 1e-5, 1e38, float("nan"), float("inf")]
DTYPES = [
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
]
CHANGES = [
    lambda x: x.unsqueeze(0),
    lambda x: x.flatten(),
    lambda x: x[..., :-1] if x.dim() else x,
    lambda x: x[:-1] if x.dim() else x,
    lambda x: torch.cat([x, x], dim=random.randrange(x.dim())) if x.dim() else x,
    lambda x: x.new_empty(0),
    lambda x: x.new_empty([0] * x.dim()),
    lambda x: x.to(random.choice(DTYPES)),
    lambda x: x.contiguous(),
    lambda x: x.transpose(0, -1) if x.dim() else x,
    lambda x: torch.stack([x, x], dim=-1)[..., 0],
    # all elements are one
    lambda x: x.flatten()[:1].expand(x.numel()).view(x.shape) if x.numel() else x,
    # the end of its memory is the end of the tensor
    lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape) if x.numel() else x,
    lambda x: torch.full_like(x, random.choice(FLOATS)) if x.is_floating_point() else x,
    lambda x: x.expand(2**20, *x.shape),
    lambda x: x.to_sparse() if x.dim() and x.numel() else x,
    lambda x: x.detach().requires_grad_() if x.is_floating_point() else x,
]


def changed(value):
    """`value` with something about it changed that a caller may get wrong."""
    if torch.is_tensor(value):
        return random.choice(CHANGES)(value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, float):
        return random.choice(FLOATS)
    if isinstance(value, int):
        return random.choice(NUMBERS)
    if isinstance(value, list) and value:
        at = random.randrange(len(value))
        return random.choice(
            [
                value[:at],
                value[at:],
                [*value, value[at]],
                value[::-1],
                [*value[:at], changed(value[at]), *value[at + 1 :]],
            ]
        )
    return value


def main(seconds, seed):
    random.seed(seed)
    good = [(op, arguments_of(op, space)) for op in FAKES for space in ("s4", "nasbench201")]
    counts = {"returned": 0, "raised": 0}
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        op, unchanged = random.choice(good)
        arguments = dict(unchanged)
        for name in random.sample(list(arguments), random.randint(1, 3)):
            arguments[name] = changed(arguments[name])
        try:
            getattr(torch.ops.rfdarts, op)(**arguments)
            counts["returned"] += 1
        except (ValueError, TypeError, RuntimeError, NotImplementedError):
            counts["raised"] += 1
    print(f"{counts['returned']} calls returned, {counts['raised']} raised")


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
