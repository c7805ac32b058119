"""Every source: what it loads, and one clear error for every way in which its input can be wrong."""

import gzip
import pickle
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from image_samples import npz_arrays, write_photo

from rfdarts_fast.data import (
    DATASETS,
    Batches,
    ColourJitter,
    DataError,
    Dataset,
    DataSource,
    ImageSet,
    default_augment,
    evaluation_augment,
    load,
    register_dataset,
)


def save_npz(path, **changes):
    arrays = {**npz_arrays(), **changes}
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


# digits


def test_digits_are_all_there_and_split_in_proportion():
    source = load("digits")
    assert (len(source.train), len(source.test), source.num_classes) == (1442, 355, 10)
    both = torch.cat([source.train.labels, source.test.labels]).bincount()
    share = source.test.labels.bincount() / both
    assert both.sum() == 1797 and (share - 0.2).abs().max() < 0.01
    assert source.class_names == tuple("0123456789")


def test_digits_at_their_own_size_are_those_of_scikit_learn_without_overlap():
    from sklearn.datasets import load_digits

    source = load("digits", image_size=8)
    original = torch.from_numpy(load_digits().images)
    # grey values 0..16 come back exactly
    loaded = torch.cat([source.train.images, source.test.images])[:, 1].double().mul(16 / 255).round()

    def rows(images):
        return sorted(map(tuple, images.flatten(1).tolist()))

    assert rows(loaded) == rows(original)
    # all 1,797 images are different, so equal multisets also mean that none is in both parts
    assert len(set(rows(original))) == 1797


def test_digits_are_enlarged_smoothly_and_grey():
    source = load("digits")
    assert source.image_size == 16 and source.train.images.shape == (1442, 3, 16, 16)
    assert torch.equal(source.train.images[:, 0], source.train.images[:, 2])
    assert load("digits", image_size=24).image_size == 24


def test_digits_have_the_statistics_of_their_training_images():
    source = load("digits")
    pixels = source.train.images.double() / 255
    torch.testing.assert_close(torch.tensor(source.mean).double(), pixels.mean((0, 2, 3)))
    torch.testing.assert_close(torch.tensor(source.std).double(), pixels.std((0, 2, 3), correction=0))


# npz


def test_npz_holds_what_was_saved(tmp_path):
    arrays = npz_arrays()
    source = load("npz", root=save_npz(tmp_path / "a.npz"))
    assert np.array_equal(source.train.images.numpy().transpose(0, 2, 3, 1), arrays["x_train"])
    assert np.array_equal(source.test.images.numpy().transpose(0, 2, 3, 1), arrays["x_test"])
    assert source.train.labels.tolist() == arrays["y_train"].tolist()
    assert (source.num_classes, source.class_names) == (3, ("0", "1", "2"))
    pixels = arrays["x_train"] / 255
    assert np.allclose(source.mean, pixels.mean((0, 1, 2))) and np.allclose(source.std, pixels.std((0, 1, 2)))


@pytest.mark.parametrize("shape", [(12, 8, 8), (12, 8, 8, 1)])
def test_npz_repeats_grey(tmp_path, shape):
    grey = npz_arrays()["x_train"][..., 0]
    source = load("npz", root=save_npz(tmp_path / "a.npz", x_train=grey.reshape(shape)))
    for channel in range(3):
        assert np.array_equal(source.train.images[:, channel].numpy(), grey)


def test_npz_is_resized_on_request(tmp_path):
    flat = np.full((12, 8, 8, 3), 77, np.uint8)
    source = load("npz", root=save_npz(tmp_path / "a.npz", x_train=flat), image_size=4)
    assert source.train.images.shape == (12, 3, 4, 4) and source.test.image_size == 4
    assert (source.train.images == 77).all()
    assert source.std == (1.0, 1.0, 1.0)


def test_shrinking_looks_at_every_pixel():
    # every fourth column is white; bilinear without antialiasing would see only the black between them
    images = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    images[..., ::4] = 255
    shrunk = ImageSet(images, torch.zeros(1, dtype=torch.int64)).resized(4)
    assert (shrunk.images.int() - 64).abs().max() < 24


