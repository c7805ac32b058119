"""A run goes on with the data that it began with, and with no others."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from same_run import assert_same_run

from rfdarts_fast.data import ImageSet, load
from rfdarts_fast.data import fingerprint as hashes
from rfdarts_fast.retrain import evaluate_run
from rfdarts_fast.runs.fingerprint import changes, fingerprint
from rfdarts_fast.runs.run_folder import RunFolderError


@pytest.fixture
def changed_npz(tiny_npz, tmp_path):
    """A copy of the data whose arrays are changed, under another name."""

    def changed(**new):
        arrays = {**np.load(tiny_npz), **new}
        path = tmp_path / "changed.npz"
        np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
        return path

    return changed


def one_pixel(arrays, name):
    images = arrays[name].copy()
    images[3, 2, 1, 0] ^= 1
    return {name: images}


def swapped_labels(arrays, name):
    labels = arrays[name].copy()
    labels[[0, 1]] = labels[[1, 0]]
    return {name: labels}


CHANGES = {
    "pixel": (lambda a: one_pixel(a, "x_train"), "train has other images"),
    "label": (lambda a: swapped_labels(a, "y_train"), "train has other labels"),
    "test-pixel": (lambda a: one_pixel(a, "x_test"), "test has other images"),
    "test-label": (lambda a: swapped_labels(a, "y_test"), "test has other labels"),
    "fewer": (lambda a: {n: a[n][:-4] for n in ("x_train", "y_train")}, "train had 24 images and has 20"),
    "names": (lambda a: {"class_names": np.array(list("abcd"))}, "classes has other names"),
    "order": (lambda a: {n: a[n][::-1] for n in ("x_train", "y_train")}, "train has other images and labels"),
}


@pytest.mark.parametrize(("change", "part"), CHANGES.values(), ids=CHANGES.keys())
def test_other_data_are_refused(runs, changed_npz, tiny_npz, tmp_path, change, part):
    other = changed_npz(**change(dict(np.load(tiny_npz))))
    folder = runs.copy(tmp_path / "run")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(RunFolderError, match=f"data: expected those that {folder} began with, but .*{part}"):
        runs.go_on(folder, data_root=other)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("case", ["test-pixel", "test-label", "names"])
def test_evaluation_on_other_data(all_runs, changed_npz, tiny_npz, case):
    change, part = CHANGES[case]
    other = changed_npz(**change(dict(np.load(tiny_npz))))
    with pytest.raises(RunFolderError, match=part):
        evaluate_run(all_runs["train"].whole, data_root=other)


def test_evaluation_does_not_ask_for_the_training_images(all_runs, changed_npz, tiny_npz):
    # other training images of the same mean and deviation
    arrays = dict(np.load(tiny_npz))
    other = changed_npz(x_train=arrays["x_train"][::-1], y_train=arrays["y_train"][::-1])
    folder = all_runs["train"].whole
    assert evaluate_run(folder, data_root=other) == evaluate_run(folder)


def test_a_copy_of_the_data_is_the_same(runs, changed_npz, tmp_path):
    folder = runs.copy(tmp_path / "run")
    runs.go_on(folder, data_root=changed_npz())
    assert_same_run(folder, runs.whole)


def test_a_folder_without_a_fingerprint_gets_one(runs, tmp_path):
    folder = runs.copy(tmp_path / "run")
    (folder / "data.json").unlink()
    runs.go_on(folder)
    assert_same_run(folder, runs.whole)


def test_a_part_that_is_gone_or_new():
    parts = {"train": {"number": 3, "images": "a"}, "test": {"number": 1, "images": "b"}}
    assert changes(parts, parts) == []
    assert changes(parts, {"train": parts["train"]}) == ["test is missing"]
    assert changes({"train": parts["train"]}, parts) == ["test is new"]


def test_another_split(tiny_npz):
    source = load("npz", root=tiny_npz)
    one, other = (fingerprint(source, {"weights": torch.arange(n, n + 12)}) for n in (0, 1))
    assert changes(one, other) == ["split weights has other indices"]


def test_resizing_is_not_part_of_it():
    """No two machines need agree on its last bit."""
    images = torch.randint(256, (6, 3, 8, 8), dtype=torch.uint8)
    whole = ImageSet(images, torch.arange(6))
    assert whole.resized(5).resized(12).fingerprint() == whole.fingerprint()
    assert ImageSet(whole.resized(12).images, whole.labels).fingerprint() != whole.fingerprint()
    assert dataclasses.is_dataclass(load("digits"))


@pytest.fixture
def photos(tmp_path):
    for label in ("ant", "bee"):
        for i in range(6):
            file = tmp_path / "photos" / "train" / label / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 20), (40 * i, 0, 0)).save(file)
    return tmp_path / "photos"


def test_image_folders(photos, monkeypatch):
    def now(root=photos):
        return load("imagefolder", root=root, image_size=8).train.fingerprint()

    before = now()
    assert now(photos.rename(photos.with_name("moved"))) == before
    photos.with_name("moved").rename(photos)
    bee = photos / "train" / "bee"
    Image.new("RGB", (20, 20), (1, 1, 1)).save(bee / "3.png")
    changed = now()
    assert {name for name in before if before[name] != changed[name]} == {"images"}
    # not one of the files that are read
    monkeypatch.setattr(hashes, "SAMPLED_FILES", 2)
    sampled = now()
    Image.new("RGB", (20, 20), (2, 2, 2)).save(bee / "3.png")
    assert now() == sampled
    (bee / "3.png").rename(bee / "3a.png")
    renamed = now()
    assert {name for name in sampled if sampled[name] != renamed[name]} == {"files"}


def test_it_is_noted_in_the_folder(runs):
    noted = json.loads((runs.whole / "data.json").read_text())
    parts = {"classes", "train", "test"}
    assert set(noted) == parts | (
        {"split weights", "split architecture"} if runs.command == "search" else set()
    )
    assert noted["train"]["number"] == 24
