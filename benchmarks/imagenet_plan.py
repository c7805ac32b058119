"""The whole ImageNet search on H100s: seconds a step, steps, bytes of messages. Predicted, not measured.

    python -m benchmarks.imagenet_plan > benchmarks/results/imagenet_plan.md

Every figure is a floor, which no kernel reaches: bytes / 3.0 TB/s and multiply-adds as in
`benchmarks/cuda_predicted.py`, of the cells and their preprocessing launch by launch, of PyTorch's
operators (stem, crops) by the tensors that each reads and writes. "Issued": the cells take as long as their
warp instructions need to be issued, 2.05 (K = 2) and 2.01 (K = 4) times as long as their bytes, as was
counted in the compiled code of the first cells. Assumed: 2 µs a launch inside a CUDA graph and 5 µs without
one, as a search of several processes runs; 5 µs a hop of a message's tree, and 50 GB/s a GPU between
machines (a 400 Gb/s network card each).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from benchmarks.cuda_predicted import (
    BANDWIDTH,
    LAUNCH,
    MULTIPLY_ADDS,
    TENSOR_MULTIPLY_ADDS,
    Needs,
    cell_needs,
    preprocessing_needs,
)
from rfdarts_fast.bench.variants import make_network
from rfdarts_fast.nn.primitives import FactorizedReduce
from rfdarts_fast.search import PRESETS

SIDE, STORED, CLASSES = 224, 256, 1000
# ImageNet's training images; the presets take shares of each class
IMAGES = 1_281_167
HOST_LAUNCH = 5e-6
HOP, BETWEEN_MACHINES = 5e-6, 50e9
# forward launches; the others are the backward's
FORWARD = (
    "conv_forward",
    "merge_moments",
    "node_forward",
    "update_running",
    "relu_conv_bn_forward",
    "affine",
)
# K -> the issue slots of a cell's kernels over the seconds of their bytes, as counted in the compiled code of
# the first cells; 3.6 in the last ones of K = 2
ISSUE = {2: 2.05, 4: 2.01}
# the optimiser, its clipping, the meters and the loss: some operators of all parameters at once
OTHER_LAUNCHES = 60


class Part(NamedTuple):
    """The least of a part of a step, of one GPU's images.

    Attributes:
        forward, backward: seconds.
        size: bytes.
        launches: of forward and backward.
    """

    forward: float
    backward: float
    size: float
    launches: int

    @property
    def seconds(self) -> float:
        return self.forward + self.backward


def kernels(needs: list[Needs]) -> Part:
    launches = [(name, one) for of in needs for name, launched in of.items() for one in launched]
    forward = sum(one.seconds for name, one in launches if name.startswith(FORWARD))
    every = sum(one.seconds for _, one in launches)
    return Part(forward, every - forward, sum(one.bytes for _, one in launches), len(launches))


def operators(forward: float, backward: float, adds: float, launches: int) -> Part:
    """Of PyTorch's operators: bytes of each direction, multiply-adds of the forward on tensor cores; the
    backward to a frozen convolution's input has as many."""
    least = adds / TENSOR_MULTIPLY_ADDS
    times = (max(size / BANDWIDTH, least if size else 0) for size in (forward, backward))
    return Part(*times, forward + backward, launches)


