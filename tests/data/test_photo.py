"""Cutting squares out of photos: the published geometry, checked on images that show where they were cut."""

import numpy as np
import pytest
import torch
from PIL import Image

from rfdarts_fast.data import Augment, Batches, DataError, ImageFolderSet, ImageSet
from rfdarts_fast.data.photo import centre_crop, random_resized_crop, read_rgb, to_tensor


def coordinates(width, height):
    """An image whose red is the column and whose green is the row."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x, y, 0 * x], axis=2).astype(np.uint8))


@pytest.mark.parametrize(("width", "height"), [(40, 20), (20, 40), (33, 33)])
def test_a_centre_crop_without_scaling_is_the_middle(width, height):
    cut = to_tensor(centre_crop(coordinates(width, height), 10, 10 / min(width, height)))
    left, top = round((width - 10) / 2), round((height - 10) / 2)
    assert cut.shape == (3, 10, 10)
    assert cut[0, 0].tolist() == list(range(left, left + 10))
    assert cut[1, :, 0].tolist() == list(range(top, top + 10))


def test_a_centre_crop_scales_the_short_side():
    whole = to_tensor(centre_crop(coordinates(200, 100), 50, 1.0))
    # every pixel averages two, over the middle 100 columns and all 100 rows
    assert abs(int(whole[0, 25, 0]) - 50) <= 1 and abs(int(whole[0, 25, -1]) - 149) <= 1
    assert whole[1, 0, 25] <= 1 and whole[1, -1, 25] >= 98


def boxes(area, ratio, count=400):
    """Widths and heights of random boxes of a 200 x 150 image, read off the gradients in what they show."""
    image, random = coordinates(200, 150), np.random.default_rng(0)
    cuts = [to_tensor(random_resized_crop(image, 50, area, ratio, random)).float() for _ in range(count)]
    widths = torch.stack([(cut[0, 25, 45] - cut[0, 25, 5]) / 40 * 50 for cut in cuts])
    heights = torch.stack([(cut[1, 45, 25] - cut[1, 5, 25]) / 40 * 50 for cut in cuts])
    return widths, heights


def test_random_crops_have_areas_uniform_in_the_range():
    # boxes of the image's own shape always fit, so none is drawn again
    widths, heights = boxes((0.2, 1.0), (4 / 3, 4 / 3))
    areas = widths * heights / (200 * 150)
    expected = 0.2 + 0.8 * torch.linspace(0, 1, 5)
    torch.testing.assert_close(areas.quantile(torch.linspace(0, 1, 5)), expected, rtol=0, atol=0.06)


def test_random_crops_have_ratios_log_uniform_in_the_range():
    widths, heights = boxes((0.25, 0.25), (1 / 2, 2))
    expected = torch.linspace(-1, 1, 5)
    quantiles = (widths / heights).log2().quantile(torch.linspace(0, 1, 5))
    torch.testing.assert_close(quantiles, expected, rtol=0, atol=0.12)


def test_random_crops_reach_every_border():
    image, random = coordinates(60, 60), np.random.default_rng(0)
    cuts = [to_tensor(random_resized_crop(image, 12, (0.04, 0.04), (1, 1), random)) for _ in range(400)]
    assert min(int(cut[0, 0, 0]) for cut in cuts) == 0 and max(int(cut[0, 0, -1]) for cut in cuts) == 59
    assert min(int(cut[1, 0, 0]) for cut in cuts) == 0 and max(int(cut[1, -1, 0]) for cut in cuts) == 59


@pytest.mark.parametrize(("width", "height"), [(200, 10), (10, 200)])
def test_a_photo_too_narrow_for_any_box_gives_its_largest_centred_one(width, height):
    random = np.random.default_rng(0)
    cut = to_tensor(random_resized_crop(coordinates(width, height), 13, (1.0, 1.0), (3 / 4, 4 / 3), random))
    # 10 pixels by 13, around the middle of 200
    long = cut[0 if width > height else 1].float()
    assert 92 <= long.min() <= 95 and 104 <= long.max() <= 107


def test_random_crop_equals_torchvision_on_the_same_box():
    functional = pytest.importorskip("torchvision.transforms.functional", reason="torchvision not installed")
    from rfdarts_fast.data.photo import _resized_part

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (61, 83, 3), dtype=np.uint8))
    ours = _resized_part(image, 7, 11, 40, 35, (24, 24))
    theirs = functional.resized_crop(image, 11, 7, 35, 40, [24, 24])
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.mark.parametrize(("width", "height"), [(83, 61), (50, 75), (37, 37)])
def test_centre_crop_equals_torchvision(width, height):
    functional = pytest.importorskip("torchvision.transforms.functional", reason="torchvision not installed")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    theirs = functional.center_crop(functional.resize(image, 32), [28, 28])
    assert np.array_equal(np.asarray(centre_crop(image, 28, 7 / 8)), np.asarray(theirs))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_every_colour_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    coordinates(9, 7).convert(mode).save(path)
    assert to_tensor(read_rgb(path)).shape == (3, 7, 9)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\0" * 30])
def test_unreadable_files_are_named(tmp_path, content):
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"bad\.png: expected a readable image"):
        read_rgb(path)
    with pytest.raises(DataError, match=r"gone\.png: expected a readable image"):
        read_rgb(tmp_path / "gone.png")


def test_photos_go_through_the_same_augmentation_as_images_in_memory(tmp_path):
    paths = []
    for i in range(3):
        paths.append(tmp_path / f"{i}.png")
        coordinates(8, 8).save(paths[-1])
    dataset = ImageFolderSet(paths, torch.arange(3), 8)
    augment = Augment(pad=1, flip=True, cutout=2)
    (images, labels) = next(Batches(dataset, None, 3, augment=augment, seed=0, shuffle=False).epoch(0))
    assert labels.tolist() == [0, 1, 2]
    memory = ImageSet(torch.stack([to_tensor(read_rgb(path)) for path in paths]), torch.arange(3))
    (expected, _) = next(Batches(memory, None, 3, augment=augment, seed=0, shuffle=False).epoch(0))
    assert torch.equal(images, expected)
