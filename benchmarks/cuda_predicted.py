"""What each CUDA kernel needs: registers from nvcc, blocks and shared memory from the emulation, bytes and
multiply-adds from the cell or its preprocessing; and the least time on an H100 that follows. No GPU is used.

    python -m benchmarks.cuda_predicted > benchmarks/results/cuda_predicted.md

The prediction is a floor, the largest of three: bytes / 3.0 TB/s (a measured copy), multiply-adds on CUDA
cores / 33 T/s (132 multiprocessors x 128 lanes x 1.98 GHz), those on tensor cores / 495 T/s (the data sheet's
dense bfloat16). Tensor cores take the 1x1 products where these have a multiple of 16 inputs, in a cell of
outputs too. Bytes are of whole sectors of 32, once for every launch that needs them. What tiles read and
compute again for their halos is not in it: in the backward up to four times the 1x1 products. Nothing here
was timed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from rfdarts_fast.nn.primitives import FactorizedReduce, ReLUConvBN
from rfdarts_fast.ops.compiled import cpu
from rfdarts_fast.ops.compiled.plan import Plan, plan_of
from tests.kernels.cuda import emulated
from tests.kernels.cuda.convs import ConvCase

BANDWIDTH = 3.0e12
MULTIPLY_ADDS = 132 * 128 * 1.98e9
TENSOR_MULTIPLY_ADDS = 989e12 / 2
# the least that is read from memory
SECTOR = 32
# what a launch costs inside a CUDA graph, roughly
LAUNCH = 2e-6
KERNELS = {
    "ConvForward": "conv_forward_kernel",
    "Moments": "merge_moments_kernel",
    "Node": "node_forward_kernel",
    "NodeSums": "node_backward_kernel",
    "NodeFinish": "node_finish_kernel",
    "InnerBackward": "inner_backward_kernel",
    "InnerFinish": "inner_finish_kernel",
    "StateBackward": "state_backward_kernel",
    "bypass": "bypass_backward_kernel",
    "RunningParams": "update_running_kernel",
    "ConvNormForward": "conv_norm_forward_kernel",
    "ConvNormAffine": "conv_norm_affine_kernel",
    "ConvNormSums": "conv_norm_sums_kernel",
    "ConvNormBackward": "conv_norm_backward_kernel",
}
# cells of the supernets: name, K, width, image, stride, batch
CELLS = [
    ("RF-DARTS, CIFAR, first cells", 1, 16, 32, 1, 64),
    ("RF-DARTS, CIFAR, first cells", 1, 16, 32, 1, 1024),
    ("RF-DARTS, CIFAR, first reduction", 1, 32, 32, 2, 1024),
    ("RF-DARTS, CIFAR, last cells", 1, 64, 8, 1, 1024),
    ("RF-PCDARTS, CIFAR, first cells", 4, 16, 32, 1, 64),
    ("RF-PCDARTS, CIFAR, first cells", 4, 16, 32, 1, 1024),
    ("RF-PCDARTS, CIFAR, last cells", 4, 64, 8, 1, 1024),
    ("RF-PCDARTS, ImageNet, K=2, first cells", 2, 16, 28, 1, 256),
    ("RF-PCDARTS, ImageNet, K=2, last cells", 2, 64, 7, 1, 256),
    ("RF-PCDARTS, ImageNet, K=4, first cells", 4, 16, 28, 1, 256),
]
# what comes before them: name, channels of the input and of the output, image, stride, batch
PREPROCESSING = [
    ("RF-DARTS and RF-PCDARTS, CIFAR, first cells", 64, 16, 32, 1, 64),
    ("RF-DARTS and RF-PCDARTS, CIFAR, first cells", 64, 16, 32, 1, 1024),
    ("RF-DARTS and RF-PCDARTS, CIFAR, after the first reduction", 64, 32, 32, 2, 1024),
    ("RF-DARTS and RF-PCDARTS, CIFAR, last cells", 256, 64, 8, 1, 1024),
    ("RF-PCDARTS, ImageNet, first cells", 64, 16, 28, 1, 256),
]


def registers(nvcc: str) -> dict[str, int]:
    """Kernel -> registers for bfloat16 on sm_90, the most of its variants."""
    csrc = emulated.CSRC
    found: dict[str, int] = defaultdict(int)
    for source in ("cell_bf16.cu", "cell.cu", "conv_bn.cu"):
        with tempfile.TemporaryDirectory() as folder:
            command = [nvcc, "-std=c++20", "-O3", "-arch=sm_90", "-Xptxas", "-v", f"-I{csrc}"]
            command += ["-cubin", str(csrc / "cuda" / source)]
            command += ["-o", str(Path(folder) / "kernels.cubin")]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        pattern = r"Function properties for (\S+)\n.*?\n.*?Used (\d+) registers"
        for symbol, count in re.findall(pattern, text):
            # the last file has every storage type
            other = source == "conv_bn.cu" and "ConvNorm" in symbol and "__nv_bfloat16" not in symbol
            for kernel in KERNELS.values():
                if kernel in symbol and not other:
                    found[kernel] = max(found[kernel], int(count))
    return found


def launches(
    name: str, K: int, channels: int, side: int, stride: int, batch: int
) -> list[tuple[str, int, int]]:
    """(kernel, blocks, bytes of shared memory) of a forward and backward, in order."""
    edges = list(emulated.make_edges("darts", channels, stride, K, nodes=4))
    plan = plan_of(edges, 2)
    assert isinstance(plan, Plan)
    # never touched, so these take no memory
    shape = batch, channels, side, side
    inputs = [
        torch.empty(shape, dtype=torch.bfloat16).to(memory_format=torch.channels_last) for _ in range(2)
    ]
    inputs = [x.requires_grad_() for x in inputs]
    weights = torch.rand(len(edges), 8, requires_grad=True)
    edge_weights = torch.rand(len(edges), requires_grad=True) if K > 1 else None
    return recorded(lambda: cpu.mixed_cell(edges, inputs, weights, edge_weights))


def preprocessing_launches(
    name: str, c_in: int, c_out: int, side: int, stride: int, batch: int
) -> list[tuple[str, int, int]]:
    """As `launches`, of a cell's preprocessing."""
    module = FactorizedReduce(c_in, c_out) if stride == 2 else ReLUConvBN(c_in, c_out, 1)
    convs, norm = ConvCase.parts(module)
    for conv in convs:
        conv.requires_grad_(False)
    x = torch.empty(batch, c_in, side, side, dtype=torch.bfloat16, memory_format=torch.channels_last)
    return recorded(lambda: [cpu.relu_conv_bn(x.requires_grad_(), convs, norm)])


