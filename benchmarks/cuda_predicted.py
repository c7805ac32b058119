"""What each CUDA kernel needs: bytes and multiply-adds from the cell or its preprocessing, warp instructions
from the compiled code; and the least time on an H100 that follows. No GPU is used.

    python -m benchmarks.cuda_predicted --out benchmarks/results/cuda_predicted.md
    python -m benchmarks.cuda_predicted --cells 0 --kernels conv_forward_kernel --launches 0

The prediction is a floor, the largest of several. Bytes: / 3.0 TB/s, a measured copy; of whole sectors of 32,
once for every launch that needs them. Multiply-adds: on CUDA cores / 33 T/s (132 multiprocessors x 128 lanes
x 1.98 GHz), on tensor cores / 495 T/s (the data sheet's dense bfloat16); tensor cores take the 1x1 products
and the convolutions of NAS-Bench-201 where these have a multiple of 16 inputs, in a cell of outputs too. What
tiles read and compute again for their halos is in neither.

Issue: warp instructions / (132 multiprocessors x 4 schedulers x 1.98 GHz), halos and addresses and all, in
which no scheduler ever waits. They are counted in the code that nvcc makes for sm_90, whose integer and
control instructions `benchmarks/sass` interprets with the parameters that the emulation records. Of a
launch's blocks a sample is interpreted, spread over the grid, and scaled: for the convolutions of the first
cell eight blocks give what all 512 give (`--blocks 512`) within 0.1%. Longest unit: of those that the
instructions go to ("alu", "imad", "fp64", "xu", "tensor", "lsu": shared memory with its bank conflicts, L1
and shuffles; `benchmarks/sass/pipes.py` has the rates), or "issue". Where there are fewer blocks than
multiprocessors, the others are not counted.

Forward and backward, bfloat16; registers: the most of the variants that are launched. Nothing here was timed.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import sass
from tests.kernels import emulation
from tests.kernels.emulation import EmulatedKernels
from tests.kernels.problems import NASBENCH201, CellProblem, LayerProblem

BANDWIDTH = 3.0e12
MULTIPLY_ADDS = 132 * 128 * 1.98e9
TENSOR_MULTIPLY_ADDS = 989e12 / 2
# the least that is read from memory
SECTOR = 32
# what a launch costs inside a CUDA graph, roughly
LAUNCH = 2e-6
# kernel -> the one that adds up what its blocks leave
READERS = {
    "conv_forward_kernel": "merge_moments_kernel",
    "nor_conv_forward_kernel": "merge_moments_kernel",
    "node_backward_kernel": "node_gradients_kernel",
    "second_convs_backward_kernel": "norm_gradients_kernel",
    "relu_conv_bn_forward_kernel": "merge_moments_kernel",
    "relu_conv_bn_sums_kernel": "norm_gradients_kernel",
}
# cells of the supernets: name, K, width, image, stride, batch
CELLS = [
    ("RF-DARTS, CIFAR, first cells", 1, 16, 32, 1, 64),
    ("RF-DARTS, CIFAR, first cells", 1, 16, 32, 1, 1024),
    ("RF-DARTS, CIFAR, first reduction", 1, 32, 32, 2, 64),
    ("RF-DARTS, CIFAR, first reduction", 1, 32, 32, 2, 1024),
    ("RF-DARTS, CIFAR, last cells", 1, 64, 8, 1, 64),
    ("RF-DARTS, CIFAR, last cells", 1, 64, 8, 1, 1024),
    ("RF-PCDARTS, CIFAR, first cells", 4, 16, 32, 1, 64),
    ("RF-PCDARTS, CIFAR, first cells", 4, 16, 32, 1, 1024),
    ("RF-PCDARTS, CIFAR, last cells", 4, 64, 8, 1, 64),
    ("RF-PCDARTS, CIFAR, last cells", 4, 64, 8, 1, 1024),
    ("RF-PCDARTS, ImageNet, K=2, first cells", 2, 16, 28, 1, 64),
    ("RF-PCDARTS, ImageNet, K=2, first cells", 2, 16, 28, 1, 256),
    ("RF-PCDARTS, ImageNet, K=2, last cells", 2, 64, 7, 1, 64),
    ("RF-PCDARTS, ImageNet, K=2, last cells", 2, 64, 7, 1, 256),
    ("RF-PCDARTS, ImageNet, K=4, first cells", 4, 16, 28, 1, 64),
    ("RF-PCDARTS, ImageNet, K=4, first cells", 4, 16, 28, 1, 256),
]
# cells of NAS-Bench-201's supernet: width, image, batch
NASBENCH201_CELLS = [(c, side, batch) for c, side in ((16, 32), (32, 16), (64, 8)) for batch in (64, 1024)]
# what comes before the others: name, channels of the input and of the output, image, stride, batch
PREPROCESSING = [
    ("RF-DARTS and RF-PCDARTS, CIFAR, first cells", 64, 16, 32, 1, 64),
    ("RF-DARTS and RF-PCDARTS, CIFAR, first cells", 64, 16, 32, 1, 1024),
    ("RF-DARTS and RF-PCDARTS, CIFAR, after the first reduction", 64, 32, 32, 2, 1024),
    ("RF-DARTS and RF-PCDARTS, CIFAR, last cells", 256, 64, 8, 1, 1024),
    ("RF-PCDARTS, ImageNet, first cells", 64, 16, 28, 1, 256),
]


Launched = list[sass.Launch]


class RecordedKernels(EmulatedKernels):
    """Of a library of `sass.Build`; symbols: address -> mangled name."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.symbols = sass.symbols(path)


