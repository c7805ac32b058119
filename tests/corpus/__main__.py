"""The table of families of hostile inputs, tried, passed and failed: python -m tests.corpus [FAMILY ...]."""

import sys

from tqdm import tqdm

from .table import all_cases, failures, table

wanted = sys.argv[1:]
cases = [case for case in all_cases() if not wanted or case.family in wanted]
results = list(failures(tqdm(cases, unit="case", disable=not sys.stderr.isatty())))
print(table(results))
sys.exit(any(wrong for _, wrong in results))