def stem(channels: int, batch: int) -> Part:
    """Three convolutions of stride 2 with BatchNorm and ReLU, bfloat16: a convolution reads and writes once;
    BatchNorm reads twice and writes, its backward reads four times and writes; ReLU reads and writes, its
    backward reads twice and writes. The images need no gradient."""
    c = 3 * channels
    forward = backward = adds = 0.0
    for i, (c_in, c_out) in enumerate([(3, c // 2), (c // 2, c), (c, c)]):
        side = SIDE // 2 ** (i + 1)
        x, y = 2 * batch * c_in * 4 * side**2, 2 * batch * c_out * side**2
        forward += x + y + 3 * y + 2 * y
        backward += (y + x if i else 0) + 5 * y + 3 * y
        adds += 9 * batch * c_in * c_out * side**2
    return operators(forward, backward, adds, 3 * 9)


def crops(batch: int) -> Part:
    """The crop of a batch out of the store's copy on the GPU, as `data.resample` does it: the weights of rows
    and columns (eight operators), two products in float32, rounding and clamping; then as many operators of
    float32 images as mirror and normalise them."""
    weights, image = 2 * 4 * SIDE * STORED, 4 * 3 * STORED**2
    half, done = 4 * 3 * SIDE * STORED, 4 * 3 * SIDE**2
    size = 8 * 2 * weights + image * (1 / 4 + 2) + 2 * half + done * (1 + 4 + 1 / 2 + 6)
    adds = 3 * SIDE * STORED * (STORED + SIDE)
    return Part(batch * max(size / BANDWIDTH, adds / MULTIPLY_ADDS), 0.0, batch * size, 40)


def step_parts(K: int, batch: int) -> dict[str, Part]:
    """The parts of one forward and backward of the supernet, and of making its batch."""
    with torch.device("meta"):
        network = make_network("rf-pcdarts", 16, 8, "darts", "imagenet", K, CLASSES)
    side, cells = SIDE // 8, []
    # a state, its channels and side, and a stride -> outputs of the layers that share their launches
    layers: dict[tuple[int, int, int, int], list[int]] = {}
    for i, cell in enumerate(network.cells):
        c = cell._ops[0].channels
        for state, one in ((i - 2, cell.preprocess0), (i - 1, cell.preprocess1)):
            stride = 2 if isinstance(one, FactorizedReduce) else 1
            conv = one.conv_1 if stride == 2 else one.op[1]
            layers.setdefault((state, conv.in_channels, side * stride, stride), []).append(c)
        cells.append(cell_needs(K, c, side, 2 if cell.reduction else 1, batch))
        side //= 2 if cell.reduction else 1
    preprocessing = []
    for (_, c_in, side_in, stride), widths in layers.items():
        # as one layer of as many outputs; running statistics are updated layer by layer
        needs = preprocessing_needs(c_in, sum(widths), side_in, stride, batch)
        updates = {"update_running_stats_kernel": len(widths) * needs["update_running_stats_kernel"]}
        preprocessing.append(needs | updates)
    features = 2 * batch * 4 * c * side**2
    head = operators(2 * features, 2 * features, batch * 4 * c * CLASSES, 8)
    return {
        "crops, mirrors, normalisation": crops(batch),
        "stem": stem(16, batch),
        "preprocessing of the cells": kernels(preprocessing),
        "cells": kernels(cells),
        "pooling and classifier": head,
    }


def message_bytes(K: int) -> tuple[int, int]:
    """Of the weights' step and of the architecture's: trainable scalars, four sums, four requests to stop."""
    network = make_network("rf-pcdarts", 16, 8, "darts", "imagenet", K, CLASSES)
    scalars = sum(p.numel() for p in network.parameters() if p.requires_grad)
    return 4 * (scalars + 8), 4 * (sum(p.numel() for p in network.arch_parameters()) + 8)


def message_seconds(size: int, gpus: int) -> float:
    """A tree of hops, there and back, and the bytes of a ring."""
    if gpus == 1:
        return 0.0
    return 2 * math.log2(gpus) * HOP + 2 * (gpus - 1) / gpus * size / BETWEEN_MACHINES


def print_step(K: int, batch: int) -> None:
    print(f"\n## A forward and backward: K = {K}, {batch} images of {SIDE} x {SIDE}, bfloat16\n")
    print("| part | launches | GB | forward ms | backward ms |\n|---|---|---|---|---|")
    parts = step_parts(K, batch)
    for name, part in parts.items():
        times = f"{1e3 * part.forward:.2f} | {1e3 * part.backward:.2f}"
        print(f"| {name} | {part.launches} | {part.size / 1e9:.1f} | {times} |")
    launches, size = (sum(getattr(part, name) for part in parts.values()) for name in ("launches", "size"))
    times = (1e3 * sum(getattr(part, name) for part in parts.values()) for name in ("forward", "backward"))
    print(f"| **all** | {launches} | {size / 1e9:.1f} | {' | '.join(f'{t:.2f}' for t in times)} |")


def print_runs(K: int) -> None:
    preset = PRESETS["rf-pcdarts-imagenet"]
    # SearchConfig's defaults
    train, val, epochs = int(0.1 * IMAGES), int(0.025 * IMAGES), 50
    weights, alphas = message_bytes(K)
    print(f"\n## The search: K = {K}, {epochs} epochs\n")
    print(f"{train:,} images train the weights; {val:,} the architecture, in the last 15 epochs.\n")
    print(f"Messages: {weights:,} bytes for a step of the weights, {alphas:,} for one of the alphas.\n")
    heads = ["GPUs", "batch", "images a GPU", "kernels ms", "issued ms", "launches ms", "message ms"]
    heads += ["step ms", "step issued ms", "steps", "messages MB", "minutes", "minutes issued"]
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for gpus, batch in ((1, 1024), (8, 1024), (64, 1024), (64, 8192)):
        parts = step_parts(K, batch // gpus)
        computing = sum(part.seconds for part in parts.values())
        forward = sum(part.forward for part in parts.values())
        launches = OTHER_LAUNCHES + sum(part.launches for part in parts.values())
        launching = launches * (LAUNCH if gpus == 1 else HOST_LAUNCH)
        issuing = computing + (ISSUE[K] - 1) * parts["cells"].seconds
        sending = message_seconds(weights, gpus)
        of_epoch = -(-train // batch)
        weight_steps, arch_steps = epochs * of_epoch, (epochs - preset["arch_warmup_epochs"]) * of_epoch
        totals = []
        for least in (computing, issuing):
            # one GPU's launches come on top, in its graph; a host launches ahead of what is computed
            step = (least + launching if gpus == 1 else max(least, launching)) + sending
            evaluated = epochs * val / batch * least * forward / computing
            totals += [step, (weight_steps + arch_steps) * step + evaluated]
        sent = (weight_steps * weights + arch_steps * alphas) / 1e6 if gpus > 1 else 0
        row = [str(gpus), str(batch), str(batch // gpus)]
        times = computing, issuing, launching, sending, totals[0], totals[2]
        row += [f"{1e3 * seconds:.2f}" for seconds in times]
        row += [f"{weight_steps + arch_steps:,}", f"{sent:.0f}", *(f"{s / 60:.1f}" for s in totals[1::2])]
        print(f"| {' | '.join(row)} |")


def main() -> None:
    assert __doc__ is not None
    print("# The whole ImageNet search: what it takes at least, predicted\n")
    print(__doc__.split("\n\n")[2].strip())
    for K in (2, 4):
        print_step(K, 1024)
    for K in (2, 4):
        print_runs(K)


if __name__ == "__main__":
    main()
