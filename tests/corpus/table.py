"""All cases, and the table of their families."""

from collections import Counter
from collections.abc import Iterable, Iterator

from . import archives, ground_truth, images, options, runs, stores, texts
from .case import Case, tried


def all_cases() -> list[Case]:
    return [
        case
        for module in (archives, ground_truth, images, options, texts, runs, stores)
        for case in module.cases()
    ]


def failures(cases: Iterable[Case]) -> Iterator[tuple[Case, str | None]]:
    """Each case, and what is wrong with the answer to it."""
    return ((case, tried(case)) for case in cases)


def table(results: Iterable[tuple[Case, str | None]]) -> str:
    """Lines of family, tried, passed and failed; below them each failure."""
    results = list(results)
    tries = Counter(case.family for case, _ in results)
    failed = Counter(case.family for case, wrong in results if wrong)
    rows = [("family", "tried", "passed", "failed")]
    rows += [(family, n, n - failed[family], failed[family]) for family, n in tries.items()]
    rows.append(("all", len(results), len(results) - failed.total(), failed.total()))
    lines = [f"{row[0]:12}{row[1]!s:>8}{row[2]!s:>8}{row[3]!s:>8}" for row in rows]
    return "\n".join([*lines, *(f"{case.id}: {wrong}" for case, wrong in results if wrong)])
