"""The CUDA kernels, run on the CPU thread by thread, against the reference in float64."""

import os
import subprocess
import sys

import pytest
import torch

from rfdarts_fast.ops import reference
from rfdarts_fast.ops.compiled import cuda
from tests.kernels.cuda import emulated
from tests.kernels.cuda.emulated import Case, errors

SHAPES = [(1, 7, 5), (3, 1, 3), (2, 5, 1), (5, 3, 7), (2, 18, 10)]
CELLS = {
    "darts": {},
    "one channel": {"channels": 1},
    "three channels": {"channels": 3},
    "K=2": {"K": 2, "channels": 10},
    "K=4": {"K": 4, "channels": 16, "nodes": 1},
    "K=8": {"K": 8, "channels": 32, "nodes": 1},
    "whole": {"nodes": 4, "channels": 2},
    "wide": {"channels": 36, "nodes": 1, "inputs": 1},
    "s1": {"space": "s1", "nodes": 4},
    "not affine": {"affine": False, "nodes": 1},
    "one edge": {"inputs": 1, "nodes": 1},
}


def assert_exact(case):
    """With threads in the order of their numbers, and in random order."""
    expected = case.reference()
    for shuffled in (False, True):
        torch.ops.rfdarts_emulated.shuffle(shuffled)
        found = errors(case.emulated(), expected)
        assert all(error < 1e-10 for error in found.values()), (shuffled, found)


def assert_as_good_as_torch(case, floor):
    """At most twice the error of plain PyTorch in the same dtype, of gradients three times."""
    expected = case.reference()
    ours, plain = errors(case.emulated(), expected), errors(case.reference(case.dtype), expected)
    for name, error in ours.items():
        times = 2 if name in ("states", "running") else 3
        assert error <= times * plain[name] + floor, (name, error, plain[name])


@pytest.mark.parametrize("options", CELLS.values(), ids=CELLS)
def test_forward_and_backward_at_odd_shapes(emulation, options):
    for shape in SHAPES:
        assert_exact(Case(shape, **options))


