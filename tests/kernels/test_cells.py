"""Cells of every kind on every backend: values, gradients and statistics against plain PyTorch; bits."""

import torch

from rfdarts_fast.spaces import DARTS_PRIMITIVES, SPACES
from tests.kernels.oracles import over
from tests.kernels.problems import FEW, NASBENCH201, CellProblem
from tests.kernels.tolerances import assert_as_good_as_torch, assert_same_bits

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16

CPU = {
    "mixed op": dict(inputs=1, nodes=1),
    "mixed op, stride 2": dict(inputs=1, nodes=1, stride=2),
    "node": dict(inputs=3, nodes=1),
    "cell": dict(nodes=4),
    "cell, stride 2": dict(nodes=4, stride=2),
    "four channels": dict(channels=4),
    "wide": dict(channels=64, nodes=1, inputs=1),
    "five channels": dict(channels=5),
    "twelve channels": dict(channels=12),
    "K=4": dict(K=4),
    "K=4, stride 2": dict(K=4, channels=32, stride=2),
    "K=2": dict(K=2, channels=6),
    "K=8": dict(K=8, channels=8),
    "not affine": dict(affine=False),
    "no running statistics": dict(track=False),
    "evaluated": dict(nodes=4, train=False),
    "evaluated, K=4, stride 2": dict(K=4, channels=32, stride=2, train=False),
    "evaluated, no running statistics": dict(track=False, train=False),
}
CPU = {name: {"channels": 16, **options} for name, options in CPU.items()}
ODD = [(3, *size) for size in ((1, 2), (1, 1), (3, 5), (7, 9), (9, 16), (17, 8))]
CPU |= {f"odd, {c} channels": dict(channels=c, nodes=1, shapes=ODD) for c in (2, 8, 16)}

CPU_201 = {
    "cell": dict(channels=16),
    "mixed op": dict(channels=16, nodes=1),
    "32 channels": dict(channels=32, nodes=1, shapes=[(2, 6, 20)]),
    "64 channels": dict(channels=64, nodes=1, shapes=[(2, 4, 5)]),
    "three channels": dict(channels=3, shapes=ODD),
    "twelve channels": dict(channels=12, nodes=1, shapes=ODD),
    "48 channels, odd": dict(channels=48, nodes=1, shapes=ODD),
    "wide rows": dict(channels=16, nodes=1, shapes=[(1, 3, 37)]),
    "K=2": dict(channels=8, K=2),
    "two inputs": dict(channels=8, inputs=2, nodes=1),
    "not affine": dict(channels=8, affine=False),
    "evaluated": dict(channels=16, train=False),
    "no running statistics": dict(channels=8, track=False, train=False),
    "3x3 alone": dict(channels=16, primitives=("none", "nor_conv_3x3")),
    "1x1 alone": dict(channels=16, primitives=("nor_conv_1x1", "none")),
    "pools with BatchNorm": dict(channels=16, batch_norm=True),
    "beside depthwise convolutions": dict(
        channels=16, nodes=2, primitives=("sep_conv_3x3", "nor_conv_3x3", "nor_conv_1x1", "avg_pool_3x3")
    ),
}
CPU_201 = {f"NAS-Bench-201, {name}": NASBENCH201 | options for name, options in CPU_201.items()}
CPU |= CPU_201