def cell_launches(kernels: RecordedKernels, sizes: tuple[int, int, int, int, int]) -> Launched:
    """Of a forward and backward, in order; sizes: K, channels, side, stride, batch."""
    K, channels, side, stride, batch = sizes
    problem = CellProblem((1, 2, 2), torch.bfloat16, channels=channels, stride=stride, K=K, nodes=4)
    edges, _, weights = problem.leaves(kernels)
    inputs = [untouched(batch, channels, side) for _ in range(2)]
    return recorded(kernels, lambda: kernels.cell(list(edges), inputs, *weights))


def nasbench201_launches(kernels: RecordedKernels, sizes: tuple[int, int, int]) -> Launched:
    """As `cell_launches`; sizes: channels, side, batch. The last node alone is the cell's output."""
    channels, side, batch = sizes
    problem = CellProblem((1, 2, 2), torch.bfloat16, channels=channels, **NASBENCH201)
    edges, _, weights = problem.leaves(kernels)
    x = untouched(batch, channels, side)
    return recorded(kernels, lambda: kernels.cell(list(edges), [x], *weights)[-1:])


def preprocessing_launches(kernels: RecordedKernels, sizes: tuple[int, int, int, int, int]) -> Launched:
    """As `cell_launches`, of a cell's preprocessing; sizes: c_in, c_out, side, stride, batch."""
    c_in, c_out, side, stride, batch = sizes
    problem = LayerProblem((1, 2, 2), torch.bfloat16, channels=(c_in, c_out), reduce=stride == 2)
    [layer], _, _ = problem.leaves(kernels)
    return recorded(kernels, lambda: kernels.layers(untouched(batch, c_in, side), [layer.layer()]))


def untouched(batch: int, channels: int, side: int) -> torch.Tensor:
    """A tensor that takes no memory, as nothing writes it."""
    shape = batch, channels, side, side
    x = torch.empty(shape, dtype=torch.bfloat16, memory_format=torch.channels_last)
    return x.requires_grad_()


def recorded(kernels: RecordedKernels, forward: Callable[[], list[torch.Tensor]]) -> Launched:
    kernels.ops.record(True)
    outputs = forward()
    torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])
    text = kernels.ops.recorded()
    kernels.ops.record(False)
    return sass.launches(text, kernels.symbols)