def test_npz_without_test_images_says_so_when_they_are_needed(tmp_path):
    source = load("npz", root=save_npz(tmp_path / "a.npz", x_test=None, y_test=None))
    assert source.test is None
    with pytest.raises(DataError, match="npz: expected test images"):
        source.require_test()


def test_npz_with_class_names_may_lack_training_images_of_a_class(tmp_path):
    names = np.array(["ant", "bee", "cat", "dog"])
    source = load("npz", root=save_npz(tmp_path / "a.npz", class_names=names))
    assert source.class_names == ("ant", "bee", "cat", "dog")


X, Y = npz_arrays()["x_train"], npz_arrays()["y_train"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_train": None}, "expected the array x_train, got only y_train, x_test, y_test"),
        ({"y_train": None}, "expected the array y_train"),
        ({"y_test": None}, "expected the array y_test"),
        ({"x_test": None}, "expected the array x_test"),
        ({"x_train": X.astype(np.float32)}, "x_train: expected uint8 pixels, got float32"),
        ({"x_train": X.transpose(0, 3, 1, 2)}, r"x_train: expected the shape .* got \[12, 3, 8, 8\]"),
        ({"x_train": X[0, 0]}, "x_train: expected the shape"),
        ({"x_train": X[:, :5]}, "x_train: expected square images, got 5 x 8"),
        ({"x_train": X[:0], "y_train": Y[:0]}, "x_train: expected at least one image"),
        ({"x_test": X[:0], "y_test": Y[:0]}, "x_test: expected at least one image"),
        ({"x_test": X[:3, :4, :4]}, "x_test: expected the image size of x_train, 8, got 4"),
        ({"y_train": Y[:5]}, r"y_train: expected one label per image \(12\), got 5"),
        ({"y_train": Y.astype(float)}, "y_train: expected integer labels, got float64"),
        ({"y_train": Y.astype(bool)}, "y_train: expected integer labels, got bool"),
        ({"y_train": Y[:, None]}, r"y_train: expected the shape \[N\], got \[12, 1\]"),
        ({"y_train": Y - 1}, "y_train: expected labels from 0 on, got -1"),
        ({"y_train": Y + 1}, "y_train: expected every label from 0 to the largest, 3, got none of class 0"),
        ({"y_train": Y * 10**9}, "y_train: expected every label .* got none of class 1 "),
        ({"y_train": Y.astype(np.uint64) + np.uint64(2**63)}, "y_train: expected labels that count classes"),
        ({"y_test": np.array([0, 1, 3])}, r"y_test: expected labels within 0\.\.2, got 3"),
        ({"class_names": np.array(["a", "b"])}, r"y_train: expected labels within 0\.\.1, got 2"),
        ({"class_names": np.arange(3)}, "class_names: expected strings"),
        ({"x_train": X.astype(object)}, "x_train: expected uint8 pixels, got object"),
    ],
)
def test_npz_with_wrong_arrays(tmp_path, changes, message):
    path = save_npz(tmp_path / "bad.npz", **changes)
    with pytest.raises(DataError, match=rf"bad\.npz: {message}"):
        load("npz", root=path)


@pytest.mark.parametrize("kept", [0, 10, 700, -30])
def test_npz_cut_short(tmp_path, kept):
    path = save_npz(tmp_path / "bad.npz")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match=r"bad\.npz: expected a readable \.npz archive"):
        load("npz", root=path)


def test_npz_with_flipped_bytes(tmp_path):
    path = save_npz(tmp_path / "bad.npz")
    content = bytearray(path.read_bytes())
    content[400:420] = bytes(255 - b for b in content[400:420])
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"bad\.npz: expected a readable \.npz archive"):
        load("npz", root=path)