EMULATED = {
    "DARTS": {},
    "one channel": dict(channels=1),
    "three channels": dict(channels=3),
    "K=2": dict(K=2, channels=10),
    "K=4": dict(K=4, channels=16, nodes=1),
    "K=8": dict(K=8, channels=32, nodes=1),
    "cell": dict(nodes=4, channels=2),
    "wide": dict(channels=36, nodes=1, inputs=1),
    "S1": dict(primitives=SPACES["s1"].cells["normal"], nodes=4),
    "not affine": dict(affine=False, nodes=1),
    "mixed op": dict(inputs=1, nodes=1),
}
# FactorizedReduce needs an even number of channels
EMULATED_2 = {name: o for name, o in EMULATED.items() if o.get("channels", 4) // o.get("K", 1) % 2 == 0}
EMULATED_2["S1"] = dict(primitives=SPACES["s1"].cells["reduce"], nodes=4)
ODD = [(1, 7, 5), (3, 1, 3), (2, 5, 1), (5, 3, 7), (2, 18, 10)]
EVEN = [(1, 2, 6), (3, 10, 2), (2, 14, 34)]
EMULATED = {name: dict(shapes=ODD, **options) for name, options in EMULATED.items()}
EMULATED |= {
    f"{name}, stride 2": dict(shapes=EVEN, stride=2, **options) for name, options in EMULATED_2.items()
}
EMULATED |= {
    f"evaluated, stride {stride}": dict(shapes=[(2, 6, 10)], train=False, K=2, channels=8, stride=stride)
    for stride in (1, 2)
}
# the sums of a node: rows in several blocks, parts of a row, more channels than a warp takes at once; and of
# blocks: more than the threads of a block load together
LARGE = {
    "rows in several blocks": dict(shapes=[(1, 41, 16)]),
    "parts of a row": dict(shapes=[(1, 2, 300)]),
    "rows in several blocks, K=2, stride 2": dict(shapes=[(1, 40, 68)], K=2, channels=8, stride=2),
    "more channels than a warp's": dict(shapes=[(1, 3, 5)], channels=72),
    "blocks of a node": dict(shapes=[(40, 1, 2)], channels=64, primitives=("sep_conv_3x3", "max_pool_3x3")),
    "blocks of a BatchNorm": dict(
        shapes=[(530, 1, 1)], channels=2, primitives=("sep_conv_3x3", "avg_pool_3x3")
    ),
}
EMULATED |= {name: dict(inputs=1, nodes=1) | options for name, options in LARGE.items()}
# multiples of 16 mixed channels run on tensor cores in 16-bit types
EMULATED_ROUNDED = {
    "stride 1": dict(channels=8),
    "stride 2": dict(channels=8, stride=2),
    "K=4": dict(K=4, channels=32),
    "tensor cores": dict(channels=16, nodes=1),
    # a draw in which float16 takes no value across a kink
    "tensor cores, stride 2": dict(channels=16, nodes=1, stride=2, seed=1),
    "tensor cores, three chunks": dict(channels=48, nodes=1, inputs=1),
    "tensor cores, K=2, stride 2": dict(channels=32, K=2, nodes=1, stride=2),
}
EMULATED_ROUNDED = {name: dict(shapes=[(4, 12, 20)], **o) for name, o in EMULATED_ROUNDED.items()}
# the 16-bit kernels of strips: 4 and 8 mixed channels side by side, 16 and more; tiles of 16 x 16 and 8 x 8
STRIPS = {
    "four channels": dict(K=4, channels=16, nodes=2),
    "eight channels": dict(K=2, channels=16, nodes=1),
    "32 channels": dict(channels=32, nodes=1, inputs=1, shapes=[(2, 20, 36)]),
    # draws in which float16 takes no value across a kink, here and below
    "64 channels": dict(channels=64, nodes=1, inputs=1, shapes=[(2, 8, 8), (1, 14, 14)], seed=2),
    "128 channels": dict(channels=128, nodes=1, inputs=1, shapes=[(1, 9, 9)]),
    "tiles that hang over": dict(channels=16, nodes=1, shapes=[(2, 9, 7), (1, 17, 33), (3, 1, 3), (1, 5, 1)]),
    "evaluated": dict(channels=16, nodes=1, train=False),
    "S1": dict(primitives=SPACES["s1"].cells["normal"], nodes=4, channels=16, K=2),
    "pools alone": dict(primitives=("avg_pool_3x3", "max_pool_3x3"), channels=16, nodes=2),
    "no pools": dict(
        primitives=("skip_connect", "sep_conv_5x5", "dil_conv_5x5"), channels=16, K=4, nodes=2, seed=1
    ),
}
STRIPS = {f"strips, {name}": dict(shapes=[(2, 10, 18)]) | options for name, options in STRIPS.items()}

# besides convolutions of NAS-Bench-201, what its space does not have and the kernels take
BESIDE = dict(
    nodes=2, primitives=("sep_conv_3x3", "nor_conv_3x3", "nor_conv_1x1", "avg_pool_3x3", "skip_connect")
)
EMULATED_201 = {
    "cell": dict(channels=4, shapes=ODD),
    "one channel": dict(channels=1, nodes=2, shapes=ODD),
    "three channels": dict(channels=3, nodes=2, shapes=ODD),
    "more channels than threads' columns": dict(channels=68, nodes=1, shapes=[(1, 5, 3)]),
    "two inputs": dict(channels=4, inputs=2, nodes=2),
    "K=2": dict(channels=8, K=2, nodes=2),
    "not affine": dict(channels=4, affine=False, nodes=1),
    "evaluated": dict(channels=8, train=False),
    "3x3 alone": dict(channels=4, nodes=2, primitives=("none", "nor_conv_3x3")),
    "1x1 alone": dict(channels=4, nodes=2, primitives=("nor_conv_1x1", "none")),
    "average pools alone": dict(channels=4, nodes=2, primitives=("none", "avg_pool_3x3")),
    "pools with BatchNorm": dict(channels=4, nodes=2, batch_norm=True),
    "beside depthwise convolutions": dict(channels=4) | BESIDE,
}
# multiples of 16 channels run on tensor cores; tiles of 16 x 16 and smaller ones, that hang over
EMULATED_201_ROUNDED = {
    "cell": dict(channels=16),
    "seven channels": dict(channels=7, nodes=2),
    "eight channels": dict(channels=8, nodes=2),
    # no draw in which plain PyTorch has five op weights exact by luck
    "32 channels": dict(channels=32, nodes=1, shapes=[(2, 9, 7)], seed=5),
    "48 channels": dict(channels=48, nodes=1, shapes=[(1, 9, 9)]),
    "64 channels": dict(channels=64, nodes=1, shapes=[(2, 8, 8)]),
    "evaluated": dict(channels=16, nodes=1, train=False),
    "K=2": dict(channels=32, K=2, nodes=1),
    # a draw in which float16 takes no value across a kink
    "beside depthwise convolutions": dict(channels=16, seed=1) | BESIDE,
}
GPU_201 = {
    f"{c} channels": dict(channels=c, shapes=[(3, 18, 10), (2, 32, 32), (1, 8, 8)])
    for c in (7, 16, 32, 64, 128)
}
EMULATED_201, EMULATED_201_ROUNDED, GPU_201 = (
    {f"NAS-Bench-201, {name}": NASBENCH201 | dict(shapes=[(2, 10, 18)]) | o for name, o in cases.items()}
    for cases in (EMULATED_201, EMULATED_201_ROUNDED, GPU_201)
)

TRITON = {
    "DARTS": dict(primitives=DARTS_PRIMITIVES, nodes=2),
    "DARTS, stride 2": dict(primitives=DARTS_PRIMITIVES, shapes=[(2, 8, 6)], stride=2),
    "two inputs": dict(inputs=2, nodes=2, primitives=("skip_connect", "sep_conv_3x3", "max_pool_3x3")),
    "two inputs, stride 2": dict(
        inputs=2, nodes=2, stride=2, primitives=("skip_connect", "sep_conv_3x3", "avg_pool_3x3")
    ),
    "S1": dict(
        nodes=2,
        primitives=[("skip_connect", "dil_conv_5x5"), ("sep_conv_5x5", "none"), ("max_pool_3x3", "none")],
    ),
    "noise": dict(primitives=("noise", "sep_conv_3x3"), nodes=2),
    "no convolution": dict(primitives=("none", "skip_connect"), nodes=2),
    "no BatchNorm, K=2": dict(primitives=("none", "skip_connect"), K=2),
    "pools of one pixel": dict(primitives=("avg_pool_3x3", "max_pool_3x3"), shapes=[(6, 1, 1)]),
    "one channel": dict(channels=1, shapes=[(1, 7, 5)]),
    "three channels": dict(channels=3, shapes=[(3, 1, 3)]),
    "five channels": dict(channels=5, shapes=[(5, 3, 1)]),
    "seven channels": dict(channels=7, shapes=[(1, 3, 7)]),
    "more than a tile of channels": dict(channels=68, shapes=[(2, 2, 3)]),
    "K=2": dict(K=2, channels=6, shapes=[(3, 5, 3)], nodes=2),
    "K=4": dict(K=4, channels=20, shapes=[(1, 5, 7)]),
    "K=8": dict(K=8, channels=8, shapes=[(2, 3, 3)], primitives=("skip_connect", "sep_conv_3x3")),
    "K=2, stride 2": dict(K=2, stride=2, shapes=[(2, 6, 10)], nodes=2, inputs=2, primitives=FEW[1:4]),
    "K=4, stride 2": dict(K=4, channels=8, stride=2, shapes=[(3, 2, 6)], nodes=2),
    "not affine": dict(affine=False),
    "no running statistics": dict(track=False),
    "evaluated": dict(K=2, channels=6, nodes=2, primitives=FEW[2:], train=False),
    "evaluated, stride 2": dict(K=2, stride=2, shapes=[(1, 2, 2)], train=False),
}
TRITON = {
    name: {"primitives": FEW, "inputs": 1, "nodes": 1, "shapes": [(2, 4, 6)], **options}
    for name, options in TRITON.items()
}

GPU = {
    "cell": dict(channels=16, nodes=4),
    "stride 2": dict(channels=16, stride=2),
    "seven channels": dict(channels=7),
    "128 channels": dict(channels=128, nodes=1),
    "256 channels, stride 2": dict(channels=256, nodes=1, stride=2),
    "K=4": dict(channels=16, K=4, nodes=4),
    "K=8, stride 2": dict(channels=64, K=8, stride=2),
    "K=2": dict(channels=12, K=2),
}
GPU = {name: dict(shapes=[(3, 18, 10), (2, 32, 32), (1, 8, 8)], **o) for name, o in GPU.items()}


@over(
    ("cpu", (F64, F32), CPU),
    ("emulated", (F64,), EMULATED),
    ("emulated", (F32, BF16, F16), EMULATED_ROUNDED),
    ("emulated", (BF16, F16), STRIPS),
    ("emulated", (F64,), EMULATED_201),
    ("emulated", (F32, BF16, F16), EMULATED_201_ROUNDED),
    ("gpu", (BF16, F16), STRIPS),
    ("triton", (F64,), TRITON),
    ("gpu", (F64, F32, BF16, F16), GPU | GPU_201),
)
def test_as_good_as_plain_pytorch(backend, dtype, options):
    for problem in problems(dtype, **options):
        assert_as_good_as_torch(backend, problem)


def problems(dtype, shapes=((2, 8, 8),), seed=0, **options):
    torch.manual_seed(seed)
    return (CellProblem(shape, dtype, **options) for shape in shapes)


# sums about a value that lies far from the mean, or about none, cancel
FAR_OUT = {
    "first pixel": lambda x: x[:, :, 0, 0].uniform_(200, 400),
    # of any tile that may be chosen
    "first pixels of tiles": lambda x: x[:, :, ::16, ::8].uniform_(200, 400),
    "first pixels of tiles, stride 2": lambda x: x[:, :, ::32, ::16].uniform_(200, 400),
    "lower half": lambda x: x[:, :, x.shape[2] // 2 :].add_(50),
    "all pixels": lambda x: x.add_(100),
}


def far_out(cells, places, **changes):
    return {
        f"{name}, {place}": options | changes | {"place": FAR_OUT[place]}
        for name, options in cells.items()
        for place in places
    }


FAR_OUT_CPU = {
    name: CPU[name]
    for name in (
        "cell",
        "cell, stride 2",
        "four channels",
        "K=4",
        "K=4, stride 2",
        "NAS-Bench-201, cell",
        "NAS-Bench-201, 64 channels",
    )
}
FAR_OUT_EMULATED = {name: EMULATED_ROUNDED[name] for name in ("stride 1", "stride 2", "K=4")}
FAR_OUT_EMULATED_201 = {"NAS-Bench-201": NASBENCH201 | dict(channels=16, nodes=1, shapes=[(2, 18, 34)])}


@over(
    (
        "cpu",
        (F32,),
        far_out(FAR_OUT_CPU, ("first pixel", "lower half", "all pixels"), nodes=1, shapes=[(2, 32, 32)]),
    ),
    ("emulated", (F32,), far_out(FAR_OUT_EMULATED, FAR_OUT)),
    ("emulated", (F32, BF16), far_out(FAR_OUT_EMULATED_201, FAR_OUT)),
    (
        "emulated",
        (BF16,),
        far_out({"strips": dict(channels=16, nodes=1, inputs=1, shapes=[(2, 18, 34)])}, FAR_OUT),
    ),
)
def test_pixels_far_out(backend, dtype, options):
    for problem in problems(dtype, **options):
        assert_as_good_as_torch(backend, problem)


TENSOR_CORES = {
    f"K={K}, stride {stride}": dict(shapes=[(2, 10, 18)], K=K, channels=16 * K, stride=stride)
    for K in (1, 4)
    for stride in (1, 2)
}


@over(
    ("cpu", (F32,), {
        "K=1": dict(shapes=[(5, 8, 8)], channels=16, edge_weights=True),
        "K=4": dict(shapes=[(5, 8, 8)], channels=16, K=4),
        "K=4, stride 2": dict(shapes=[(3, 8, 8)], channels=32, K=4, nodes=3, stride=2),
        "NAS-Bench-201": dict(shapes=[(5, 9, 8)], channels=16, **NASBENCH201),
    }),
    ("emulated", (F32, BF16), TENSOR_CORES | {"K=2": dict(shapes=[(2, 6, 10)], K=2, channels=8)}),
    ("emulated", (BF16,), {name: STRIPS[f"strips, {name}"] for name in ("eight channels", "32 channels")}),
    ("emulated", (F32, BF16), {"NAS-Bench-201": dict(shapes=[(2, 9, 18)], channels=16, **NASBENCH201)}),
    ("triton", (F32,), {
        "noise, K=2": dict(shapes=[(2, 4, 6)], K=2, channels=8, inputs=1, primitives=("noise", *FEW[1:])),
    }),
    ("gpu", (F32, BF16), {f"K={K}": dict(shapes=[(8, 32, 32)], channels=16, K=K, nodes=4) for K in (1, 4)}),
    ("gpu", (F32, BF16), {"NAS-Bench-201": dict(shapes=[(8, 32, 32)], channels=16, **NASBENCH201)}),
)  # fmt: skip
def test_neither_order_nor_memory_changes_a_bit(backend, dtype, options):
    [problem] = problems(dtype, **options)
    results = [problem.run(backend, memory=m) for _ in backend.schedules() for m in ("fast", "recompute")]
    for result in results[1:]:
        assert_same_bits(result, results[0])
