"""`rfdarts cache`: what a store holds, how it goes on, and what is refused."""

import errno
import io
import json
import os
import shutil
import signal
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from rfdarts_fast.cache import CacheOptions, build, build_store
from rfdarts_fast.data import Augment, Batches, DataError, StoredSet, load, split_per_class
from rfdarts_fast.data.photo import read_rgb
from rfdarts_fast.runs.config import ConfigError
from rfdarts_fast.runs.files import WriteError

CLASSES = ("ant", "bee", "cat")
SEARCH = (
    "--space s2 --method rf-darts --channels 4 --layers 3 --epochs 1 --batch-size 4 --image-size 8 "
    "--device cpu --split per-class --train-fraction 0.5 --val-fraction 0.25"
)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(build, "CHUNK", 4)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Eight JPEGs of each class, of many sizes, brighter from class to class."""
    root, random = tmp_path_factory.mktemp("photos"), np.random.RandomState(0)
    for part, count in (("train", 8), ("val", 2)):
        for k, name in enumerate(CLASSES):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                shape = random.randint(20, 60, 2)
                pixels = (80 * k + random.randint(0, 60, (*shape, 3))).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.jpg")
    return root


def options(out, photos, **changes):
    values = {"data_root": photos, "size": 16, "train_fraction": 0.5, "val_fraction": 0.25, "threads": 2}
    return CacheOptions(**{"out": out, **values, **changes})


def contents(store):
    """What a store holds, whatever the order in which its chunks were made."""
    chunks = sorted((store / "chunks.jsonl").read_text().splitlines())
    return chunks, *((store / name).read_bytes() for name in ("store.json", "files.json", "images.u8"))


def test_it_holds_the_split_of_the_folder(photos, tmp_path):
    text = build_store(options(tmp_path / "store", photos))
    assert text.startswith("18 images of 16 x 16 pixels, 18 of them now, ")
    store = StoredSet(tmp_path / "store")
    folder = load("imagefolder", root=photos).train
    parts = split_per_class(folder.labels, (0.5, 0.25), 2)
    for mine, theirs in zip(store.split((0.5, 0.25)), parts, strict=True):
        assert store.names(mine.tolist()) == folder.names(theirs.tolist())
        assert torch.equal(store.labels[mine], folder.labels[theirs])
    source = load("cache", root=tmp_path / "store")
    assert (source.num_classes, source.image_size, source.class_names) == (3, 16, CLASSES)
    for images, labels in Batches(store, None, 5, augment=Augment(), seed=0, shuffle=False).epoch(0):
        for image, label in zip(images, labels.tolist(), strict=True):
            assert abs(float(image.mean()) * 255 - (80 * label + 30)) < 12


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
def test_a_square_is_the_centre_of_the_resized_photo(photos, tmp_path, interpolation):
    build_store(
        options(tmp_path / "s", photos, interpolation=interpolation, train_fraction=1.0, val_fraction=0.0)
    )
    store = StoredSet(tmp_path / "s")
    images = next(Batches(store, None, 24, augment=Augment(), seed=0, shuffle=False).epoch(0))[0]
    for image, name in zip(images, store.names(range(24)), strict=True):
        photo = read_rgb(photos / "train" / name)
        width, height = photo.size
        side = min(width, height)
        left, top = round((width - side) / 2), round((height - side) / 2)
        square = photo.crop((left, top, left + side, top + side))
        expected = square.resize((16, 16), Image.Resampling[interpolation.upper()])
        assert np.array_equal((255 * image).round().numpy().transpose(1, 2, 0), np.asarray(expected))


def test_fast_decoding_is_smaller_and_close(tmp_path):
    pixels = np.random.RandomState(0).randint(0, 256, (8, 8, 3)).astype(np.uint8)
    photo = Image.fromarray(pixels).resize((640, 480), Image.Resampling.BICUBIC)
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        photo.save(tmp_path / "train" / name / "0.jpg", quality=95)
    assert read_rgb(tmp_path / "train" / "a" / "0.jpg", 100).size == (160, 120)
    stored = {}
    for quality in ("exact", "fast"):
        out = tmp_path / quality
        build_store(options(out, tmp_path, quality=quality, size=64, train_fraction=1.0, val_fraction=0.0))
        stored[quality] = np.fromfile(out / "images.u8", np.uint8).astype(int)
    difference = abs(stored["exact"] - stored["fast"])
    assert difference.max() > 0 and difference.mean() < 2


@pytest.mark.parametrize("chunks", [0, 1, 3])
def test_killed_and_begun_again(photos, tmp_path, chunks):
    """Killed before its n-th chunk is noted; the bytes are those of a store that was made at once."""
    build_store(options(tmp_path / "whole", photos))
    wanted = options(tmp_path / "store", photos, threads=1)
    child = os.fork()
    if not child:
        append, done = build.JsonLines.append, []

        def killed(self, record):
            if len(done) == chunks:
                with self.path.open("ab") as file:
                    file.write(b'{"chunk":')
                os.kill(os.getpid(), signal.SIGKILL)
            done.append(record)
            append(self, record)

        build.JsonLines.append = killed
        build_store(wanted)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    with pytest.raises(DataError, match=f"expected a finished store, got {chunks} of 5 chunks"):
        StoredSet(tmp_path / "store")
    # three chunks of four images, one of four, one of two
    assert f" {18 - 4 * chunks} of them now" in build_store(wanted)
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")
    assert " now, " not in build_store(wanted)


def test_a_store_that_was_changed(photos, tmp_path):
    """It is refused; the command that made it makes the damaged chunk again."""
    store = tmp_path / "store"
    build_store(options(store, photos))
    whole = contents(store)
    with (store / "images.u8").open("r+b") as file:
        file.seek(5 * 768)
        file.write(b"\x01\x02\x03")
    with pytest.raises(
        DataError, match=r"images\.u8: damaged: the checksums of chunks \[1\] are of other bytes"
    ):
        StoredSet(store)
    assert "4 of them now" in build_store(options(store, photos))
    assert contents(store) == whole
    os.truncate(store / "images.u8", 18 * 768 - 1)
    with pytest.raises(DataError, match="expected 13,824 bytes, got 13,823: truncated, or another store's"):
        StoredSet(store)
    build_store(options(store, photos))
    assert contents(store) == whole
    (store / "files.json").write_bytes((store / "files.json").read_bytes().replace(b"ant/", b"bee/"))
    with pytest.raises(DataError, match="expected the list of files that"):
        StoredSet(store)
    for text, message in (
        ("[]", "expected named values"),
        ("{}", "expected the header"),
        ("{", "expected JSON"),
    ):
        (store / "store.json").write_text(text)
        with pytest.raises(DataError, match=message):
            StoredSet(store)
    header = json.loads(whole[1])
    (store / "store.json").write_text(json.dumps({**header, "version": 2}))
    with pytest.raises(DataError, match="expected version 1, got 2"):
        StoredSet(store)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 24}, "size is 16 there and 24 here"),
        ({"interpolation": "bicubic"}, "interpolation is 'bilinear' there and 'bicubic' here"),
        ({"quality": "fast"}, "quality is 'exact' there and 'fast' here"),
        ({"seed": 3}, "seed is 2 there and 3 here"),
        ({"val_fraction": 0.5}, "val_fraction is 0.25 there and 0.5 here"),
    ],
)
def test_other_settings_are_refused(photos, tmp_path, change, message):
    build_store(options(tmp_path / "store", photos))
    with pytest.raises(ConfigError, match=f"holds a store made with other settings: {message}"):
        build_store(options(tmp_path / "store", photos, **change))


def spoiled(photos, folder):
    """A copy whose first image of the class ant is cut off."""
    shutil.copytree(photos, folder)
    path = folder / "train" / "ant" / "0.jpg"
    path.write_bytes(path.read_bytes()[:300])
    return folder


def test_images_that_cannot_be_read(photos, tmp_path):
    bad = spoiled(photos, tmp_path / "bad")
    everything = {"train_fraction": 1.0, "val_fraction": 0.0}
    with pytest.raises(
        DataError, match=r"1 of 4 images cannot be used: .*ant/0\.jpg: expected a readable image"
    ):
        build_store(options(tmp_path / "fatal", bad, **everything))
    text = build_store(options(tmp_path / "skip", bad, corrupt="skip", **everything))
    assert "; skipped 1 of 24 images cannot be used: " in text
    store = StoredSet(tmp_path / "skip")
    assert len(store) == 23
    assert store.names(range(2)) == ["ant/1.jpg", "ant/2.jpg"]
    batches = Batches(store, None, 23, augment=Augment(), seed=0, shuffle=False)
    labels = next(batches.epoch(0))[1]
    assert labels.tolist() == [0] * 7 + [1] * 8 + [2] * 8


def test_an_image_folder_without_its_damaged_images(photos, tmp_path, capsys):
    bad = spoiled(photos, tmp_path / "bad")
    with pytest.raises(DataError, match="1 of 24 images cannot be used"):
        load("imagefolder", root=bad)
    train = load("imagefolder", root=bad, corrupt="skip").train
    assert len(train) == 23
    assert "skipped: 1 of 24 images cannot be used" in capsys.readouterr().err
    # damaged since the start: the next image takes its place, with its label
    path = bad / "train" / "ant" / "7.jpg"
    path.write_bytes(b"none")
    batches = Batches(train.resized(8), None, 23, augment=Augment(), seed=0, shuffle=False)
    labels = next(batches.epoch(0))[1]
    assert labels.tolist() == [0] * 6 + [1] * 9 + [2] * 8
    assert f"skipped: {path}: expected a readable image" in capsys.readouterr().err
    with pytest.raises(DataError, match="corrupt: expected fatal for the data set digits, got 'skip'"):
        load("digits", corrupt="skip")


def test_tar_shards_give_the_same(photos, tmp_path):
    pytest.importorskip("webdataset")
    folder = load("imagefolder", root=photos).train
    for shard in range(3):
        with tarfile.open(tmp_path / f"train-{shard}.tar", "w") as tar:
            for index in range(8 * shard, 8 * shard + 8):
                data = folder.path(index).read_bytes()
                for suffix, content in (("jpg", data), ("cls", str(int(folder.labels[index])).encode())):
                    member = tarfile.TarInfo(f"{index:04d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    build_store(options(tmp_path / "folder", photos))
    shards = str(tmp_path / "train-{0..2}.tar")
    build_store(options(tmp_path / "tar", None, shards=shards))
    assert (tmp_path / "tar" / "images.u8").read_bytes() == (tmp_path / "folder" / "images.u8").read_bytes()
    with pytest.raises(DataError, match=r"expected tar files, got none at .*train-3\.tar"):
        build_store(options(tmp_path / "none", None, shards=str(tmp_path / "train-{0..3}.tar")))
    (tmp_path / "train-1.tar").write_bytes(b"x" * 2000)
    with pytest.raises(DataError, match="expected readable tar files"):
        build_store(options(tmp_path / "damaged", None, shards=shards))


def test_a_full_disk(photos, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(WriteError, match=r"images\.u8 cannot be written: No space left on device"):
            build_store(options(tmp_path / "store", photos))
    build_store(options(tmp_path / "store", photos))


def test_refused_options(rfdarts, photos, tmp_path):
    for words, message in {
        "": "data-root: expected either this or --shards",
        f"--data-root {photos} --size 0": "--size: expected a positive number",
        f"--data-root {photos} --train-fraction 0": "--train-fraction: expected a share above 0",
        f"--data-root {photos} --train-fraction 0.9 --val-fraction 0.2": "--val-fraction: expected a share",
        f"--data-root {photos} --train-fraction 0.01": "train-fraction: 0.01 of class 0 is no image",
        "--data-root absent": "absent: expected a folder that holds train/",
    }.items():
        code, _, err = rfdarts("cache", "--out", tmp_path / "store", *words.split())
        assert (code, message in err.replace("_", "-"), err.count("\n")) == (2, True, 1), err
        assert not (tmp_path / "store").exists()
    (tmp_path / "store").mkdir()
    enough = ["--train-fraction", "0.5", "--val-fraction", "0.25"]
    (tmp_path / "store" / "thesis.tex").write_text("mine")
    code, _, err = rfdarts("cache", "--out", tmp_path / "store", "--data-root", photos, *enough)
    assert (code, "expected a new folder" in err) == (2, True)


def test_search_from_a_store(rfdarts, photos, tmp_path):
    words = ["--size", "16", "--train-fraction", "0.5", "--val-fraction", "0.25"]
    code, out, err = rfdarts("cache", "--data-root", photos, "--out", tmp_path / "store", *words)
    assert code == 0, err
    assert out.startswith("18 images")
    search = ["search", *SEARCH.split(), "--dataset", "cache", "--data-root", tmp_path / "store"]
    for where in ("host", "device"):
        code, _, err = rfdarts(*search, "--cache-on", where, "--out", tmp_path / where)
        assert code == 0, err
    states = [torch.load(tmp_path / w / "checkpoint.pt", weights_only=True) for w in ("host", "device")]
    assert all(torch.equal(states[0]["network"][k], v) for k, v in states[1]["network"].items())
    folder = ["search", *SEARCH.split(), "--dataset", "imagefolder", "--data-root", photos]
    assert rfdarts(*folder, "--out", tmp_path / "folder")[0] == 0
    split = json.loads((tmp_path / "host" / "split.json").read_text())
    assert split == json.loads((tmp_path / "folder" / "split.json").read_text())
    assert [len(split[part]) for part in ("weights", "architecture")] == [12, 6]
    for words, message in {
        "--val-fraction 0.5": "--val-fraction: expected the store's, 0.25, got 0.5",
        "--image-size 32": "--image-size: expected at most the 16 pixels of the store, got 32",
    }.items():
        code, _, err = rfdarts(*search, *words.split(), "--out", tmp_path / "refused")
        assert (code, message in err) == (2, True), err
    code, _, err = rfdarts(*folder, "--cache-on", "host", "--out", tmp_path / "refused")
    assert (code, "--cache-on: expected auto with the data set imagefolder" in err) == (2, True), err