def recorded(forward: Callable[[], list[torch.Tensor]]) -> list[tuple[str, int, int]]:
    torch.ops.rfdarts.record(True)
    nodes = forward()
    torch.autograd.backward(nodes, [torch.empty_like(node) for node in nodes])
    text = torch.ops.rfdarts.recorded()
    torch.ops.rfdarts.record(False)
    found = []
    for line in text.splitlines():
        params, blocks, shared = line.split(" | ")
        key = re.search(r"(\w+)(<\w+>)?\s*,?\s*(int)?", params.split("cuda::")[1])
        assert key is not None
        kind = "bypass" if "int" in params.split(">")[-1] else key[1]
        found.append((KERNELS[kind], int(blocks), int(shared)))
    return found


class Work(NamedTuple):
    """Of one launch; multiply-adds apart for what runs on CUDA cores and on tensor cores."""

    kernel: str
    bytes: float = 0.0
    adds: float = 0.0
    tensor_adds: float = 0.0

    @property
    def seconds(self) -> float:
        """The least that it can take."""
        computing = self.adds / MULTIPLY_ADDS, self.tensor_adds / TENSOR_MULTIPLY_ADDS
        return max(self.bytes / BANDWIDTH, *computing)


def work(
    K: int,
    channels: int,
    side: int,
    stride: int,
    batch: int,
    blocks: Sequence[int] = (),
    item: int = 2,
) -> list[Work]:
    """Every launch of a cell's forward and backward, in order: run_forward.h, run_backward.h.

    With the `blocks` of each, what these leave of sums is counted too."""
    c, out = channels // K, side // stride
    places = [batch * side * side if j < 2 else batch * out * out for j in range(6)]
    pixels = batch * out * out
    y = pixels * c * item

    def part(of: int, first: int, last: int) -> int:
        """Bytes of a state's channels [first, last)."""
        begin, end = first * item // SECTOR * SECTOR, -(-last * item // SECTOR) * SECTOR
        return of * min(end - begin, channels * item)

    x = [part(place, 0, c) for place in places]
    # channels that bypass
    rest = [part(place, c, channels) if K > 1 else 0 for place in places]
    whole = [place * channels * item for place in places]
    taps = 9 + 25 + 9 + 25
    reduces = [stride == 2 and j < 2 for j in range(6)]
    leaving = [4, 4, 3, 2, 1, 0]
    found: list[Work] = []

    def count(at: int) -> int:
        return blocks[at] if blocks else 0

    def launch(kernel: str, size: float = 0, depthwise: float = 0, products: float = 0, sums: int = 0) -> int:
        """depthwise, products: multiply-adds for each pixel of the output; sums: doubles that a block leaves
        for each channel, returned as the bytes of all of them."""
        tensor = item == 2 and c % 16 == 0
        cuda_cores = depthwise if tensor else depthwise + products
        left = sums * count(len(found)) * c * 8
        found.append(Work(kernel, size + left, pixels * cuda_cores, pixels * products if tensor else 0))
        return left

    def stages(s: int) -> None:
        edges = leaving[s]
        if not edges:
            return
        kept = edges * (4 + reduces[s])
        # both pools have statistics too; what several BatchNorms take is read once
        moments = launch(
            "conv_forward_kernel", x[s] + kept * y, edges * taps * c, kept * c * c, sums=2 * (kept + 2)
        )
        launch("merge_moments_kernel", moments)
        moments = launch(
            "conv_forward_kernel", 4 * edges * y, edges * (9 + 25) * c, edges * 2 * c * c, sums=4 * edges
        )
        launch("merge_moments_kernel", moments)

    def state_backward(s: int) -> None:
        edges = leaving[s]
        if not edges:
            return
        # nodes have a gradient from outside the cell
        outer = s >= 2
        # per edge: G, and (y, d) of its two separable, y of its other convolutions
        read = edges * (1 + 2 * 2 + 2 + reduces[s]) * y + (1 + outer) * x[s]
        products = edges * (4 + reduces[s]) * c * c
        launch("state_backward_kernel", read + x[s], edges * taps * c, products)
        if K > 1:
            # the bypass lies between the mixed channels of a gradient
            passed = edges * pixels * channels * item
            launch("bypass_backward_kernel", passed + (1 + outer + (stride == 2 and s < 2)) * rest[s])

    for s in range(6):
        if s >= 2:
            streams = sum(4 + reduces[j] for j in range(s))
            launch("node_forward_kernel", streams * y + sum(whole[:s]) + whole[s], c * streams)
        stages(s)
    launch("update_running_kernel")
    for s in range(5, 1, -1):
        state_backward(s)
        streams = sum(4 + reduces[j] for j in range(s))
        dense = y if K > 1 else 0
        # of each stream, both pools and the identity of each edge, the gradient, each bypass
        rows = streams + 3 * s + 1 + (s if K > 1 else 0)
        size = streams * y + sum(whole[:s]) + whole[s] + dense
        sums = launch("node_backward_kernel", size, c * streams, sums=rows)
        launch("node_finish_kernel", sums)
        # per separable convolution, each of which has its own blocks: G, y of both halves, du
        sums = launch("inner_backward_kernel", s * 2 * 4 * y, s * 34 * c, s * 2 * c * c, sums=2)
        launch("inner_finish_kernel", sums)
    for s in range(2):
        state_backward(s)
    return found