def test_npz_that_is_something_else(tmp_path):
    with pytest.raises(DataError, match=r"gone\.npz: expected an \.npz file, got nothing there"):
        load("npz", root=tmp_path / "gone.npz")
    with pytest.raises(DataError, match=r"expected an \.npz file, got a folder"):
        load("npz", root=tmp_path)
    np.save(tmp_path / "one.npy", X)
    with pytest.raises(DataError, match=r"one\.npy: expected an \.npz archive of several arrays"):
        load("npz", root=tmp_path / "one.npy")
    (tmp_path / "text.npz").write_text("not an archive")
    with pytest.raises(DataError, match=r"text\.npz: expected a readable"):
        load("npz", root=tmp_path / "text.npz")


# image folders


def test_an_image_folder_is_numbered_by_class_name(photos):
    source = load("imagefolder", root=photos, image_size=16)
    assert source.class_names == ("ant", "bee") and source.image_size == 16
    assert (
        source.train.labels.tolist() == [0] * 6 + [1] * 6 and source.test.labels.tolist() == [0] * 2 + [1] * 2
    )
    assert source.train.path(7) == photos / "train" / "bee" / "1.jpg"
    assert source.mean == (0.485, 0.456, 0.406) and source.std == (0.229, 0.224, 0.225)
    assert load("imagefolder", root=photos).image_size == 224


def test_an_image_folder_finds_subfolders_and_ignores_other_files(photos):
    write_photo(photos / "train" / "ant" / "more" / "9.PNG", 20, 20, 0)
    (photos / "train" / "ant" / "notes.txt").write_text("no image")
    (photos / "train" / "readme.txt").write_text("no class")
    source = load("imagefolder", root=photos)
    assert source.train.labels.tolist() == [0] * 7 + [1] * 6


def test_held_out_images_are_those_of_val_or_else_of_test(photos):
    (photos / "val").rename(photos / "test")
    assert len(load("imagefolder", root=photos).require_test()) == 4
    (photos / "test").rename(photos / "unused")
    with pytest.raises(DataError, match="imagefolder: expected test images"):
        load("imagefolder", root=photos).require_test()


def test_a_held_out_class_keeps_its_number(photos):
    for file in (photos / "val" / "ant").iterdir():
        file.unlink()
    (photos / "val" / "ant").rmdir()
    assert load("imagefolder", root=photos).test.labels.tolist() == [1, 1]


def test_verify_decodes_what_the_header_does_not_show(photos, monkeypatch):
    victim = photos / "train" / "bee" / "4.png"
    victim.write_bytes(victim.read_bytes()[:-60])
    with pytest.raises(
        DataError, match=r"1 of 12 images cannot be used: .*4\.png: expected a readable image"
    ):
        load("imagefolder", root=photos)
    monkeypatch.setattr("rfdarts_fast.data.sources.folder.DECODED_FILES", 11)
    source = load("imagefolder", root=photos)
    source.train.verify([0, 1])
    with pytest.raises(DataError, match=r"4\.png: expected a readable image"):
        source.train.verify()


def test_image_folders_that_cannot_be_read(photos):
    with pytest.raises(DataError, match=r"gone: expected a folder .* got nothing there"):
        load("imagefolder", root=photos / "gone")
    with pytest.raises(DataError, match=r"expected a folder .* got a file"):
        load("imagefolder", root=photos / "train" / "ant" / "0.png")
    with pytest.raises(DataError, match="train: expected a folder with one folder per class, got nothing"):
        load("imagefolder", root=photos / "train")
    (photos / "val" / "cat").mkdir()
    with pytest.raises(DataError, match=r"val: expected classes of .*train, got cat too"):
        load("imagefolder", root=photos)
    (photos / "train" / "cat").mkdir()
    with pytest.raises(DataError, match=r"train/cat: expected image files .* got none"):
        load("imagefolder", root=photos)
    (photos / "val" / "cat").rmdir()
    (photos / "train" / "cat" / "fake.jpg").write_text("no image")
    with pytest.raises(DataError, match=r"fake\.jpg: expected a readable image"):
        load("imagefolder", root=photos)


def test_an_image_folder_without_classes(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="train: expected one folder per class, got none"):
        load("imagefolder", root=tmp_path)


# torchvision


