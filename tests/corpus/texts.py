"""Genotypes and split files: every field wrong in every way, and bytes that are no text."""

import gzip
import json
import os

from rfdarts_fast.data import read_split_file
from rfdarts_fast.retrain.run import read_genotype
from rfdarts_fast.spaces import PUBLISHED, parse, to_json

from .case import NO_FILES, Case, damaged

GENES = [["skip_connect", 0], ["sep_conv_3x3", 1]]
FIELDS = {"normal": GENES, "normal_concat": [2], "reduce": GENES, "reduce_concat": [2]}
CELL = "|none~0|+|none~0|nor_conv_1x1~1|+|none~0|none~1|none~2|"
WRONG = {
    "null": None, "truth": True, "number": 3, "fraction": 0.5, "text": "skip_connect",
    "mapping": {"a": 1}, "nothing": [],
    "nested": [[[[]]]], "nulls": [None, None], "texts": ["a", "b"], "numbers": [3.5, 4.5],
    "triples": [["none", 0, 1]] * 2,
    "none": [["none", 0], ["none", 1]], "code": [["__import__('os')", 0]] * 2,
    "negative": [["skip_connect", -1]] * 2,
    "later": [["skip_connect", 2]] * 2, "huge": [["skip_connect", 10**400]] * 2,
    "truths": [["skip_connect", True]] * 2,
    "odd": GENES[:1], "long name": [["x" * 5000, 0]] * 2, "lines": [["a\nb", 0]] * 2,
    "unicode": [["skip_connect", "１"]] * 2,
    "concat beyond": [99], "concat negative": [-1], "concat huge": [10**400], "concat truth": [True, False],
}  # fmt: skip


def genotype_case(name, text, accepted=False):
    return Case("genotypes", name, lambda _: parse(text), accepted, "" if accepted else "genotype")


def literal(**changes):
    return f"Genotype({', '.join(f'{key}={value!r}' for key, value in {**FIELDS, **changes}.items())})"


def genotype_cases():
    for name, text in {
        "name": "DARTS_V2", "spaces": " DARTS_V1\n", "JSON": json.dumps(FIELDS), "literal": literal(),
        "cell": CELL,
        "range": literal().replace("normal_concat=[2]", "normal_concat=range(2, 3)"),
        "own JSON": to_json(PUBLISHED["PC_DARTS_image"]), "own text": str(PUBLISHED["DARTS_V1"]),
    }.items():  # fmt: skip
        yield genotype_case(f"good: {name}", text, True)
    for field in FIELDS:
        for name, value in WRONG.items():
            yield genotype_case(f"JSON, {field}: {name}", json.dumps({**FIELDS, field: value}))
            yield genotype_case(f"literal, {field}: {name}", literal(**{field: value}))
        yield genotype_case(
            f"JSON without {field}", json.dumps({k: v for k, v in FIELDS.items() if k != field})
        )
        yield genotype_case(f"JSON, {field} twice", json.dumps(FIELDS)[:-1] + f', "{field}": [2]}}')
    for name, bad in damaged(literal().encode(), 10, 40):
        yield genotype_case(f"literal, {name}", bad.decode("latin1"), None)
    for name, bad in damaged(CELL.encode(), 10, 20):
        yield genotype_case(f"cell, {name}", bad.decode("latin1"), None)
    for name, text in {
        "empty": "", "unknown": "DARTS_V3", "bytes": "\udcff", "null": "\0", "lines": "a\nb\x1b[1m",
        "long": "x" * 300_000,
        "code": "__import__('os').abort()", "call": "Genotype(__import__('os').abort())",
        "no call": "Genotype(",
        "lambda": "Genotype(normal=lambda: 0)", "walrus": "Genotype(normal=(a := 1))",
        "star": "Genotype(*[])",
        "stars": "Genotype(**{})", "attribute": literal() + ".x", "two": literal() + literal(),
        "sum": literal() + "+1",
        "deep": "Genotype(normal=" + "(" * 5000, "deep minus": "Genotype(normal=" + "-" * 50_000 + "1)",
        "deep sum": "Genotype(normal=" + "1+" * 50_000 + "1)",
        "deep index": "Genotype(normal=a" + "[0]" * 50_000 + ")",
        "deep JSON": "{" + '"a":{' * 50_000, "deep list": '{"normal":' + "[" * 90_000,
        "huge int": '{"normal":' + "9" * 5000 + "}",
        "huge hex": "Genotype(normal=0x" + "f" * 50_000 + ")", "power": "Genotype(normal=9**9**9)",
        "shift": "Genotype(normal=1<<99999999)", "repeat": "Genotype(normal=[0]*10**9)",
        "f-string": "Genotype(normal=f'{1}')",
        "bytes literal": "Genotype(normal=b'a')",
        "endless range": literal().replace("[2]", "range(10**18)", 1),
        "range of nothing": literal().replace("[2]", "range()", 1),
        "range of a range": literal().replace("[2]", "range(range(1))", 1),
        "JSON list": "[]", "JSON text": '"a"', "empty JSON": "{}", "NaN": '{"normal": NaN}',
        "edges": '{"edges": 3}',
        "six wrong edges": json.dumps({"edges": [["none"]] * 6}),
        "seven edges": json.dumps({"edges": ["none"] * 7}),
        "both": json.dumps({**FIELDS, "edges": ["none"] * 6}), "cell of bars": "|" * 9,
        "cell of unicode": CELL.replace("0", "０"),
        "cell of tildes": "|none~~0|", "long cell": "|none~0|+" * 20_000,
        "cell without bars": "|none~0+none~0",
    }.items():  # fmt: skip
        yield genotype_case(name, text)
    for name, write in {
        **NO_FILES, "absent": lambda p: None,
        "empty": lambda p: p.touch(), "bytes": lambda p: p.write_bytes(b"\xff\xfe"),
        "zeros": lambda p: p.write_bytes(bytes(999)),
        "a gigabyte": lambda p: os.truncate(p, 10**9) if p.touch() is None else None,
        "device": lambda p: p.symlink_to("/dev/zero"),
    }.items():  # fmt: skip

        def run(folder, write=write):
            write(folder / "a.json")
            return read_genotype(str(folder / "a.json"))

        yield Case("genotypes", f"file: {name}", run, False, "genotype")