# FactorizedReduce needs an even number of channels
EVEN = {name: o for name, o in CELLS.items() if o.get("channels", 4) // o.get("K", 1) % 2 == 0}


@pytest.mark.parametrize("options", EVEN.values(), ids=EVEN)
def test_reduction_cells(emulation, options):
    for shape in [(1, 2, 6), (3, 10, 2), (2, 14, 34)]:
        assert_exact(Case(shape, stride=2, **options))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("K", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_thread_order_changes_no_bit(emulation, dtype, K, stride):
    # in bfloat16 these are for tensor cores
    case = Case((2, 10, 18), dtype, K=K, stride=stride, channels=16 * K)
    first = case.emulated()
    emulation.shuffle(True)
    for _ in range(2):
        again = case.emulated()
        for name, group in first.items():
            for a, b in zip(group, again[name], strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0)


# multiples of 16 mixed channels run on tensor cores in 16-bit types
@pytest.mark.parametrize(
    "options",
    [
        {"stride": 1},
        {"stride": 2},
        {"K": 4, "channels": 32},
        {"channels": 16, "nodes": 1},
        {"channels": 16, "nodes": 1, "stride": 2},
        {"channels": 48, "nodes": 1, "inputs": 1},
        {"channels": 32, "K": 2, "nodes": 1, "stride": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_that_of_pytorch_in_the_same_dtype(emulation, dtype, options):
    case = Case((4, 12, 20), dtype, **{"channels": 8, **options})
    assert_as_good_as_torch(case, floor=2 * torch.finfo(dtype).eps)


# sums about a value that lies far from the mean, or about none, cancel
FAR_OUT = {
    "first pixel": lambda x, stride: x[:, :, 0, 0].uniform_(200, 400),
    # of any tile that may be chosen
    "every tile's first pixel": lambda x, stride: x[:, :, :: 16 * stride, :: 8 * stride].uniform_(200, 400),
    "lower half": lambda x, stride: x[:, :, x.shape[2] // 2 :].add_(50),
    "all pixels": lambda x, stride: x.add_(100),
}


@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"K": 4, "channels": 32}], ids=str)
@pytest.mark.parametrize("place", FAR_OUT.values(), ids=FAR_OUT)
def test_error_is_that_of_pytorch_where_pixels_lie_far_out(emulation, place, options):
    case = Case((4, 12, 20), torch.float32, **{"channels": 8, **options})
    for x in case.inputs:
        place(x, options.get("stride", 1))
    case.inputs = [x.float().double() for x in case.inputs]
    assert_as_good_as_torch(case, floor=torch.finfo(torch.float32).eps / 2)


@pytest.mark.parametrize("stride", [1, 2])
def test_evaluation_mode_uses_running_statistics(emulation, stride):
    assert_exact(Case((2, 6, 10), train=False, K=2, channels=8, stride=stride))


def test_recomputing_branch_outputs_changes_no_bit(emulation):
    case = Case((2, 6, 10), torch.float32, K=2, channels=8)
    kept, again = case.emulated(), case.emulated(memory="recompute")
    for name, group in kept.items():
        for a, b in zip(group, again[name], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("K", [1, 2])
def test_concatenated_nodes_are_the_nodes(emulation, K):
    case = Case((2, 6, 10), torch.float32, channels=8, K=K)

    def concatenated(*arguments):
        [together] = cuda.mixed_cell(*arguments, concatenate=True)
        assert together.is_contiguous(memory_format=torch.channels_last)
        return list(together.chunk(2, dim=1))

    apart, together = case.emulated(), case.run(concatenated, torch.float32)
    for name, group in apart.items():
        for a, b in zip(group, together[name], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_strided_inputs_and_expanded_gradients(emulation):
    case = Case((2, 6, 10), channels=4)
    wide = torch.randn(2, 7, 8, 12, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    case.inputs[0] = wide[:, 1:5, 1:7, 1:11]
    case.inputs[1] = case.inputs[1].contiguous()
    assert_exact(case)
    found = []
    for engine in (cuda, reference):
        inputs = [x.detach().requires_grad_() for x in case.inputs]
        # sum's gradient has no strides
        engine.mixed_cell(list(case.edges), inputs, case.weights)[-1].sum().backward()
        found.append([x.grad for x in inputs])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_nan_in_nan_out(emulation):
    case = Case((1, 9, 9), channels=4, nodes=1, train=False)
    case.inputs[0][0, 2, 4, 4] = torch.nan
    found, expected = case.emulated(), case.reference()
    torch.testing.assert_close(found["states"], expected["states"], equal_nan=True)


def test_ties_go_to_the_first_maximum(emulation):
    for stride in (1, 2):
        case = Case((2, 6, 6), channels=4, K=2, nodes=1, stride=stride)
        case.inputs = [x.round() for x in case.inputs]
        assert_exact(case)


def test_gradcheck(emulation):
    case = Case((2, 4, 4), channels=4, K=2, nodes=1, stride=2)
    leaves = [*case.inputs, case.weights, case.edge_weights]
    leaves += [norm.weight for norm in case.edges.modules() if isinstance(norm, torch.nn.BatchNorm2d)][:2]
    norms = [norm for norm in case.edges.modules() if isinstance(norm, torch.nn.BatchNorm2d)][:2]

    def run(a, b, weights, edge_weights, *gammas):
        for norm, gamma in zip(norms, gammas, strict=True):
            norm._parameters["weight"] = gamma
        return tuple(cuda.mixed_cell(list(case.edges), [a, b], weights, edge_weights))

    assert torch.autograd.gradcheck(run, [leaf.detach().requires_grad_() for leaf in leaves], fast_mode=True)


def test_autocast_computes_in_its_dtype(emulation):
    case = Case((2, 6, 6), torch.float32, channels=4)
    with torch.autocast("cpu", torch.bfloat16):
        nodes = cuda.mixed_cell(list(case.edges.float()), [x.float() for x in case.inputs], case.weights)
    assert all(node.dtype == torch.bfloat16 for node in nodes)
    expected = case.reference()["states"]
    assert errors({"states": nodes}, {"states": expected})["states"] < 0.02


def run_library(library, order, dtype="float64", **environment):
    command = [sys.executable, "-m", "tests.kernels.cuda.emulated", str(library), order, dtype]
    variables = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, cwd=emulated.CSRC.parent, env=variables)


F64, BF16, CONV = "cuda/cell_f64.cu", "cuda/cell_bf16.cu", "cuda/relu_conv_bn.cu"
# header, what is there, what is planted, the source that is compiled again, dtype
MUTATIONS = {
    "missing barrier, forward": (
        "cuda/conv_forward.h", "} __syncthreads(); if (pools) continue;", "} if (pools) continue;", F64, "float64"
    ),
    "missing barrier, backward": (
        "cuda/conv_backward.h", "__syncthreads(); spread(pass, strip);", "spread(pass, strip);",
        F64, "float64",
    ),
    "off by one, width": (
        "cuda/conv_forward.h", "< unsigned(a.w)", "<= unsigned(a.w)", F64, "float64"
    ),
    "off by one, window": (
        "cuda/state_backward.h", "p >= wide) continue;", "p >= wide - 1) continue;", F64, "float64"
    ),
    "off by one, row of a bypass": (
        "cuda/node_backward.h", "node.rows() + 1 + bypass", "node.rows() + bypass", F64, "float64"
    ),
    "the slope of BatchNorm's backward for its shift": (
        "cuda/batch_norm.h", "shift[i] = from[3 * c + i]", "shift[i] = from[c + i]", F64, "float64"
    ),
    "off by one, tensor cores": (
        "cuda/mma.h", "*high = low + 8 * ld,", "*high = low + 7 * ld,", BF16, "bfloat16"
    ),
    "missing sum, tensor cores": (
        "cuda/conv_backward.h",
        "if (c0 && has_high) acc[2] = high[0], acc[3] = high[1];",
        "if (c0 && has_high) acc[2] = high[0];",
        BF16, "bfloat16",
    ),
    "missing barrier before a chunk, preprocessing": (
        "cuda/relu_conv_bn_forward.h", "__syncthreads(); with_width<T>(a.wide,", "with_width<T>(a.wide,",
        CONV, "float64",
    ),
    "missing barrier after the product, preprocessing": (
        "cuda/relu_conv_bn_backward.h",
        "product.put(grad_xs, at.ldy, count); __syncthreads();",
        "product.put(grad_xs, at.ldy, count);",
        CONV, "float64",
    ),
    "off by one, the second pixel of a reduction": (
        "cuda/relu_conv_bn_forward.h",
        "(p - row * ow) * passes + pass) * x.pixel",
        "(p - row * ow) * passes) * x.pixel",
        CONV, "float64",
    ),
    "no zeros between the pixels of a reduction": (
        "cuda/relu_conv_bn_backward.h",
        "if (a.passes == 2) *reinterpret_cast",
        "if (a.passes == 2 && pass) *reinterpret_cast",
        CONV, "float64",
    ),
    "off by one, tensor cores of preprocessing": (
        "cuda/product.h", "*high = low + 8 * ldd", "*high = low + 7 * ldd", CONV, "bfloat16"
    ),
    "weights of the first chunk for all": (
        "cuda/relu_conv_bn_forward.h", "int skipped = c0 % s.wk *", "int skipped = 0 *", CONV, "bfloat16"
    ),
}  # fmt: skip


def test_planting_depends_on_neither_white_space_nor_comments():
    text = "int a=1;  // one\n\n  f( a );\nint ab = 1;"
    assert emulated.plant(text, "int a = 1; f(a);", "f(1);").split() == ["f(1);", "int", "ab", "=", "1;"]
    for twice_or_never in ("int", "1;", "f(b)"):
        with pytest.raises(AssertionError, match="once"):
            emulated.plant(text, twice_or_never, "")


def test_the_check_passes_unchanged(emulated_library):
    for order, dtype in (("fixed", "float64"), ("shuffled", "float64"), ("shuffled", "bfloat16")):
        result = run_library(emulated_library, order, dtype)
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", MUTATIONS)
def test_planted_bugs_are_caught(emulated_library, tmp_path, name):
    objects = [emulated_library.parent / (source.replace("/", "_") + ".o") for source in emulated.sources()]
    *change, dtype = MUTATIONS[name]
    library = emulated.mutated(tmp_path, objects, *change)
    result = run_library(library, "shuffled", dtype)
    assert "too large an error" in result.stderr, result.stderr


@pytest.mark.slow
def test_address_and_undefined_behaviour_sanitizers(tmp_path):
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g1")
    library = emulated.build(tmp_path, flags)
    runtimes = [
        subprocess.run([emulated.compiler(), f"-print-file-name={name}"], capture_output=True, text=True)
        for name in ("libasan.so", "libubsan.so")
    ]
    preload = " ".join(runtime.stdout.strip() for runtime in runtimes)
    for dtype in ("float64", "float32", "bfloat16"):
        options = {"LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0"}
        result = run_library(library, "shuffled", dtype, **options)
        assert result.returncode == 0, result.stderr
