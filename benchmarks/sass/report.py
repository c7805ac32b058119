"""A profile as text: units, classes and opcodes of instructions, the source lines that take most."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from benchmarks.sass.pipes import Work, added
from benchmarks.sass.profile import Profile


def table(head: list[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [head, ["---"] * len(head), *([str(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def ordered(counts: dict[str, float], most: int = 100) -> list[tuple[str, float]]:
    return sorted(counts.items(), key=lambda item: -item[1])[:most]


def counted(counts: dict[str, float], most: int, name: str) -> str:
    total = sum(counts.values())
    rows = [(key, f"{count / 1e6:.2f}", f"{count / total:.1%}") for key, count in ordered(counts, most)]
    return table([name, "M warp instructions", "share"], rows)


def source_line(path: str, number: int) -> str:
    try:
        text = Path(path).read_text().splitlines()[number - 1].strip()
    except (OSError, IndexError):
        return ""
    return "`" + text[:80].replace("|", "\\|") + "`"


def launches_table(profiles: list[Profile]) -> str:
    rows = []
    for i, one in enumerate(profiles):
        work = one.work
        warps = one.launch.blocks * -(-one.launch.threads[0] // 32)
        lanes = float((one.issued * one.lanes).sum() / max(one.issued.sum(), 1))
        conflicts = one.wavefronts[one.shared].sum() / max(one.ideal[one.shared].sum(), 1)
        rows.append(
            (
                i,
                "x".join(map(str, one.launch.grid)),
                one.sampled,
                f"{work.instructions / 1e6:.2f}",
                f"{work.instructions / warps:.0f}",
                f"{lanes:.1f}",
                f"{conflicts:.2f}",
                f"{work.seconds('issue') * 1e6:.1f}",
                f"{work.seconds(work.binding) * 1e6:.1f}",
                work.binding,
                f"{one.unknown:.1%}",
                len(one.assumed),
            )
        )
    head = "launch, grid, blocks sampled, M warp instructions, of a warp, lanes, wavefronts / least, issue µs"
    head += ", longest unit µs, unit, accesses of unknown address, branches on data"
    return table(head.split(", "), rows)


def doubts(profiles: list[Profile]) -> str:
    """What was assumed, by kernel: nothing, mostly."""
    assumed: dict[str, set[int]] = defaultdict(set)
    unknown: dict[str, float] = {}
    for one in profiles:
        if one.assumed:
            assumed[one.launch.name].update(one.assumed)
        if one.unknown:
            unknown[one.launch.name] = max(one.unknown, unknown.get(one.launch.name, 0.0))
    lines = [
        f"{name}: {len(offsets)} branches on data, taken to go on.\n" for name, offsets in assumed.items()
    ]
    lines += [
        f"{name}: {share:.0%} of accesses at addresses read from memory, taken to be consecutive.\n"
        for name, share in unknown.items()
    ]
    return "".join(lines)


def units_table(work: Work) -> str:
    rows = [(unit, f"{work.seconds(unit) * 1e6:.1f}") for unit, _ in ordered(work.cycles)]
    return table(["unit", "µs at least"], rows)


def lines_table(profiles: list[Profile], most: int) -> str:
    rows: dict[tuple[str, int], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    total = 0.0
    for profile in profiles:
        for i, one in enumerate(profile.kernel.instructions):
            row = rows[one.line]
            row[0] += profile.issued[i]
            total += profile.issued[i]
            if profile.shared[i]:
                row[1] += profile.wavefronts[i]
                row[2] += profile.ideal[i]
    found = sorted(rows.items(), key=lambda item: -item[1][0])[:most]
    return table(
        ["line", "M warp instructions", "share", "M wavefronts", "M without conflicts", "source"],
        [
            (
                f"{Path(path).name}:{number}",
                f"{count / 1e6:.2f}",
                f"{count / total:.1%}",
                f"{wavefronts / 1e6:.2f}",
                f"{ideal / 1e6:.2f}",
                source_line(path, number),
            )
            for (path, number), (count, wavefronts, ideal) in found
        ],
    )


def kernel_report(profiles: list[Profile], lines: int) -> str:
    """Of the launches of one kernel."""
    work = added([one.work for one in profiles])
    opcodes: dict[str, float] = defaultdict(float)
    for profile in profiles:
        each = zip(profile.kernel.instructions, profile.classes, profile.issued, strict=True)
        for one, name, count in each:
            if count:
                opcodes[f"{one.opcode} ({name})"] += count
    parts = [
        launches_table(profiles),
        "All launches:\n",
        units_table(work),
        counted(work.issued, 20, "class"),
        counted(opcodes, 25, "opcode"),
        lines_table(profiles, lines),
    ]
    return "\n".join(parts)