INDICES = {"train": ["int", ["0", "2"]], "valid": ["int", ["1", "5"]]}


def split_case(name, content, accepted=False):
    def run(folder):
        path = folder / "split.txt"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_split_file(path, 6)

    return Case("split files", name, run, accepted, "split.txt")


def split_cases():
    good = json.dumps(INDICES).encode()
    yield split_case("good", good, True)
    yield split_case(
        "good, numbers", json.dumps({k: ["int", [int(i) for i in v[1]]] for k, v in INDICES.items()}), True
    )
    yield split_case("good, zipped", gzip.compress(good), True)
    yield split_case("other keys too", json.dumps({**INDICES, "test": None}), True)
    for name, bad in damaged(good, 10, 30):
        yield split_case(name, bad, None)
    for name, bad in damaged(gzip.compress(good, mtime=0), 10, 30):
        yield split_case(f"zipped, {name}", bad, None)
    for name, entry in {
        "null": None, "text": "0 1", "numbers": [0, 1], "other type": ["str", ["0"]],
        "three": ["int", ["0"], []],
        "a mapping": {"int": ["0"]}, "nothing": ["int", []], "null in it": ["int", [None]],
        "fraction": ["int", [1.5]],
        "whole fraction": ["int", [1.0]], "truth": ["int", [True]], "letters": ["int", ["a"]],
        "empty": ["int", [""]],
        "blank": ["int", [" 0"]], "plus": ["int", ["+0"]], "underscore": ["int", ["0_0"]],
        "unicode": ["int", ["٠"]],
        "hexadecimal": ["int", ["0x0"]], "negative": ["int", ["-1"]], "beyond": ["int", ["6"]],
        "huge": ["int", ["9" * 30]],
        "a huge number": ["int", [10**400]], "NaN": ["int", [float("nan")]], "inf": ["int", [float("inf")]],
        "twice": ["int", ["0", "0"]], "overlap": ["int", ["1"]], "lists": ["int", [["0"]]],
        "long": ["int", ["x" * 10_000]],
        "lines": ["int", ["a\nb"]],
    }.items():  # fmt: skip
        yield split_case(f"indices: {name}", json.dumps({**INDICES, "train": entry}))
    for name, content in {
        "empty": b"", "text": b"0 1 2", "null": b"null", "list": b"[]", "number": b"3", "no keys": b"{}",
        "one key": b'{"train": ["int", ["0"]]}', "bytes": b"\xff\xfe\0", "null bytes": bytes(99),
        "deep": b"[" * 90_000,
        "huge int": b'{"train": ' + b"9" * 5000 + b"}", "twice": good[:-1] + b', "train": ["int", ["0"]]}',
        "many keys": json.dumps({str(i): i for i in range(5000)}),
        "a bomb": gzip.compress(bytes(70_000_000), 1),
        "a bomb of text": gzip.compress(b"[" * 65_000_000, 1),
        "gzip of gzip": gzip.compress(gzip.compress(good)),
        "gzip alone": b"\x1f\x8b", "UTF-16": good.decode().encode("utf-16"), "a pickle": b"\x80\x04N.",
    }.items():  # fmt: skip
        yield split_case(name, content, name == "UTF-16")
    for name, make in {
        **NO_FILES, "absent": lambda p: None,
        "device": lambda p: p.symlink_to("/dev/zero"),
    }.items():  # fmt: skip

        def run(folder, make=make):
            make(folder / "split.txt")
            return read_split_file(folder / "split.txt", 6)

        yield Case("split files", name, run, False, "split.txt")


def cases():
    yield from genotype_cases()
    yield from split_cases()
