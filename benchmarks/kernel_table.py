"""A table of microbenchmarks from pytest-benchmark's JSON: kernels against the fastest of plain PyTorch.

pytest benchmarks/test_kernels.py --benchmark-enable --benchmark-json=FILE
python -m benchmarks.kernel_table FILE [--out SMALLER_FILE]
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path

PLAIN = "eager", "eager-channels_last", "compile"
DIRECTIONS = "forward", "backward"


def table(report: dict) -> str:
    """Medians in ms, forward + backward; of the kernels' also how many times faster than the fastest of plain
    PyTorch they are, and the least time by the machine's measured roofs as a share of theirs."""
    found: dict[str, dict[str, dict[str, dict]]] = defaultdict(lambda: defaultdict(dict))
    for benchmark in report["benchmarks"]:
        op, case, variant, direction = re.fullmatch(
            rf"test_(\w+)\[(.+?)-({'|'.join(PLAIN)}|cpu|cuda|triton)-(forward|backward)\]", benchmark["name"]
        ).groups()  # type: ignore[union-attr]
        found[f"{op}, {case}"][variant][direction] = benchmark
    kernels = sorted({variant for case in found.values() for variant in case} - {*PLAIN})
    columns = [*PLAIN, *(name for kernel in kernels for name in (kernel, "times faster", "share of roof, %"))]
    lines = ["| op | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
    for name, variants in found.items():
        medians = {
            variant: [1e3 * of[direction]["stats"]["median"] for direction in DIRECTIONS]
            for variant, of in variants.items()
        }
        cells = [_both(medians.get(variant)) for variant in PLAIN]
        for kernel in kernels:
            if kernel not in medians:
                cells += ["", "", ""]
                continue
            best = [min(medians[v][i] for v in PLAIN if v in medians) for i in range(2)]
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
        args.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