def preprocessing_work(
    c_in: int, c_out: int, side: int, stride: int, batch: int, blocks: Sequence[int] = (), item: int = 2
) -> list[Work]:
    """Every launch of a cell's preprocessing, in order: conv_bn.cu. `blocks`: as of `work`."""
    pixels, part = batch * (side // stride) ** 2, c_out // stride
    # of a reduction every second pixel is read in every second row, once for each convolution
    x, dx, y = stride * pixels * c_in * item, batch * side**2 * c_in * item, pixels * c_out * item
    adds = pixels * c_in * c_out

    def product(kernel: str, size: int, inputs: int, outputs: int) -> Work:
        tensor = item == 2 and inputs % 16 == 0 and outputs % 8 == 0
        return Work(kernel, size, 0 if tensor else adds, adds if tensor else 0)

    # two doubles for each of a block's channels
    moments, sums = (2 * 8 * blocks[0] * part, 2 * 8 * blocks[4] * c_out) if blocks else (0, 0)
    return [
        product("conv_norm_forward_kernel", x + y + moments, c_in, part),
        Work("merge_moments_kernel", moments),
        Work("conv_norm_affine_kernel", 2 * y),
        Work("update_running_kernel"),
        Work("conv_norm_sums_kernel", 2 * y + sums),
        Work("inner_finish_kernel", sums),
        product("conv_norm_backward_kernel", 2 * y + x + dx, part, c_in),
    ]


def print_table(launched: list[tuple[str, int, int]], needed: list[Work], used: dict[str, int]) -> None:
    rows: dict[str, list[float]] = {}
    assert [kernel for kernel, *_ in launched] == [one.kernel for one in needed]
    for (kernel, blocks, shared), one in zip(launched, needed, strict=True):
        row = rows.setdefault(kernel, [0] * 7)
        row[0] += 1
        row[1] = max(row[1], blocks)
        row[2] = max(row[2], shared)
        for i, value in enumerate((one.bytes, one.adds, one.tensor_adds, one.seconds)):
            row[3 + i] += value
    print(
        "| kernel | launches | blocks (most) | registers | shared KiB | MB | M multiply-adds "
        "| on tensor cores | floor µs |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for kernel, (count, blocks, shared, size, adds, tensor, seconds) in rows.items():
        print(
            f"| {kernel} | {count:.0f} | {blocks:.0f} | {used.get(kernel, '')} | {shared / 1024:.1f} "
            f"| {size / 1e6:.1f} | {adds / 1e6:.0f} | {tensor / 1e6:.0f} | {seconds * 1e6:.1f} |"
        )
    total = [sum(row[i] for row in rows.values()) for i in range(7)]
    print(
        f"| **all** | {total[0]:.0f} | | | | {total[3] / 1e6:.1f} "
        f"| {total[4] / 1e6:.0f} | {total[5] / 1e6:.0f} | {total[6] * 1e6:.1f} |"
    )
    print(f"\nLaunches add about {total[0] * LAUNCH * 1e6:.0f} µs inside a CUDA graph.")


def main() -> None:
    nvcc = emulated.find_nvcc()
    used = registers(str(nvcc)) if nvcc else {}
    with tempfile.TemporaryDirectory() as folder:
        emulated.load(emulated.build(Path(folder)))
        print("# CUDA kernels: what they need, and the least that they can take on an H100\n")
        print(__doc__.split("\n\n")[2].strip() if __doc__ else "")
        print()
        print("Forward and backward, bfloat16; registers: the most of a kernel's variants on sm_90.")
        for cell in CELLS:
            name, K, channels, side, stride, batch = cell
            print(f"\n## {name}: C={channels}, K={K}, {side}x{side}, stride {stride}, batch {batch}\n")
            launched = launches(*cell)
            blocks = [blocks for _, blocks, _ in launched]
            print_table(launched, work(K, channels, side, stride, batch, blocks), used)
        for case in PREPROCESSING:
            name, c_in, c_out, side, stride, batch = case
            size = f"{side}x{side}, stride {stride}, batch {batch}"
            print(f"\n## Preprocessing, {name}: {c_in} -> {c_out}, {size}\n")
            launched = preprocessing_launches(*case)
            blocks = [blocks for _, blocks, _ in launched]
            print_table(launched, preprocessing_work(c_in, c_out, side, stride, batch, blocks), used)


if __name__ == "__main__":
    main()
