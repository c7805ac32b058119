"""Splits: the published halves, parts of every class, and the files of NAS-Bench-201."""

import gzip
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rfdarts_fast.data import (
    DataError,
    load,
    read_split_file,
    split_half,
    split_per_class,
    split_stratified,
)


def test_the_published_halves_are_in_data_set_order():
    first, second = split_half(50_000, 0.5)
    assert torch.equal(first, torch.arange(25_000)) and torch.equal(second, torch.arange(25_000, 50_000))
    # int(np.floor(train_portion * num_train))
    assert len(split_half(7, 0.5)[0]) == 3


def test_a_seed_shuffles_before_the_cut():
    first, second = split_half(100, 0.3, seed=1)
    assert len(first) == 30 and first.tolist() != sorted(first.tolist())
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(100))
    assert torch.equal(first, split_half(100, 0.3, seed=1)[0])
    assert not torch.equal(first, split_half(100, 0.3, seed=2)[0])


def test_a_seeded_split_never_changes():
    # numpy promises these numbers for RandomState; a change here would change published runs
    assert split_half(8, 0.5, seed=0)[0].tolist() == [6, 2, 1, 7]
    assert split_stratified(torch.tensor([0, 1] * 6), 0.5, seed=0)[0].tolist() == [2, 3, 4, 7, 9, 10]


@settings(deadline=None)
@given(
    counts=st.lists(st.integers(4, 30), min_size=1, max_size=5),
    fractions=st.sampled_from([(0.5, 0.5), (0.25, 0.75), (0.5,), (0.3, 0.3, 0.4)]),
    seed=st.integers(0, 50),
)
def test_parts_are_disjoint_and_hold_their_share_of_every_class(counts, fractions, seed):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    parts = split_per_class(labels, fractions, seed)
    together = torch.cat(parts)
    assert len(together.unique()) == len(together)
    if sum(fractions) == 1:
        assert len(together) == len(labels)
    for part, fraction in zip(parts, fractions, strict=True):
        assert part.dtype == torch.int64 and part.tolist() == sorted(part.tolist())
        counted = labels[part].bincount(minlength=len(counts))
        assert (counted - fraction * torch.tensor(counts)).abs().max() <= 1


def test_the_imagenet_search_of_pc_darts():
    labels = torch.arange(40).repeat_interleave(1300)
    train, valid = split_per_class(labels, (0.1, 0.025))
    assert labels[train].bincount().tolist() == [130] * 40
    assert (labels[valid].bincount() - 32).abs().max() <= 1
    assert not set(train.tolist()) & set(valid.tolist())


def test_stratified_halves_of_digits():
    labels = load("digits").train.labels
    first, second = split_stratified(labels, 0.5)
    assert (labels[first].bincount() - labels[second].bincount()).abs().max() <= 1
    assert sorted(torch.cat([first, second]).tolist()) == list(range(len(labels)))
    assert not torch.equal(first, split_stratified(labels, 0.5, seed=1)[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: split_half(10, 0.0), "portion: expected a number between 0 and 1, got 0.0"),
        (lambda: split_half(10, 1.0), "portion: expected"),
        (lambda: split_half(10, 0.05), "portion: 0.05 of 10 images leaves one part empty"),
        (lambda: split_half(1), "n: expected an integer of at least 2, got 1"),
        (lambda: split_half(10, seed=-1), "seed: expected"),
        (lambda: split_half(10, seed=2**32), "seed: expected"),
        (lambda: split_stratified(torch.arange(3), 1.5), "portion: expected"),
        (lambda: split_stratified(torch.tensor([0, 0, 1])), r"portion: 0.5 of class 1 is no image"),
        (lambda: split_per_class(torch.zeros(9), (0.6, 0.6)), "fractions: expected numbers above 0"),
        (lambda: split_per_class(torch.zeros(9), (0.5, 0.0)), "fractions: expected numbers above 0"),
        (lambda: split_per_class(torch.zeros(9), ()), "fractions: expected numbers above 0"),
        (lambda: split_per_class(torch.zeros(0), (0.5,)), "labels: expected"),
    ],
)
def test_splits_that_cannot_be(call, message):
    with pytest.raises(DataError, match=f"^{message}"):
        call()


def write_split(path, **parts):
    content = json.dumps(parts).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["split.txt", "split.txt.gz"])
def test_a_split_file_plain_and_compressed(tmp_path, name):
    path = write_split(tmp_path / name, train=["int", ["0", "2"]], valid=["int", ["1", "5"]])
    train, valid = read_split_file(path, 6)
    assert (train.tolist(), valid.tolist(), train.dtype) == ([0, 2], [1, 5], torch.int64)


def test_a_split_file_of_a_test_set_has_other_keys(tmp_path):
    path = write_split(tmp_path / "s.txt", xvalid=["int", ["1"]], xtest=["int", ["0"]])
    assert read_split_file(path, 2, keys=("xvalid", "xtest"))[1].tolist() == [0]
    with pytest.raises(DataError, match=r"s\.txt: expected a split file with the keys \['train', 'valid'\]"):
        read_split_file(path, 2)


GOOD = ["int", ["1"]]


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (["int", ["0", "6"]], r"train: expected indices within 0\.\.5, got 0\.\.6"),
        (["int", ["-1"]], "train: expected indices within"),
        (["int", ["0", "0"]], "train: expected every index once"),
        (["int", ["0", "1"]], "expected disjoint parts, got 1 images in both"),
        (["int", ["a"]], "train: expected integers"),
        (["int", [1.5]], "train: expected integers"),
        (["int", []], "train: expected at least one index"),
        (["str", ["0"]], r"train: expected \[\"int\""),
        (["0", "2"], r"train: expected \[\"int\""),
        ("0 2", r"train: expected \[\"int\""),
    ],
)
def test_split_files_with_wrong_indices(tmp_path, train, message):
    path = write_split(tmp_path / "bad.txt", train=train, valid=GOOD)
    with pytest.raises(DataError, match=rf"bad\.txt: {message}"):
        read_split_file(path, 6)


def test_split_files_that_cannot_be_read(tmp_path):
    good = write_split(tmp_path / "good.txt.gz", train=["int", ["0"]], valid=GOOD).read_bytes()
    for content in (b"", b"no json", b"[1]", good[:20], b"\xff\xfe{", good[:-12] + b"\0" * 12):
        (tmp_path / "bad.txt").write_bytes(content)
        with pytest.raises(DataError, match=r"bad\.txt: expected a"):
            read_split_file(tmp_path / "bad.txt", 6)
    with pytest.raises(DataError, match=r"gone\.txt: expected a readable"):
        read_split_file(tmp_path / "gone.txt", 6)


def test_the_official_split_of_cifar10(cifar_split_file):
    train, valid = read_split_file(cifar_split_file, 50_000)
    assert len(train) == len(valid) == 25_000
    assert train[:5].tolist() == [0, 5, 7, 11, 13]
    assert torch.equal(torch.cat([train, valid]).sort().values, torch.arange(50_000))
