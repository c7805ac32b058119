"""Batches depend on (seed, epoch, step) alone: order, augmentation and resuming."""

import os
import subprocess
import sys
from itertools import islice

import pytest
import torch
from image_samples import random_images
from PIL import Image

from rfdarts_fast.data import Augment, Batches, ColourJitter, DataError, ImageFolderSet, ImageSet, load

AUGMENT = Augment((0.5, 0.5, 0.5), (0.2, 0.2, 0.2), pad=1, flip=True, cutout=2, jitter=ColourJitter())
PHOTO_AUGMENT = Augment(flip=True, jitter=ColourJitter(), resized_crop=(0.08, 1.0))


def memory_batches(count=23, batch_size=4, **options):
    dataset = ImageSet(random_images(count), torch.arange(count))
    options = {"augment": AUGMENT, "seed": 7, **options}
    return Batches(dataset, options.pop("indices", None), batch_size, **options)


def assert_same(first, second):
    first, second = list(first), list(second)
    assert len(first) == len(second) > 0
    for (images, labels), (other_images, other_labels) in zip(first, second, strict=True):
        assert torch.equal(labels, other_labels)
        assert torch.equal(images, other_images)


def differ(first, second):
    return any(not torch.equal(a, b) for (a, _), (b, _) in zip(first, second, strict=True))


def labels_of(batches):
    return torch.cat([labels for _, labels in batches]).tolist()


def test_an_epoch_visits_every_image_once_in_an_order_of_its_own():
    batches = memory_batches()
    assert len(batches) == 6
    first, second = labels_of(batches.epoch(0)), labels_of(batches.epoch(1))
    assert sorted(first) == sorted(second) == list(range(23))
    assert first != second and first != sorted(first)


def test_images_and_labels_belong_together():
    batches = memory_batches(augment=Augment())
    for images, labels in batches.epoch(0):
        torch.testing.assert_close(images, batches.dataset.images[labels].float() / 255)


def test_only_the_subset_is_drawn():
    assert sorted(labels_of(memory_batches(indices=[3, 9, 20]).epoch(5))) == [3, 9, 20]


def test_without_shuffle_the_order_is_that_of_the_indices():
    assert labels_of(memory_batches(indices=[9, 3, 20], shuffle=False).epoch(2)) == [9, 3, 20]


def test_drop_last_leaves_out_the_smaller_batch():
    batches = memory_batches(drop_last=True)
    sizes = [len(labels) for _, labels in batches.epoch(0)]
    assert len(batches) == 5 and sizes == [4] * 5


def test_a_batch_may_be_larger_than_the_subset():
    assert [len(labels) for _, labels in memory_batches(batch_size=100).epoch(0)] == [23]


def test_the_same_seed_gives_the_same_batches_and_another_gives_others():
    assert_same(memory_batches().epoch(3), memory_batches().epoch(3))
    assert labels_of(memory_batches().epoch(3)) != labels_of(memory_batches(seed=8).epoch(3))


def test_augmentation_changes_with_seed_epoch_and_step():
    def same_image(seed):
        return memory_batches(indices=[0] * 8, shuffle=False, seed=seed)

    batches = same_image(0)
    assert differ(batches.epoch(0), batches.epoch(1))
    assert differ(batches.epoch(0), same_image(1).epoch(0))
    first, second = batches.epoch(0)
    assert not torch.equal(first[0], second[0])


@pytest.mark.parametrize("start", range(7))
def test_an_epoch_goes_on_from_any_step(start):
    whole = list(memory_batches().epoch(2))
    rest = list(memory_batches().epoch(2, start))
    assert len(rest) == 6 - start
    if rest:
        assert_same(rest, whole[start:])


@pytest.mark.parametrize("position", [0, 1, 5, 6, 7, 17])
def test_a_stream_goes_on_from_any_position(position):
    whole = [batch for epoch in range(4) for batch in memory_batches().epoch(epoch)]
    assert_same(islice(memory_batches().stream(position), 7), whole[position : position + 7])


