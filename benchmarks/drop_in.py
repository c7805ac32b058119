"""What changing one import gains: the time of a search step before and after.

    python benchmarks/drop_in.py        RF-DARTS and RF-PCDARTS, batch 64, 32x32 images, C 16, 8 cells
    python benchmarks/drop_in.py --rounds 1 --C 4 --layers 3 --batch 4 --image 16      a quick look
    python benchmarks/drop_in.py --forks --batch 16 --threads 1     `accelerate` on each family of forks: the
                                                                small supernets of tests/drop_in/gallery.py
    python benchmarks/drop_in.py --sampled      a GDAS-like supernet that samples one operation on each edge,
                                                against one that has no others

A step is what the published search does per batch: an alpha step on a validation batch, a weight step on a
training batch. Variants take turns, so that other load on the machine meets all of them; the table gives the
median over the rounds and, against the first row, the median of the ratios within a round.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rfdarts_fast import nn as rfnn
from rfdarts_fast.drop_in import accelerate, darts, pc_darts
from rfdarts_fast.ops import backends, use_backend
from rfdarts_fast.runs.environment import environment
from rfdarts_fast.spaces import get_space

Step = Callable[[], None]


def search_step(network: nn.Module, arch: list[nn.Parameter], images: Tensor, labels: Tensor) -> Step:
    """The alpha step and the weight step of a first-order search."""
    weights = [p for p in network.parameters() if all(p is not alpha for alpha in arch)]
    optimizer = torch.optim.SGD(weights, 0.025, momentum=0.9, weight_decay=3e-4)
    arch_optimizer = torch.optim.Adam(arch, 3e-4, betas=(0.5, 0.999), weight_decay=1e-3)

    def step() -> None:
        for each in (arch_optimizer, optimizer):
            arch_optimizer.zero_grad()
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images), labels).backward()
            if each is optimizer:
                nn.utils.clip_grad_norm_(weights, 5.0)
            each.step()

    return step


def variants(module, args: argparse.Namespace) -> dict[str, tuple[str, Step]]:
    """Name of a row -> backend, step."""
    images = torch.randn(args.batch, 3, args.image, args.image)
    labels = torch.randint(10, (args.batch,))
    K = module.Cell.mixed_op.default_K

    def drop_in(**options) -> Step:
        network = module.Network(args.C, 10, args.layers, nn.CrossEntropyLoss(), **options)
        return search_step(network, network.arch_parameters(), images, labels)

    own = rfnn.SearchNetwork(get_space("darts"), args.C, 10, args.layers, K=K, edge_norm=K > 1)
    rfnn.freeze_random_features(own)
    return {
        "before: all weights trained, plain PyTorch": ("reference", drop_in(random_features=False)),
        "frozen, plain PyTorch": ("reference", drop_in()),
        "after: the drop-in": ("auto", drop_in()),
        "the package's own network": ("auto", search_step(own, own.arch_parameters(), images, labels)),
    }


def measure(rows: dict[str, tuple[str, Step]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in rows}
    for i in range(rounds + 1):
        for name, (backend, step) in rows.items():
            with use_backend(backend):  # type: ignore[arg-type]
                start = time.perf_counter()
                step()
                # the first round warms up
                if i:
                    times[name].append(time.perf_counter() - start)
    return times


def alphas(network: nn.Module) -> list[nn.Parameter]:
    """A method in most projects, a parameter in AutoDL-Projects."""
    found = network.arch_parameters
    return found() if callable(found) else [found]


def forks(args: argparse.Namespace) -> dict[str, list[float]]:
    """Name of a family -> how many times faster a step is in each round."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from tests.drop_in.forks import TinyNetwork
    from tests.drop_in.gallery import GALLERY

    images = torch.randn(args.batch, 3, args.image, args.image)
    labels = torch.randint(5, (args.batch,))
    ratios = {}
    for name, make in (GALLERY | {"NAS-Bench-201": lambda C: TinyNetwork(C, 5)}).items():
        network = make(args.C)
        after = copy.deepcopy(network)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            accelerate(after)
        rows = {
            label: ("auto", search_step(each, alphas(each), images, labels))
            for label, each in (("before", network), ("after", after))
        }
        times = measure(rows, args.rounds)
        ratios[name] = [a / b for a, b in zip(times["before"], times["after"], strict=True)]
    return ratios


def sampled(args: argparse.Namespace) -> dict[str, list[float]]:
    """Name of a row -> seconds of each round, for a supernet that runs only operations of positive weight."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from tests.drop_in.gallery import NAMES, Network, SamplingCell, pruned

    images = torch.randn(args.batch, 3, args.image, args.image)
    labels = torch.randint(5, (args.batch,))
    chosen = [NAMES.index(name) for name in ("sep_conv_3x3", "skip_connect", "max_pool_3x3") * 2][:5]
    networks = {
        name: Network(SamplingCell, args.C) for name in ("all operations", "one sampled", "no others")
    }
    networks["one sampled"].kept[:] = nn.functional.one_hot(torch.tensor(chosen), len(NAMES))
    pruned(networks["no others"], chosen)
    rows: dict[str, tuple[str, Step]] = {}
    for name, network in networks.items():
        plain = copy.deepcopy(network)
        accelerate(network)
        rows[f"{name}, plain PyTorch"] = ("auto", search_step(plain, alphas(plain), images, labels))
        rows[f"{name}, accelerated"] = ("auto", search_step(network, alphas(network), images, labels))
    return measure(rows, args.rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--C", type=int, default=16)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--image", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--forks", action="store_true", help="`accelerate` on each family of forks")
    parser.add_argument("--sampled", action="store_true", help="one operation sampled on each edge")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    kernels = backends()["cpu"].status()
    machine = environment()
    print(f"{machine} kernels {kernels}")
    figures: dict[str, Any] = {}
    if args.forks:
        print("\n| family | times faster |\n| --- | --- |")
        figures = forks(args)
        for name, ratios in figures.items():
            print(f"| {name} | {statistics.median(ratios):.1f} |")
    if args.sampled:
        figures = sampled(args)
        print("\n| a step of two cells | s/step |\n| --- | --- |")
        for name, seconds in figures.items():
            print(f"| {name} | {statistics.median(seconds):.4f} |")
    published = {} if args.forks or args.sampled else {"RF-DARTS": darts, "RF-PCDARTS": pc_darts}
    for method, module in published.items():
        times = measure(variants(module, args), args.rounds)
        first = next(iter(times.values()))
        print(f"\n| {method}, C {args.C}, {args.layers} cells, batch {args.batch} | s/step | times faster |")
        print("| --- | --- | --- |")
        for name, seconds in times.items():
            ratio = statistics.median(a / b for a, b in zip(first, seconds, strict=True))
            print(f"| {name} | {statistics.median(seconds):.3f} | {ratio:.1f} |")
        after, own = list(times.values())[2:]
        ratio = statistics.median(a / b for a, b in zip(after, own, strict=True))
        print(f"\ndrop-in over own network: {ratio:.3f}")
        figures[method] = times
    if args.out:
        options = {name: value for name, value in vars(args).items() if name != "out"}
        record = {"machine": machine, "kernels": kernels, **options, "seconds": figures}
        args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
