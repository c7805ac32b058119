"""Archives that lie about their arrays: refused by their headers, before memory is taken."""

import io
import pickle
import resource
import zipfile

import numpy as np
import pytest
from image_samples import npz_arrays

from rfdarts_fast.data import DataError, load
from rfdarts_fast.data.memory import available_memory

GOOD = npz_arrays()


def npy(array):
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def header(dtype, shape, version=b"\1\0", padding=0):
    text = (
        f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}".encode()
        + b" " * padding
        + b"\n"
    )
    return b"\x93NUMPY" + version + len(text).to_bytes(2 if version == b"\1\0" else 4, "little") + text


def archive(path, compression=zipfile.ZIP_DEFLATED, **members):
    """An .npz of these bytes in place of, or beside, good arrays."""
    with zipfile.ZipFile(path, "w", compression) as file:
        for key, content in ({key: npy(array) for key, array in GOOD.items()} | members).items():
            file.writestr(f"{key}.npy", content)
    return path


def refused(path, message):
    with pytest.raises(DataError, match=message) as error:
        load("npz", root=path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


class Payload:
    """An object that leaves a mark when it is unpickled."""

    ran = False

    def __reduce__(self):
        return setattr, (Payload, "ran", True)


@pytest.mark.parametrize("key", [*GOOD, "class_names"])
def test_objects_are_never_unpickled(tmp_path, key):
    content = npy(np.array([Payload()], object))
    assert pickle.loads(content[content.index(b"\n") + 1 :]) is not None and Payload.ran
    Payload.ran = False
    refused(archive(tmp_path / "a.npz", **{key: content}), f"{key}: expected .*, got object")
    assert not Payload.ran


def test_arrays_larger_than_memory_are_refused_by_their_headers(tmp_path):
    bomb = header("|u1", (10**6, 10**5, 10**5, 3))
    path = archive(tmp_path / "a.npz", x_train=bomb, y_train=header("<i8", (10**6,)))
    refused(path, "x_train: expected the 30000000000000[0-9]* bytes of its header's array, got [0-9]+$")
    # an archive that lies about that, too
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\1\2")
    content[entry + 24 : entry + 28] = (2**32 - 2).to_bytes(4, "little")
    path.write_bytes(content)
    refused(path, "x_train: expected the 30000000000000")


def test_arrays_that_fit_together_but_not_into_memory(tmp_path, monkeypatch):
    path = archive(tmp_path / "a.npz")
    needed = 2 * sum(GOOD[key].nbytes for key in ("x_train", "x_test"))
    needed += 4 * sum(GOOD[key].nbytes for key in ("y_train", "y_test"))
    monkeypatch.setattr("rfdarts_fast.data.sources.npz.available_memory", lambda: needed)
    load("npz", root=path)
    monkeypatch.setattr("rfdarts_fast.data.sources.npz.available_memory", lambda: needed - 1)
    monkeypatch.setattr(np.lib.format, "read_array", None)
    refused(path, "expected arrays that fit into 6.*e-06 GB of memory, got some that take")


def test_limits_of_the_process_count():
    free, (soft, hard) = available_memory(), resource.getrlimit(resource.RLIMIT_AS)
    assert 10**8 < free < 10**14
    try:
        resource.setrlimit(resource.RLIMIT_AS, (int(free) - 10**7, hard))
        assert available_memory() == int(free) - 10**7
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_a_long_header_is_not_read(tmp_path):
    padded = header("|u1", (12, 8, 8, 3), b"\2\0", padding=10**8)
    refused(archive(tmp_path / "a.npz", x_train=padded), "expected a readable .npz archive, got EOF")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy(GOOD["x_train"])[:-1], "x_train: expected the 2432 bytes of its header's array, got 2431"),
        (npy(GOOD["x_train"]) + b"\0", "x_train: expected the 2432 bytes of its header's array, got 2433"),
        (header("|u1", (12, -8, -8, 3)), r"x_train: expected sizes from 0 on, got \(12, -8, -8, 3\)"),
        (
            header("|u1", (12, 8, 8, 3), b"\3\0"),
            r"x_train: expected an array of version 1 or 2, got \(3, 0\)",
        ),
        (header("|u1", "(1.5,)"), "expected a readable .npz archive, got shape is not valid"),
        (
            header("|u1", "__import__('os').abort()"),
            "expected a readable .npz archive, got malformed node",
        ),
        (header("?!", (12, 8, 8, 3)), "expected a readable .npz archive, got descr is not a valid dtype"),
        (header([("a", "|u1")], (0,)), r"x_train: expected uint8 pixels, got \[\('a', 'u1'\)\]"),
        (b"", "expected a readable .npz archive, got EOF"),
        (b"\x93NUMPY\1\0\xff\xff{", "expected a readable .npz archive, got EOF"),
    ],
)
def test_arrays_with_a_wrong_header(tmp_path, content, message):
    refused(archive(tmp_path / "a.npz", x_train=content), message)


def test_too_many_class_names(tmp_path):
    path = archive(tmp_path / "a.npz", class_names=npy(np.zeros(1_000_001, "<U1")))
    refused(path, r"class_names: expected strings \[classes\], at most 1000000, got <U1 \[1000001\]")


def test_an_encrypted_archive(tmp_path):
    path = archive(tmp_path / "a.npz")
    content = bytearray(path.read_bytes())
    for signature, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        content[content.index(signature) + flags] |= 1
    path.write_bytes(content)
    refused(path, "x_train: expected an array in the clear, got an encrypted one")


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compressions(tmp_path, compression):
    refused(archive(tmp_path / "a.npz", compression), "expected a stored or deflated array, got compression")


def test_an_array_that_is_there_twice(tmp_path):
    path = archive(tmp_path / "a.npz")
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("y_test", b"")
    refused(path, "expected the array y_test once, got it twice")


def test_other_arrays_do_not_matter(tmp_path):
    path = archive(tmp_path / "a.npz", notes=npy(np.array([Payload()], object)), **{"../../evil": b"text"})
    assert len(load("npz", root=path).train) == 12
    assert not Payload.ran


def test_a_file_whose_bytes_changed(tmp_path):
    path = archive(tmp_path / "a.npz", zipfile.ZIP_STORED)
    content = bytearray(path.read_bytes())
    content[content.index(npy(GOOD["x_train"])[128:]) + 5] ^= 1
    path.write_bytes(content)
    refused(path, "expected a readable .npz archive, got Bad CRC-32 for file 'x_train.npy'")
