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

from tests.kernels.cuda.emulated import Case
from tests.kernels.triton.ahead import AbsentGPU
from tests.kernels.triton.call import mixed_cell

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
    torch.use_deterministic_algorithms(sys.argv[1:] == ["deterministic"])
    Case((2, 8, 8), torch.float32, channels=16, K=4, stride=2, nodes=2).run(mixed_cell, torch.float32)


if __name__ == "__main__":
    main()