def test_without_torchvision_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(DataError, match=r"cifar10 is read through torchvision.*pip install torchvision.*npz"):
        load("cifar10", root=tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn"])
def test_torchvision_sets_that_are_not_there(name, tmp_path):
    pytest.importorskip("torchvision", reason="torchvision not installed")
    with pytest.raises(DataError, match=f"expected the files of {name} as torchvision stores them"):
        load(name, root=tmp_path)


def write_cifar(root, classes, train_files, meta):
    """Files in the layout of the published archives, with 4 images each."""
    random = np.random.default_rng(0)
    written = {}
    key = "labels" if classes == 10 else "fine_labels"
    for name in (*train_files, "test" if classes == 100 else "test_batch"):
        content = {"data": random.integers(0, 256, (4, 3072), dtype=np.uint8), key: [0, 1, 2, classes - 1]}
        (root / name).write_bytes(pickle.dumps(content))
        written[name] = content
    file, names_key = meta
    (root / file).write_bytes(pickle.dumps({names_key: [f"class {i}" for i in range(classes)]}))
    return written


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_through_torchvision(name, tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets", reason="torchvision not installed")
    cifar = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    # the checksums are those of the real files
    monkeypatch.setattr(cifar, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    folder = tmp_path / cifar.base_folder
    folder.mkdir()
    train_files = [file for file, _ in cifar.train_list]
    meta = cifar.meta["filename"], cifar.meta["key"]
    written = write_cifar(folder, 10 if name == "cifar10" else 100, train_files, meta)
    source = load(name, root=tmp_path)
    assert len(source.train) == 4 * len(train_files) and len(source.test) == 4
    pixels = written[train_files[0]]["data"].reshape(4, 3, 32, 32)
    assert np.array_equal(source.train.images[:4].numpy(), pixels)
    assert source.train.labels[:4].tolist() == [0, 1, 2, source.num_classes - 1]
    assert source.class_names[1] == "class 1"
    expected = {"cifar10": 0.49139968, "cifar100": 0.5071}
    assert source.mean[0] == expected[name]
    assert load(name, root=tmp_path, image_size=16).image_size == 16
    (folder / train_files[0]).write_bytes(b"\x80damaged")
    with pytest.raises(DataError, match=f"expected the files of {name}"):
        load(name, root=tmp_path)


def test_svhn_through_torchvision_is_train_without_extra(tmp_path, monkeypatch):
    pytest.importorskip("torchvision", reason="torchvision not installed")
    scipy_io = pytest.importorskip("scipy.io")
    monkeypatch.setattr("torchvision.datasets.svhn.check_integrity", lambda *_: True)
    monkeypatch.setattr("torchvision.datasets.SVHN._check_integrity", lambda self: True)
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (32, 32, 3, 4), dtype=np.uint8)
    # the files count 1..10, where 10 is the digit 0
    for part in ("train", "test"):
        scipy_io.savemat(tmp_path / f"{part}_32x32.mat", {"X": pixels, "y": np.array([[1], [10], [9], [2]])})
    source = load("svhn", root=tmp_path)
    assert np.array_equal(source.train.images.numpy(), pixels.transpose(3, 2, 0, 1))
    assert source.train.labels.tolist() == [1, 0, 9, 2] and source.num_classes == 10
    assert source.mean == (0.4377, 0.4438, 0.4728) and source.std == (0.1980, 0.2010, 0.1970)


def test_only_download_fetches(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets", reason="torchvision not installed")
    asked = []

    def fetch(self):
        asked.append(self.root)
        raise RuntimeError("no network in this test")

    monkeypatch.setattr(datasets.CIFAR10, "download", fetch)
    with pytest.raises(DataError):
        load("cifar10", root=tmp_path)
    assert not asked
    with pytest.raises(DataError, match="no network in this test"):
        load("cifar10", root=tmp_path, download=True)
    assert asked


# all of them


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "mnist"}, "dataset: expected one of digits, npz, .*, got 'mnist'"),
        ({"name": "digits", "image_size": 0}, "image_size: expected an integer of at least 1, got 0"),
        ({"name": "digits", "image_size": 8.5}, "image_size: expected an integer"),
        ({"name": "digits", "image_size": True}, "image_size: expected an integer"),
        *[({"name": name}, "data root: expected .* got none") for name in DATASETS if name != "digits"],
    ],
)
def test_arguments_that_cannot_be(arguments, message):
    with pytest.raises(DataError, match=f"^{message}"):
        load(arguments.pop("name"), **arguments)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Dataset("digits", load), "dataset: expected a new name, an identifier, got 'digits'"),
        (Dataset("my digits", load), "dataset: expected a new name, an identifier, got 'my digits'"),
        (Dataset("mine", "mine.npz"), r"dataset mine: expected load\(root, download\), got 'mine.npz'"),
    ],
    ids=["taken", "no-name", "no-function"],
)
def test_bad_entries_are_refused(dataset, message):
    before = dict(DATASETS)
    with pytest.raises(ValueError, match=message):
        register_dataset(dataset)
    assert before == DATASETS