def test_the_global_random_state_is_neither_used_nor_changed(photos):
    photo_set = load("imagefolder", root=photos, image_size=16).train
    for batches in (memory_batches(), Batches(photo_set, None, 4, augment=PHOTO_AUGMENT, seed=0)):
        torch.manual_seed(1)
        before = torch.get_rng_state()
        first = list(batches.epoch(0))
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(2)
        assert_same(batches.epoch(0), first)


def test_two_subsets_share_one_copy_on_a_device():
    dataset = ImageSet(random_images(4), torch.arange(4))
    assert dataset.on("cpu") is dataset
    assert dataset.on("meta") is dataset.on("meta")


def photo_batches(root, workers=0, seed=7, augment=PHOTO_AUGMENT, **options):
    dataset = load("imagefolder", root=root, image_size=16).train
    return Batches(dataset, None, 5, augment=augment, seed=seed, workers=workers, **options)


def test_photos_are_the_same_with_workers_and_without(photos):
    alone, helped = photo_batches(photos), photo_batches(photos, workers=2)
    for epoch in (0, 1):
        assert_same(helped.epoch(epoch), alone.epoch(epoch))
    assert_same(helped.epoch(1, 1), list(alone.epoch(1))[1:])
    assert_same(islice(helped.stream(2), 5), islice(alone.stream(2), 5))
    helped.close()


def test_photos_are_cut_differently_in_every_epoch_and_with_every_seed(photos):
    options = {"augment": Augment(resized_crop=(0.08, 1.0)), "shuffle": False}
    ordered = photo_batches(photos, **options)
    assert differ(ordered.epoch(0), ordered.epoch(1))
    assert differ(ordered.epoch(0), photo_batches(photos, seed=8, **options).epoch(0))


def test_workers_live_on_over_epochs_and_abandoned_iterations(photos):
    batches = photo_batches(photos, workers=1)
    list(batches.epoch(0))
    pids = [worker.pid for worker in batches._reader._loader._iterator._workers]
    next(batches.stream())
    assert_same(batches.epoch(0), photo_batches(photos).epoch(0))
    assert [worker.pid for worker in batches._reader._loader._iterator._workers] == pids
    batches.close()
    assert_same(batches.epoch(0), photo_batches(photos).epoch(0))
    batches.close()


def test_going_on_with_batches_that_others_replaced_is_refused(photos):
    batches = photo_batches(photos)
    old = batches.epoch(0)
    next(old)
    next(batches.epoch(1))
    with pytest.raises(RuntimeError, match="others were asked"):
        next(old)


