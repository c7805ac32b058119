"""The table of microbenchmarks says how kernels compare with the fastest of plain PyTorch."""

from benchmarks.kernel_table import table


def benchmark(variant, direction, milliseconds, **extra):
    name = f"test_cell[imagenet, 16x28-{variant}-{direction}]"
    return {"name": name, "stats": {"median": milliseconds / 1e3}, "extra_info": extra}


def test_kernels_against_the_fastest_of_each_direction():
    report = {
        "benchmarks": [
            benchmark("eager", "forward", 4),
            benchmark("eager", "backward", 10),
            benchmark("eager-channels_last", "forward", 6),
            benchmark("eager-channels_last", "backward", 9),
            benchmark("cpu", "forward", 2, share_of_roof=0.5),
            benchmark("cpu", "backward", 3, share_of_roof=0.254),
        ]
    }
    head, _, row = table(report).splitlines()
    assert head == "| op | eager | eager-channels_last | compile | cpu | times faster | share of roof, % |"
    assert row == ("| cell, imagenet, 16x28 | 4.0 + 10.0 | 6.0 + 9.0 |  | 2.0 + 3.0 | 2.0 + 3.0 | 50 + 25 |")
