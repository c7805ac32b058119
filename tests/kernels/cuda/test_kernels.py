"""Bugs planted in the CUDA kernels: the check that all other tests of the emulation rest on sees them."""

import os
import subprocess
import sys

import pytest

from tests.kernels import emulation


def run_library(library, order, dtype="float64", **environment):
    command = [sys.executable, "-m", "tests.kernels.emulation", str(library), order, dtype]
    variables = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, cwd=emulation.CSRC.parent, env=variables)


F64, BF16, CONV = "cuda/cell_f64.cu", "cuda/cell_bf16.cu", "cuda/relu_conv_bn.cu"
# header, what is there, what is planted, the source that is compiled again, dtype
MUTATIONS = {
    "missing barrier, forward": (
        "cuda/conv_forward.h",
        "} __syncthreads(); if (pools) continue;",
        "} if (pools) continue;",
        F64,
        "float64",
    ),
    "missing barrier, backward": (
        "cuda/conv_backward.h", "__syncthreads(); spread(pass, strip);", "spread(pass, strip);",
        F64, "float64",
    ),
    "off by one, width": (
        "cuda/conv_forward.h", "< unsigned(a.w)", "<= unsigned(a.w)", F64, "float64"
    ),
    "off by one, window": (
        "cuda/state_backward.h", "p >= wide()) continue;", "p >= wide() - 1) continue;", F64, "float64"
    ),
    "off by one, row of a bypass": (
        "cuda/node_backward.h", "node.rows() + 1 + bypass", "node.rows() + bypass", F64, "float64"
    ),
    "missing barrier, sums of a node": (
        "cuda/node_backward.h",
        "__syncthreads(); for (int i = threadIdx.x; i < (2 * node.incoming",
        "for (int i = threadIdx.x; i < (2 * node.incoming",
        F64, "float64",
    ),
    "pools of a column without its last row": (
        "cuda/pool_column.h", "load_row(centre + 1), window", "load_row(centre), window", F64, "float64"
    ),
    "off by one, sums over blocks": (
        "cuda/batch_norm.h",
        "if (first + j * parts < items)",
        "if (first + j * parts < items - 1)",
        F64, "float64",
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
    "gradients of all layers in one place": (
        "cuda/relu_conv_bn_backward.h", "chunk += round_up(k, 4)", "chunk += 0", CONV, "float64"
    ),
    "the first layer's gradients for all": (
        "cuda/relu_conv_bn_backward.h",
        "const auto& layer = a.layer[i];",
        "const auto& layer = a.layer[0];",
        CONV, "bfloat16",
    ),
    "off by one, tensor cores of preprocessing": (
        "cuda/product.h", "*high = low + 8 * ldd", "*high = low + 7 * ldd", CONV, "bfloat16"
    ),
    "weights of the first chunk for all": (
        "cuda/relu_conv_bn_forward.h", "int skipped = c0 % s.wk *", "int skipped = 0 *", CONV, "bfloat16"
    ),
    "missing barrier, strips": (
        "cuda/strip_backward.h",
        "__syncthreads(); if (exact) [[unlikely]] return spread_exactly",
        "if (exact) return spread_exactly",
        BF16, "bfloat16",
    ),
    "off by one, diagonals": (
        "cuda/strips.h", "kMargin + reach - diagonal", "kMargin + reach + 1 - diagonal", BF16, "bfloat16"
    ),
    "off by one, place of a maximum": (
        "cuda/strip_state_backward.h", "own = 8 - 3 * u - v", "own = 7 - 3 * u - v", BF16, "bfloat16"
    ),
    "means of warps left out of variances": (
        "cuda/strip_conv_forward.h", "one.square + count * off * off", "one.square + 0 * off",
        BF16, "bfloat16",
    ),
    "the mean left out of a sum": (
        "cuda/strip_second_convs_backward.h", "(inner[i] - mean[i])", "inner[i]", BF16, "bfloat16"
    ),
    "missing barrier, NAS-Bench-201": (
        "cuda/nor_conv_forward.h", "__syncthreads(); NorConvProduct", "NorConvProduct", F64, "float64"
    ),
    "missing barrier before a gradient, NAS-Bench-201": (
        "cuda/nor_conv_backward.h", "if (b) __syncthreads();", "", F64, "float64"
    ),
    "off by one, windows of average pools": (
        "cuda/nor_conv_backward.h", "window(x, a.w)", "window(x + 1, a.w)", F64, "float64"
    ),
    "taps from first to last, tensor cores": (
        "cuda/nor_conv_product.h", "tap = xs + (u *", "tap = xs + (-u *", BF16, "bfloat16"
    ),
    "the inputs of a sixteen's first half for both": (
        "cuda/nor_conv_factors.h", "8 * (j * c + k)", "8 * (j * c)", BF16, "bfloat16"
    ),
}  # fmt: skip


def test_planting_depends_on_neither_white_space_nor_comments():
    text = "int a=1;  // one\n\n  f( a );\nint ab = 1;"
    assert emulation.plant(text, "int a = 1; f(a);", "f(1);").split() == ["f(1);", "int", "ab", "=", "1;"]
    for twice_or_never in ("int", "1;", "f(b)"):
        with pytest.raises(AssertionError, match="once"):
            emulation.plant(text, twice_or_never, "")


def test_the_check_passes_unchanged(emulated_library):
    for order, dtype in (("fixed", "float64"), ("shuffled", "float64"), ("shuffled", "bfloat16")):
        result = run_library(emulated_library, order, dtype)
        assert result.returncode == 0, result.stderr


# of every kind one; the others take minutes
QUICK = (
    "missing barrier, forward",
    "off by one, window",
    "missing sum, tensor cores",
    "missing barrier before a chunk, preprocessing",
    "missing barrier, strips",
    "missing barrier, NAS-Bench-201",
)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MUTATIONS]
)
def test_planted_bugs_are_caught(emulated_library, tmp_path, name):
    objects = [emulated_library.parent / (source.replace("/", "_") + ".o") for source in emulation.sources()]
    *change, dtype = MUTATIONS[name]
    library = emulation.mutated(tmp_path, objects, *change)
    result = run_library(library, "shuffled", dtype)
    assert "too large an error" in result.stderr, result.stderr


@pytest.mark.slow
def test_address_and_undefined_behaviour_sanitizers(tmp_path):
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g1")
    library = emulation.build(tmp_path, flags)
    runtimes = [
        subprocess.run([emulation.compiler(), f"-print-file-name={name}"], capture_output=True, text=True)
        for name in ("libasan.so", "libubsan.so")
    ]
    preload = " ".join(runtime.stdout.strip() for runtime in runtimes)
    for dtype in ("float64", "float32", "bfloat16"):
        options = {"LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0"}
        result = run_library(library, "shuffled", dtype, **options)
        assert result.returncode == 0, result.stderr