SIGNALLED = """
import os, signal, sys
from itertools import islice
from rfdarts_fast.data import Augment, Batches, load

signals = []
signal.signal(signal.SIGTERM, lambda *_: signals.append("SIGTERM"))
signal.signal(signal.SIGINT, lambda *_: signals.append("SIGINT"))
dataset = load("imagefolder", root=sys.argv[1], image_size=16).train
stream = Batches(dataset, None, 4, augment=Augment(), seed=0, workers=2).stream()
# one batch from each worker: both are up
next(stream), next(stream)
os.killpg(0, signal.SIGTERM)
os.killpg(0, signal.SIGINT)
print(*signals, len(list(islice(stream, 20))))
"""


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="no process groups on this system")
def test_signals_to_the_process_group_leave_the_workers_to_the_main_process(photos):
    # a batch job's SIGTERM and Ctrl-C reach the whole group; the main process wants to finish and save
    finished = subprocess.run(
        [sys.executable, "-c", SIGNALLED, str(photos)],
        start_new_session=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (finished.stdout, finished.stderr) == ("SIGTERM SIGINT 20\n", "")
    assert finished.returncode == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_turns_unreadable_is_named(photos, workers):
    batches = photo_batches(photos, workers=workers)
    victim = photos / "train" / "ant" / "1.jpg"
    victim.write_bytes(victim.read_bytes()[:300])
    with pytest.raises(DataError, match=r"1\.jpg: expected a readable image") as caught:
        list(batches.epoch(0))
    assert "Traceback" not in str(caught.value)
    batches.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected an integer of at least 1, got 0"),
        ({"batch_size": 24, "drop_last": True}, "batch_size: expected at most 23.*got 24"),
        ({"indices": []}, "indices: expected at least one image"),
        ({"indices": [0, 23]}, r"indices: expected them within 0\.\.22, got 0\.\.23"),
        ({"indices": [-1]}, "indices: expected them within"),
        ({"indices": [0.5]}, "indices: expected integers"),
        ({"indices": [[0, 1]]}, "indices: expected integers"),
        ({"indices": [True, False]}, "indices: expected integers"),
        ({"seed": -1}, "seed: expected"),
        ({"workers": -1}, "workers: expected"),
        ({"augment": PHOTO_AUGMENT}, "resized_crop: expected None for images in memory"),
    ],
)
def test_options_that_cannot_work(options, message):
    with pytest.raises(DataError, match=f"^{message}"):
        memory_batches(**options)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (lambda b: b.epoch(-1), "epoch: expected"),
        (lambda b: b.epoch(0, 7), r"start: expected a step within 0\.\.6, got 7"),
        (lambda b: b.epoch(0, -1), "start: expected"),
        (lambda b: b.stream(-1), "position: expected"),
    ],
)
def test_positions_that_do_not_exist(start, message):
    with pytest.raises(DataError, match=f"^{message}"):
        start(memory_batches())


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (random_images(2).float(), torch.arange(2), "images: expected uint8"),
        (random_images(2)[:, :1], torch.arange(2), "images: expected uint8"),
        (random_images(2)[0], torch.arange(2), "images: expected uint8"),
        (random_images(2)[:, :, 1:], torch.arange(2), "images: expected square"),
        (random_images(2), torch.arange(2.0), "labels: expected int64"),
        (random_images(2), torch.arange(2)[:, None], "labels: expected int64"),
        (random_images(2), torch.arange(3), r"labels: expected one per image \(2\), got 3"),
        (random_images(2), torch.tensor([0, -1]), "labels: expected none below 0, got -1"),
        (random_images(2)[:0], torch.arange(0), "images: expected at least one"),
    ],
)
def test_sets_that_cannot_be(images, labels, message):
    with pytest.raises(DataError, match=f"^{message}"):
        ImageSet(images, labels)


def test_an_image_folder_set_checks_its_parts():
    with pytest.raises(DataError, match=r"^labels: expected one per image"):
        ImageFolderSet(["a.png"], torch.arange(2), 8)
    with pytest.raises(DataError, match=r"^image_size: expected"):
        ImageFolderSet(["a.png"], torch.arange(1), 0)


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_shards_are_the_parts_of_a_batch(parts, tmp_path):
    """Crops, colours and cutouts included; the last batch of 3 leaves some of five out."""

    def photos(**options):
        for i, image in enumerate(random_images(7, size=12)):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
        paths = [tmp_path / f"{i}.png" for i in range(7)]
        dataset = ImageFolderSet(paths, torch.arange(7), 8)
        return Batches(dataset, None, 4, augment=PHOTO_AUGMENT, seed=7, **options)

    for make in (memory_batches, photos):
        whole = [*islice(make().stream(), 7)]
        shards = [make(shard=(k, parts)) for k in range(parts)]
        streams = [shard.stream() for shard in shards]
        for images, labels in whole:
            here = [k for k in range(parts) if len(labels) * (k + 1) // parts > len(labels) * k // parts]
            got = [next(streams[k]) for k in here]
            assert torch.equal(torch.cat([x for x, _ in got]), images)
            assert torch.equal(torch.cat([y for _, y in got]), labels)
            shares = [shards[k].share for k in here]
            assert shares == [len(y) / len(labels) for _, y in got]
