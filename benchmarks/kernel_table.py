"""A table of microbenchmarks from pytest-benchmark's JSON: kernels against the fastest of plain PyTorch.

pytest benchmarks/test_kernels.py --benchmark-enable --benchmark-json=FILE
python -m benchmarks.kernel_table FILE [--out SMALLER_FILE]
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

from rfdarts_fast.ops import backends
from rfdarts_fast.runs.files import write_json

DIRECTIONS = "forward", "backward"


def table(report: dict) -> str:
    """Medians in ms, forward + backward; of the kernels' also how many times faster than the fastest of plain
    PyTorch they are, and the least time by the machine's measured roofs as a share of theirs.

    Raises:
        ValueError: for a report of other benchmarks, or of one direction alone.
    """
    found: dict[str, dict[str, dict[str, dict]]] = defaultdict(lambda: defaultdict(dict))
    for benchmark in report["benchmarks"]:
        variant, direction = ((benchmark["params"] or {}).get(key) for key in ("variant", "direction"))
        if variant is None or direction not in DIRECTIONS:
            raise ValueError(f"file: expected benchmarks of test_kernels.py, got {benchmark['name']!r}")
        op, _, case = benchmark["name"].removeprefix("test_").partition("[")
        found[f"{op}, {case.removesuffix(f'-{variant}-{direction}]')}"][variant][direction] = benchmark
    for name, variants in found.items():
        for variant, of in variants.items():
            if {*of} != {*DIRECTIONS}:
                raise ValueError(f"file: expected both directions, got {[*of]} of {name}, {variant}")
    every = dict.fromkeys(variant for variants in found.values() for variant in variants)
    plain, kernels = ([v for v in every if (v in backends()) == wanted] for wanted in (False, True))
    columns = [*plain, *(name for kernel in kernels for name in (kernel, "times faster", "share of roof, %"))]
    lines = ["| op | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
    for name, variants in found.items():
        medians = {
            variant: [1e3 * of[direction]["stats"]["median"] for direction in DIRECTIONS]
            for variant, of in variants.items()
        }
        cells = [_both(medians.get(variant)) for variant in plain]
        for kernel in kernels:
            if kernel not in medians:
                cells += ["", "", ""]
                continue
            best = [min(medians[v][i] for v in plain if v in medians) for i in range(2)]
            ratios = [theirs / ours for theirs, ours in zip(best, medians[kernel], strict=True)]
            shares = [100 * variants[kernel][d]["extra_info"]["share_of_roof"] for d in DIRECTIONS]
            cells += [_both(medians[kernel]), _both(ratios), _both(shares, 0)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _both(pair: list[float] | None, digits: int = 1) -> str:
    return " + ".join(f"{x:.{digits}f}" for x in pair) if pair else ""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="of --benchmark-json")
    parser.add_argument("--out", type=Path, help="also write the file there without each round's time")
    args = parser.parse_args()
    report = json.loads(args.file.read_text())
    print(table(report))
    if args.out:
        for benchmark in report["benchmarks"]:
            benchmark["stats"].pop("data", None)
        write_json(args.out, report)


if __name__ == "__main__":
    main()
