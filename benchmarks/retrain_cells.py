"""Cells trained from scratch at one equal protocol, beside cells that nobody searched for.

    python -m benchmarks.retrain_cells --cell ours=genotype.json --cell DARTS_V2=DARTS_V2 --random 3 \\
        --seeds 2 --out runs/cells -- --dataset cifar10 --data-root DATA --channels 16 --layers 8 --epochs 10

What comes after `--` are options of `rfdarts train`, for all. Each training is an ordinary run below --out;
the same command goes on after a kill. A random cell has random operations (all but `none`) on two random
edges of each node: what DARTS's rule makes of random weights. The table is also written into --out, as
table.txt.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch

from rfdarts_fast.retrain import TrainConfig, train
from rfdarts_fast.retrain.config import preset_values
from rfdarts_fast.runs.files import write_text
from rfdarts_fast.runs.options import parse_config
from rfdarts_fast.spaces import derive, get_space


def random_cell(seed: int) -> str:
    """A genotype of the DARTS space, as text."""
    space, generator = get_space("darts"), torch.Generator().manual_seed(seed)
    weights = {
        cell: torch.rand(len(edges), len(edges[0]), generator=generator).tolist()
        for cell, edges in space.cells.items()
    }
    return str(derive(space, weights))


def trained(name: str, genotype: str, seed: int, out: Path, options: list[str]) -> tuple[float, str]:
    """The test accuracy after the last epoch, in percent, and the number of parameters in words."""
    folder = out / f"{name}-seed-{seed}"
    args = [*options, "--genotype", genotype, "--seed", str(seed), "--out", str(folder)]
    result = train(parse_config(TrainConfig, preset_values, args, "rfdarts train"))
    return result["test_accuracy"], f"{result['parameters'] / 1e6:.3f} M"


def main() -> None:
    own, options = sys.argv[1:], []
    if "--" in own:
        at = own.index("--")
        own, options = own[:at], own[at + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cell", action="append", default=[], metavar="NAME=GENOTYPE")
    parser.add_argument("--random", type=int, default=0, help="how many random cells, of seeds 1, 2, ...")
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each cell, of seeds 1, 2, ...")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(own)
    for cell in args.cell:
        if "=" not in cell:
            parser.error(f"--cell: expected NAME=GENOTYPE, got {cell!r}")
    cells = dict(cell.split("=", 1) for cell in args.cell)
    if len(cells) < len(args.cell):
        parser.error("--cell: expected each name once")
    cells |= {f"random-{seed}": random_cell(seed) for seed in range(1, args.random + 1)}
    if not cells:
        parser.error("expected --cell or --random, got no cell")
    table = []
    for name, genotype in cells.items():
        runs = [trained(name, genotype, seed, args.out, options) for seed in range(1, args.seeds + 1)]
        found = [accuracy for accuracy, _ in runs]
        mean = f"{statistics.mean(found):.2f}"
        deviation = f" ± {statistics.stdev(found):.2f}" if len(found) > 1 else ""
        table.append(f"| {name} | {len(found)} | {mean}{deviation} | {runs[0][1]} | `{genotype}` |")
    heading = ["| cell | seeds | test accuracy, % | parameters | genotype |", "| - | - | - | - | - |"]
    text = "\n".join([f"rfdarts train {' '.join(options)}", "", *heading, *table]) + "\n"
    write_text(args.out / "table.txt", text)
    print(text, end="")


if __name__ == "__main__":
    main()