class Launch(NamedTuple):
    """What a launch needs: bytes, and multiply-adds on CUDA cores and on tensor cores.

    `left` are the bytes of sums that each block leaves for the kernel's reader: READERS."""

    bytes: float = 0.0
    adds: float = 0.0
    tensor_adds: float = 0.0
    left: float = 0.0

    @property
    def seconds(self) -> float:
        """The least that it can take."""
        return max(self.floors)

    @property
    def floors(self) -> tuple[float, float]:
        """Seconds of its bytes and of its multiply-adds."""
        return self.bytes / BANDWIDTH, max(self.adds / MULTIPLY_ADDS, self.tensor_adds / TENSOR_MULTIPLY_ADDS)


def both(one: Launch, other: Launch) -> Launch:
    """Two launches as one, whose blocks are those of either."""
    sums = (one.bytes + other.bytes, one.adds + other.adds, one.tensor_adds + other.tensor_adds)
    return Launch(*sums, max(one.left, other.left))


# kernel -> its launches, in order
Needs = dict[str, list[Launch]]


def leaving(launches: list[Launch]) -> list[Launch]:
    """Those whose blocks leave sums."""
    return [one for one in launches if one.left]


def with_readers(needs: Needs) -> Needs:
    readers = {reader: len(leaving(needs[of])) for of, reader in READERS.items() if of in needs}
    return needs | {reader: [Launch()] * count for reader, count in readers.items()}


def with_sums(needs: Needs, blocks: dict[str, list[int]]) -> Needs:
    """What the blocks of each launch leave, added to the bytes of the kernel and of its reader."""
    needs = dict(needs)
    for kernel, reader in READERS.items():
        if kernel in needs:
            sums = [one.left * count for one, count in zip(needs[kernel], blocks[kernel], strict=True)]
            for name, sizes in ((kernel, sums), (reader, [size for size in sums if size])):
                launches = zip(needs[name], sizes, strict=True)
                needs[name] = [one._replace(bytes=one.bytes + size) for one, size in launches]
    return needs


