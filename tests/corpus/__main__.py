"""The table of families of hostile inputs, tried, passed and failed: python -m tests.corpus [FAMILY ...].

With --package CHECKOUT the package of another checkout answers, of an earlier revision for one, by the rules
of today: a usage box, or a plain ValueError for a genotype, is a failure.

    git worktree add ../before 50b6400
    python -m tests.corpus --package ../before
"""

import argparse
import sys

from tqdm import tqdm

from .earlier import take_package

parser = argparse.ArgumentParser("python -m tests.corpus")
parser.add_argument("family", nargs="*")
parser.add_argument("--package", metavar="CHECKOUT")
options = parser.parse_args()
if options.package:
    take_package(options.package)

from .table import all_cases, failures, table  # noqa: E402

cases = [case for case in all_cases() if not options.family or case.family in options.family]
results = list(failures(tqdm(cases, unit="case", disable=not sys.stderr.isatty())))
print(table(results))
sys.exit(any(wrong for _, wrong in results))