def test_files_need_statistics(monkeypatch, photos):
    monkeypatch.setitem(DATASETS, "mine", replace(DATASETS["imagefolder"], name="mine", statistics=None))
    with pytest.raises(DataError, match="dataset mine: expected statistics for images in files, got none"):
        load("mine", root=photos)


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_source_refuses_labels_beyond_its_classes(part):
    good, bad = (ImageSet(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), torch.tensor([y])) for y in (1, 2))
    sets = {"train": good, "test": good, part: bad}
    with pytest.raises(DataError, match=rf"^mine: expected {part} labels within 0\.\.1, got 2"):
        DataSource("mine", **sets, class_names=("a", "b"), mean=(0.0,) * 3, std=(1.0,) * 3)


def test_default_augmentation_fits_the_data_set(tmp_path, photos):
    digits = default_augment(load("digits"), cutout=4)
    assert (digits.pad, digits.flip, digits.cutout, digits.resized_crop) == (2, False, 4, None)
    x = np.zeros((3, 32, 32, 3), np.uint8)
    cifar_like = load("npz", root=save_npz(tmp_path / "a.npz", x_train=x, y_train=np.arange(3), x_test=x))
    augment = default_augment(cifar_like, channels_last=True)
    assert (augment.pad, augment.flip, augment.cutout, augment.channels_last) == (4, True, 0, True)
    assert not default_augment(cifar_like, flip=False).flip
    photo = default_augment(load("imagefolder", root=photos), jitter=ColourJitter())
    assert (photo.pad, photo.flip, photo.resized_crop, photo.jitter) == (0, True, (0.08, 1.0), ColourJitter())
    assert (photo.mean, photo.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_evaluation_changes_nothing_but_the_scale(photos):
    source = load("digits")
    augment = evaluation_augment(source)
    batches = Batches(source.test, None, 100, augment=augment, seed=0, shuffle=False)
    images = torch.cat([images for images, _ in batches.epoch(0)])
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (source.mean, source.std))
    torch.testing.assert_close(images, (source.test.images.float() / 255 - mean) / std)
    assert evaluation_augment(load("imagefolder", root=photos)).centre_fraction == 7 / 8


def test_real_cifar10(cifar10_npz):
    source = load("npz", root=cifar10_npz)
    assert (len(source.train), len(source.test), source.num_classes, source.image_size) == (400, 100, 10, 32)
    # 400 images are enough to come near the published statistics
    published = torch.tensor([0.49139968, 0.48215827, 0.44653124, 0.24703233, 0.24348505, 0.26158768])
    torch.testing.assert_close(torch.tensor([*source.mean, *source.std]), published, rtol=0, atol=0.03)
    batches = Batches(source.train, None, 64, augment=default_augment(source, cutout=16), seed=0)
    images, labels = zip(*batches.epoch(0), strict=True)
    assert torch.equal(torch.cat(labels).bincount(), source.train.labels.bincount())
    assert torch.cat(images).isfinite().all()


def test_a_compressed_copy_is_no_npz(tmp_path):
    path = save_npz(tmp_path / "a.npz")
    packed = tmp_path / "a.npz.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(DataError, match=r"a\.npz\.gz: expected a readable"):
        load("npz", root=packed)
