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

from tests.kernels.problems import CellProblem
from tests.kernels.triton.ahead import LAUNCHED, AbsentGPU

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
    # fresh memory is full of NaNs where algorithms are to be deterministic
    deterministic = sys.argv[1:] == ["deterministic"]
    CellProblem((2, 8, 8), torch.float32, channels=16, K=4, stride=2).run(LAUNCHED, poison=deterministic)


if __name__ == "__main__":
    main()
