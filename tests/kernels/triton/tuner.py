"""Launches the kernels of a cell as on a GPU that is not there, with made-up times for tiles; prints [kernel,
tile, warps, whether it was tuned just now] of each launch, one JSON a line.

    python -m tests.kernels.triton.tuner [deterministic]
"""

import json
import sys

import torch
from triton.runtime import driver
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from rfdarts_fast.ops import backends
from tests.kernels.problems import NASBENCH201, CellProblem
from tests.kernels.triton.ahead import AbsentGPU, AbsentKernels

tuned = set()


def bench(self, *arguments, config, **constants):
    tuned.add(self.fn.__name__)
    # the largest tile is the fastest
    return [1 / config.kwargs["TILE"]] * 3


def run(self, *arguments, grid, warmup, TILE, num_warps, **constants):
    programs = grid({**constants, "TILE": TILE})
    assert all(isinstance(n, int) and n > 0 for n in programs)
    print(json.dumps([self.__name__, TILE, num_warps, self.__name__ in tuned]))


def main():
    driver.set_active(AbsentGPU(90))
    Autotuner._bench, JITFunction.run = bench, run
    for options in (dict(K=4, stride=2), NASBENCH201):
        problem = CellProblem((2, 8, 8), torch.float32, channels=16, **options)
        # NaNs in fresh memory come with deterministic algorithms
        problem.run(AbsentKernels(backends()["triton"]), poison=sys.argv[1:] == ["deterministic"])


if __name__ == "__main__":
    main()
