"""npz files: every corruption of the archive and of the headers, wrong types, shapes and labels, bombs."""

import io
import pickle
import zipfile

import numpy as np

from rfdarts_fast.data import load

from .case import Case, Payload, damaged

FAMILY = "npz"
X = np.random.RandomState(0).randint(0, 256, (12, 8, 8, 3)).astype(np.uint8)
Y = np.arange(12) % 3
GOOD = {"x_train": X, "y_train": Y, "x_test": X[:3], "y_test": Y[:3]}


def npy(array, **options):
    content = io.BytesIO()
    np.lib.format.write_array(content, np.asanyarray(array), **options)
    return content.getvalue()


def raw_npy(header: bytes, version=b"\1\0", length=None):
    size = len(header) if length is None else length
    return b"\x93NUMPY" + version + size.to_bytes(2 if version == b"\1\0" else 4, "little") + header


def members(**changes):
    arrays = {key: npy(value) for key, value in GOOD.items()}
    arrays |= {
        key: value if isinstance(value, bytes | None) else npy(value) for key, value in changes.items()
    }
    return {f"{key}.npy": value for key, value in arrays.items() if value is not None}


def archive(contents=None, compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as zipped:
        for name, content in (contents or members()).items():
            zipped.writestr(name, content)
    return file.getvalue()


def read(content):
    def run(folder):
        (folder / "a.npz").write_bytes(content)
        return load("npz", root=folder / "a.npz")

    return run


def case(name, content, accepted=False, names="a.npz"):
    return Case(FAMILY, name, read(content), accepted, names)


def patched(content, signature, offset, new):
    """An archive whose first record of this signature has other bytes at an offset."""
    at = content.index(signature) + offset
    return content[:at] + new + content[at + len(new) :]


def cases():
    stored, deflated = archive(), archive(compression=zipfile.ZIP_DEFLATED)
    yield case("good", stored, True)
    yield case("good, deflated", deflated, True)
    yield case("of other arrays too", archive(members(z=np.array([Payload()], object))), True)
    yield case("bytes before the archive", b"#!/bin/sh\n" + stored, True)
    for kind, content in (("stored", stored), ("deflated", deflated)):
        for name, bad in damaged(content, 16, 40):
            yield case(f"{kind}, {name}", bad, None if "flips" in name else False)
    # every field of the first local header and of the first entry of the directory
    for signature, fields in (
        (b"PK\3\4", range(4, 30, 2)),
        (b"PK\1\2", range(4, 46, 2)),
        (b"PK\5\6", range(4, 22, 2)),
    ):
        for offset in fields:
            bad = patched(stored, signature, offset, b"\xff\xff")
            yield case(f"{signature!r} + {offset} overwritten", bad, None)
    for name, content in {
        "empty": b"", "text": b"no archive", "an empty archive": archive({"z": b""}), "npy": npy(X),
        "a pickle": pickle.dumps(Payload()), "zeros": bytes(1000), "a gzip": b"\x1f\x8b" + bytes(50),
        "a directory end alone": b"PK\5\6" + bytes(18),
        "a huge directory": b"PK\5\6" + bytes(4) + b"\xff\xff" * 2 + b"\xff\xff\xff\x7f" * 2 + bytes(2),
        "bzip2": archive(compression=zipfile.ZIP_BZIP2), "lzma": archive(compression=zipfile.ZIP_LZMA),
        "encrypted": patched(patched(stored, b"PK\3\4", 6, b"\1"), b"PK\1\2", 8, b"\1"),
        "a size that lies": patched(stored, b"PK\1\2", 24, b"\xfe\xff\xff\xff"),
        "a checksum that lies": patched(patched(stored, b"PK\3\4", 14, b"abcd"), b"PK\1\2", 16, b"abcd"),
        "twice": archive({**members(), "x_test": npy(X)}),
    }.items():  # fmt: skip
        yield case(name, content)
    for key in GOOD:
        yield case(f"without {key}", archive(members(**{key: None})), names=key)
        for name, content in {
            "objects": np.array([Payload()] * 12, object), "text": np.array(["a"] * 12),
            "complex": np.zeros(12, complex), "NaN": np.full(12, np.nan), "dates": np.zeros(12, "M8[s]"),
            "records": np.zeros(12, [("a", "u1")]), "void": np.zeros(12, "V8"), "a scalar": np.uint8(1),
            "nothing": np.zeros(0, np.uint8), "nothing of images": np.zeros((0, 8, 8, 3), np.uint8),
            "five axes": np.zeros((12, 1, 1, 1, 3), np.uint8), "bytes": b"\0" * 200, "no bytes": b"",
            "one byte more": npy(GOOD[key]) + b"\0", "one byte less": npy(GOOD[key])[:-1],
            "a bomb": raw_npy(b"{'descr': '|u1', 'fortran_order': False, 'shape': (12, 900000, 900000, 3)}"),
            "a bomb of ints": raw_npy(b"{'descr': '<i8', 'fortran_order': False, 'shape': (9999999999999,)}"),
            "version 3": npy(GOOD[key], version=(3, 0)), "version 9": raw_npy(b"{}", b"\x09\0"),
        }.items():  # fmt: skip
            yield case(f"{key}: {name}", archive(members(**{key: content})))
    for name, header in {
        "empty": b"", "no dictionary": b"[]", "no keys": b"{}",
        "code": b"{'shape': __import__('os').abort()}",
        "deep": b"(" * 5000, "deep sums": b"{'shape':" + b"1+" * 4000 + b"1}", "null": b"{\0}",
        "text": b"'",
        "bytes": b"\xff\xfe", "negative": b"{'descr': '|u1', 'fortran_order': False, 'shape': (-1,)}",
        "huge": b"{'descr': '|u1', 'fortran_order': False, 'shape': (" + b"9" * 5000 + b",)}",
        "fraction": b"{'descr': '|u1', 'fortran_order': False, 'shape': (1.5,)}",
        "truth": b"{'descr': '|u1', 'fortran_order': False, 'shape': (True, True, True)}",
        "no type": b"{'descr': 'evil', 'fortran_order': False, 'shape': (1,)}",
        "type of lists": b"{'descr': [[[]]], 'fortran_order': False, 'shape': (1,)}",
        "huge type": b"{'descr': '<U2147483647', 'fortran_order': False, 'shape': (12,)}",
        "order": b"{'descr': '|u1', 'fortran_order': 1, 'shape': (1,)}",
        "padded": b"{'descr': '|u1', 'fortran_order': False, 'shape': (1,)}" + b" " * 60_000,
    }.items():  # fmt: skip
        yield case(f"header: {name}", archive(members(x_train=raw_npy(header))))
        yield case(f"header of version 2: {name}", archive(members(y_train=raw_npy(header, b"\2\0"))))
    for length in (0, 1, 200, 65_535):
        yield case(f"header of length {length}", archive(members(x_train=raw_npy(b"{}", length=length))))
    for name, y in {
        "negative": Y - 1, "from 1 on": Y + 1, "a gap": Y * 2, "huge": Y + 2**40,
        "unsigned": Y.astype("u8") + 2**63,
        "truth": Y > 0, "fractions": Y / 2, "rows": Y[:, None], "short": Y[:-1], "long": np.append(Y, 0),
    }.items():  # fmt: skip
        yield case(f"labels: {name}", archive(members(y_train=y)), names="y_train")
        yield case(
            f"test labels: {name}",
            archive(members(y_test=np.append(y, 7) if y.ndim == 1 else y)),
            names="y_test",
        )
    for name, x in {
        "not square": X[:, :4], "channels first": X.transpose(0, 3, 1, 2), "two channels": X[..., :2],
        "four channels": np.concatenate([X, X[..., :1]], 3), "int64": X.astype(int), "float": X / 255,
        "signed": X.astype(np.int8), "16 bits": X.astype(np.uint16), "no pixels": X[:, :0, :0],
        "flat": X.reshape(12, -1),
    }.items():  # fmt: skip
        yield case(f"images: {name}", archive(members(x_train=x)), names="x_train")
    yield case("images: Fortran order", archive(members(x_train=np.asfortranarray(X))), True)
    yield case("labels: big-endian", archive(members(y_train=Y.astype(">i2"))), True)
    yield case("other sizes", archive(members(x_test=X[:3, :4, :4])), names="x_test")
    for name, names in {
        "two": np.array(["a", "b"]), "numbers": np.arange(3), "objects": np.array(["a", "b", "c"], object),
        "rows": np.array([["a", "b", "c"]]), "none": np.zeros(0, "<U1"), "bytes": np.array([b"a"] * 3),
        "too many": np.zeros(1_000_001, "<U0"),
    }.items():  # fmt: skip
        yield case(f"names: {name}", archive(members(class_names=names)))
    yield case("names: lone surrogates", archive(members(class_names=npy(np.array(["\ud800"] * 3)))), None)
