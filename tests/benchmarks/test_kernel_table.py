"""The table of microbenchmarks says how kernels compare with the fastest of plain PyTorch."""

import re

import pytest

from benchmarks.kernel_table import table


def benchmark(variant, direction, milliseconds, **extra):
    return {
        "name": f"test_cell[imagenet, 16x28-{variant}-{direction}]",
        "params": {"variant": variant, "direction": direction},
        "stats": {"median": milliseconds / 1e3},
        "extra_info": extra,
    }


BENCHMARKS = [
    benchmark("eager", "forward", 4),
    benchmark("eager", "backward", 10),
    benchmark("eager-channels_last", "forward", 6),
    benchmark("eager-channels_last", "backward", 9),
    benchmark("cpu", "forward", 2, share_of_roof=0.5),
    benchmark("cpu", "backward", 3, share_of_roof=0.254),
]


def test_kernels_against_the_fastest_of_each_direction():
    head, _, row = table({"benchmarks": BENCHMARKS}).splitlines()
    assert head == "| op | eager | eager-channels_last | cpu | times faster | share of roof, % |"
    assert row == "| cell, imagenet, 16x28 | 4.0 + 10.0 | 6.0 + 9.0 | 2.0 + 3.0 | 2.0 + 3.0 | 50 + 25 |"


@pytest.mark.parametrize(
    ("benchmarks", "message"),
    [
        (BENCHMARKS[:-1], "expected both directions, got ['forward'] of cell, imagenet, 16x28, cpu"),
        ([{"name": "test_other", "params": None}], "expected benchmarks of test_kernels.py"),
    ],
)
def test_other_files_are_refused(benchmarks, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        table({"benchmarks": benchmarks})
