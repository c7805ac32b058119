"""Coverage-guided fuzzing of one parser: python -m tests.corpus.fuzz PARSER [libFuzzer's options].

Without options it runs for 20 seconds. The first input with a wrong answer ends it and is written to the
working folder.
"""

import sys
import tempfile
from pathlib import Path

import atheris

# the parsers that are Python; compiled ones are seen through them
INSTRUMENTED = [
    "rfdarts_fast.data",
    "rfdarts_fast.runs",
    "rfdarts_fast.spaces",
    "yaml",
    "zipfile",
    "json",
    "PIL",
]


class WrongAnswer(Exception):
    """A parser did not read the input, and did not refuse it in one line."""


def main() -> None:
    parser, *options = sys.argv[1:]
    with atheris.instrument_imports(include=INSTRUMENTED):
        from .parsers import SEEDS, answer

    folder = Path(tempfile.mkdtemp())
    seeds = Path(tempfile.mkdtemp())
    for i, seed in enumerate(SEEDS[parser]):
        (seeds / str(i)).write_bytes(seed)

    def check(data: bytes) -> None:
        wrong = answer(parser, data, folder)
        if wrong:
            raise WrongAnswer(wrong)

    options = options or ["-max_total_time=20"]
    atheris.Setup([sys.argv[0], *options, "-max_len=4096", str(seeds)], check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