def cell_needs(K: int, channels: int, side: int, stride: int, batch: int, item: int = 2) -> Needs:
    """Of the forward and backward of a cell with two inputs and four nodes."""
    c = channels // K
    pixels = batch * (side // stride) ** 2
    y, taps = pixels * c * item, 9 + 25 + 9 + 25
    inputs, nodes = range(2), range(2, 6)
    places = [pixels * stride**2] * 2 + [pixels] * 4
    leaving = [4, 4, 3, 2, 1, 0]
    # outputs of an edge's first convolutions
    outputs = [4 + (stride == 2)] * 2 + [4] * 4
    streams = [sum(outputs[:s]) for s in range(6)]

    def part(first: int, last: int) -> list[int]:
        """Bytes of each state's channels [first, last)."""
        begin, end = first * item // SECTOR * SECTOR, -(-last * item // SECTOR) * SECTOR
        return [place * min(end - begin, channels * item) for place in places]

    x, whole, bypassed = part(0, c), part(0, channels), part(c, channels)

    def launch(size: float, depthwise: float = 0, products: float = 0, sums: int = 0) -> Launch:
        """depthwise, products: multiply-adds for each pixel of the output; sums: of a block, per channel."""
        tensor = item == 2 and c % 16 == 0
        cuda_cores = depthwise if tensor else depthwise + products
        return Launch(size, pixels * cuda_cores, pixels * products if tensor else 0, sums * c * 8)

    def first_convs(s: int, edges: int, of: int) -> Launch:
        # both pools have statistics too; what several BatchNorms take is read once
        return launch(x[s] + edges * of * y, edges * taps * c, edges * of * c * c, 2 * (edges * of + 2))

    def second_convs(edges: int) -> Launch:
        return launch(4 * edges * y, edges * 34 * c, edges * 2 * c * c, 4 * edges)

    def state_backward(s: int, edges: int, of: int) -> Launch:
        # per edge: g, and (y, d) of its two separable, y of its other convolutions; nodes have a gradient
        # from outside the cell
        read = edges * (1 + 2 + of) * y + (1 + (s in nodes)) * x[s]
        return launch(read + x[s], edges * taps * c, edges * of * c * c)

    def bypass_backward(s: int, edges: int) -> Launch:
        # the bypass lies between the mixed channels of a gradient
        times = 1 + (s in nodes) + (stride == 2 and s in inputs)
        return launch(edges * pixels * channels * item + times * bypassed[s])

    def node(s: int, dense: int = 0, sums: int = 0) -> Launch:
        return launch(streams[s] * y + sum(whole[: s + 1]) + dense, c * streams[s], sums=sums)

    def rows(s: int) -> int:
        """Each stream, both pools and the identity of each edge, the gradient, each bypass."""
        return streams[s] + 3 * s + 1 + (s if K > 1 else 0)

    backwards = [s for s in (*reversed(nodes), *inputs) if leaving[s]]
    first = [first_convs(s, leaving[s], outputs[s]) for s in range(5)]
    second = [second_convs(leaving[s]) for s in range(5)]
    # both inputs share their launches
    halves = zip(*([both(*half[:2]), *half[2:]] for half in (first, second)), strict=True)
    needs = {
        "conv_forward_kernel": [one for of_state in halves for one in of_state],
        "node_forward_kernel": [node(s) for s in nodes],
        "update_running_stats_kernel": [Launch()],
        "node_backward_kernel": [node(s, y if K > 1 else 0, rows(s)) for s in reversed(nodes)],
        # per separable convolution, each of which has its own blocks: g, y of both halves, du
        "second_convs_backward_kernel": [
            launch(s * 2 * 4 * y, s * 34 * c, s * 2 * c * c, 2) for s in reversed(nodes)
        ],
        "state_backward_kernel": [state_backward(s, leaving[s], outputs[s]) for s in backwards],
    }
    if K > 1:
        needs["edge_gradients_kernel"] = [Launch()]
        needs["bypass_backward_kernel"] = [bypass_backward(s, leaving[s]) for s in backwards]
    return with_readers(needs)


def nasbench201_needs(channels: int, side: int, batch: int, item: int = 2) -> Needs:
    """Of the forward and backward of a cell with one input and three nodes; the last one is its output."""
    pixels = batch * side**2
    y, products = pixels * channels * item, pixels * channels**2
    tensor, states = channels % 16 == 0, range(3)
    edges = [3, 2, 1]
    # as with kFewTiles in csrc: each convolution has blocks of its own
    apart = batch * (-(-side // 16)) ** 2 < 256

    def launch(values: int, adds: int = 0, sums: int = 0) -> Launch:
        """values: in sizes of a state; adds: products of a pixel; sums: of a block, per channel."""
        parts = (0, adds * products) if tensor else (adds * products, 0)
        return Launch(values * y, *parts, sums * channels * 8)

    def node(i: int, sums: int = 0) -> Launch:
        # per edge both convolutions, and its input for average pool and identity; out, or its gradient
        incoming = i + 1
        return launch(3 * incoming + 1, sums=sums)._replace(adds=2 * incoming * pixels * channels)

    # those of 1x1 are not kept: the backward makes all of them again, without statistics
    again = launch(len(states) + sum(edges), sum(edges))
    # weights of float32 that are rounded for tensor cores, those of 1x1 in the backward both ways
    factors = [Launch(sum(edges) * of * channels**2 * (4 + item)) for of in (10, 11)] if tensor else []
    return with_readers(
        {
            **({"nor_conv_factors_kernel": factors} if factors else {}),
            "nor_conv_forward_kernel": [
                *(launch(1 + 2 * of, 10 * of, 2 if apart else 4 * of) for of in edges),
                again,
            ],
            "node_forward_kernel": [node(i) for i in states],
            "update_running_stats_kernel": [Launch()],
            # both convolutions, the average pool and the identity of each edge; the gradient
            "node_backward_kernel": [node(i, 4 * (i + 1) + 1) for i in reversed(states)],
            # per edge g and both y; the state and its gradient
            "nor_conv_backward_kernel": [launch(2 + 3 * edges[s], 10 * edges[s]) for s in reversed(states)],
        }
    )


def preprocessing_needs(c_in: int, c_out: int, side: int, stride: int, batch: int, item: int = 2) -> Needs:
    """Of the forward and backward of one of a cell's preprocessings."""
    pixels, part = batch * (side // stride) ** 2, c_out // stride
    # of a reduction every second pixel is read in every second row, once for each convolution
    x, dx, y = stride * pixels * c_in * item, batch * side**2 * c_in * item, pixels * c_out * item
    adds = pixels * c_in * c_out

    def product(size: int, inputs: int, outputs: int, left: int = 0) -> Launch:
        tensor = item == 2 and inputs % 16 == 0 and outputs % 8 == 0
        return Launch(size, 0 if tensor else adds, adds if tensor else 0, left)

    # two doubles for each of a block's channels
    return with_readers(
        {
            "relu_conv_bn_forward_kernel": [product(x + y, c_in, part, 2 * 8 * part)],
            "relu_conv_bn_affine_kernel": [Launch(2 * y)],
            "update_running_stats_kernel": [Launch()],
            "relu_conv_bn_sums_kernel": [Launch(2 * y, left=2 * 8 * c_out)],
            "relu_conv_bn_backward_kernel": [product(2 * y + x + dx, part, c_in)],
        }
    )


def by_kernel(launched: Launched) -> dict[str, Launched]:
    found: dict[str, Launched] = defaultdict(list)
    for launch in launched:
        found[launch.name].append(launch)
    return dict(found)


HEAD = (
    "kernel, launches, blocks (most), registers, shared KiB, MB, M multiply-adds, on tensor cores, "
    "M warp instructions, bytes µs, multiply-adds µs, issue µs, longest unit µs, unit"
)


def needs_of(launched: Launched, needs: Needs) -> Needs:
    """`needs`, of which each kernel that was launched has its own: strip_x_kernel does what x_kernel does."""
    of_phase: dict[str, Launched] = defaultdict(list)
    for one in launched:
        of_phase[one.name.removeprefix("strip_")].append(one)
    counts = [{phase: len(launches) for phase, launches in each.items()} for each in (of_phase, needs)]
    assert counts[0] == counts[1], counts
    needs = with_sums(needs, {phase: [one.blocks for one in of] for phase, of in of_phase.items()})
    found: Needs = defaultdict(list)
    for phase, of in of_phase.items():
        for one, need in zip(of, needs[phase], strict=True):
            found[one.name].append(need)
    return dict(found)


def kernel_table(launched: dict[str, Launched], needs: Needs, build: sass.Build, most: int) -> str:

    def row(name: str, facts: list[object], of: list[Launch], works: list[sass.Work]) -> list[object]:
        work = sass.added(works)
        size, adds, tensor = (sum(one[i] for one in of) for i in range(3))
        moving, computing = (sum(one.floors[i] for one in of) for i in range(2))
        issue, unit = work.seconds("issue"), work.seconds(work.binding)
        times = [f"{seconds * 1e6:.1f}" for seconds in (moving, computing, issue, unit)]
        binding = max([(moving, "bytes"), (computing, "multiply-adds"), (unit, work.binding)])[1]
        counts = [
            f"{size / 1e6:.1f}",
            f"{adds / 1e6:.0f}",
            f"{tensor / 1e6:.0f}",
            f"{work.instructions / 1e6:.1f}",
        ]
        return [name, len(of), *facts, *counts, *times, binding]

    rows, all_works, found = [], [], []
    for kernel, of in launched.items():
        profiled = [sass.profiled(build.kernel(one.kernel), one, most) for one in of]
        works = [one.work for one in profiled]
        found += profiled
        all_works += works
        facts: list[object] = [
            max(one.blocks for one in of),
            max(build.kernel(one.kernel).registers for one in of),
        ]
        facts.append(f"{max(one.shared for one in of) / 1024:.1f}")
        rows.append(row(kernel, facts, needs[kernel], works))
    every = [one for of in needs.values() for one in of]
    rows.append(row("**all**", ["", "", ""], every, all_works))
    return sass.table(HEAD.split(", "), rows) + "\n" + sass.doubts(found)


class Case(NamedTuple):
    """A cell or a preprocessing: what the emulation launches for it, and what these launches need."""

    title: str
    launches: Callable[[RecordedKernels], Launched]
    needs: Callable[[], Needs]


def cases() -> dict[str, list[Case]]:
    found: dict[str, list[Case]] = {"cells": [], "nasbench201": [], "preprocessing": []}
    for name, K, channels, side, stride, batch in CELLS:
        sizes = K, channels, side, stride, batch
        title = f"{name}: C={channels}, K={K}, {side}x{side}, stride {stride}, batch {batch}"
        found["cells"].append(Case(title, partial(cell_launches, sizes=sizes), partial(cell_needs, *sizes)))
    for channels, side, batch in NASBENCH201_CELLS:
        shape = channels, side, batch
        title = f"NAS-Bench-201: C={channels}, {side}x{side}, batch {batch}"
        launches, needs = partial(nasbench201_launches, sizes=shape), partial(nasbench201_needs, *shape)
        found["nasbench201"].append(Case(title, launches, needs))
    for name, c_in, c_out, side, stride, batch in PREPROCESSING:
        sizes = c_in, c_out, side, stride, batch
        title = f"Preprocessing, {name}: {c_in} -> {c_out}, {side}x{side}, stride {stride}, batch {batch}"
        launches, needs = partial(preprocessing_launches, sizes=sizes), partial(preprocessing_needs, *sizes)
        found["preprocessing"].append(Case(title, launches, needs))
    return found


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    for name in cases():
        add(f"--{name}", type=int, nargs="+", metavar="N", help="by number; of the others only those named")
    add("--kernels", nargs="+", metavar="NAME", help="a profile of each of these instead of the table")
    add("--launches", type=int, nargs="+", metavar="N", help="with --kernels: which launches of each; all")
    add("--lines", type=int, default=30, help="with --kernels: source lines that are shown; %(default)s")
    add(
        "--blocks", type=int, default=sass.BLOCKS, help="blocks of a launch that are interpreted; %(default)s"
    )
    add("--csrc", type=Path, help="another checkout's csrc folder")
    add("--out", type=Path, help="write there instead of to the standard output")
    return parser.parse_args()


def profiles(launched: dict[str, Launched], build: sass.Build, args: argparse.Namespace) -> str:
    parts = []
    for name in args.kernels:
        if name not in launched:
            raise SystemExit(f"--kernels: expected some of {', '.join(launched)}, got {name}")
        of = launched[name]
        if args.launches:
            of = [of[i] for i in args.launches if i < len(of)]
        found = [sass.profiled(build.kernel(one.kernel), one, args.blocks) for one in of]
        parts += [f"### {name}\n", sass.kernel_report(found, args.lines)]
    return "\n".join(parts)


def chosen_cases(args: argparse.Namespace) -> list[Case]:
    found = []
    every = all(getattr(args, name) is None for name in cases())
    for name, of in cases().items():
        numbers = getattr(args, name)
        for number in range(len(of)) if every else numbers or []:
            if not 0 <= number < len(of):
                raise SystemExit(f"--{name}: expected numbers from 0 to {len(of) - 1}, got {number}")
            found.append(of[number])
    return found


def main() -> None:
    args = options()
    chosen = chosen_cases(args)
    if args.csrc:
        emulation.CSRC = args.csrc.resolve()
    build = sass.Build()
    kernels = RecordedKernels(build.emulated())
    with args.out.open("w") if args.out else nullcontext(sys.stdout) as file:
        if not args.kernels:
            print("# CUDA kernels: what they need, and the least that they can take on an H100\n", file=file)
            print(__doc__.split("\n\n", 2)[2].strip() if __doc__ else "", file=file)
        for case in chosen:
            launched = case.launches(kernels)
            print(f"\n## {case.title}\n", file=file)
            if args.kernels:
                print(profiles(by_kernel(launched), build, args), file=file, flush=True)
                continue
            needs = needs_of(launched, case.needs())
            print(kernel_table(by_kernel(launched), needs, build, args.blocks), file=file)
            print(
                f"Launches add about {len(launched) * LAUNCH * 1e6:.0f} µs inside a CUDA graph.",
                file=file,
                flush=True,
            )


if __name__ == "__main__":
    main()
