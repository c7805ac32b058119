"""Tables of NAS-Bench-201 in CSV files: cut short, other columns, numbers that are none, bombs."""

import gzip
import os

from rfdarts_fast.tables import open_table

from .case import Case, damaged

CELL = "|none~0|+|none~0|none~1|+|none~0|none~1|none~2|"
GOOD = f"index,arch,cifar10_valid,cifar10_test\n0,{CELL},9.71,10\n".encode()


def case(name, content, accepted=False):
    def run(folder):
        (folder / "table.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
        return open_table(folder / "table.csv")

    return Case("tables", name, run, accepted, "" if accepted is None else "table.csv")


def cases():
    yield case("good", GOOD, True)
    yield case("gzipped", gzip.compress(GOOD), True)
    for name, bad in damaged(GOOD, 20, 60):
        yield case(name, bad, None)
    for name, content in {
        "empty": b"", "null bytes": bytes(99), "one line": GOOD.splitlines()[0], "not UTF-8": b"\xff" + GOOD,
        "a bomb": gzip.compress(bytes(40_000_000), 1), "gzip alone": b"\x1f\x8b",
        "half a gzip": gzip.compress(GOOD)[:-9], "twice": GOOD + GOOD.splitlines()[1],
        "a long field": b"arch,a_test\n" + b"x" * 200_000, "a pickle": b"\x80\x04N.",
        "an open quote": GOOD + b'"', "UTF-16": GOOD.decode().encode("utf-16"),
    }.items():  # fmt: skip
        yield case(name, content)
    for value in ("nan", "inf", "-1", "1e2", "101", "", " 9", "१", "9" * 5000, "0x9", "1_0"):
        yield case(f"a percentage: {value[:9]!r}", GOOD.replace(b"9.71", value.encode()))
        yield case(f"an index: {value[:9]!r}", GOOD.replace(b"0,|", f"{value},|".encode()), value == "101")
    for name, make in {
        "FIFO": os.mkfifo,
        "folder": lambda p: p.mkdir(),
        "loop": lambda p: p.symlink_to(p),
    }.items():

        def run(folder, make=make):
            make(folder / "table.csv")
            return open_table(folder / "table.csv")

        yield Case("tables", name, run, False, "table.csv")
