"""The batched augmentation against one image at a time, written out with loops."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_samples import random_images

from rfdarts_fast.data import Augment, ColourJitter, DataError, Draws

MEAN, STD = (0.49139968, 0.48215827, 0.44653124), (0.24703233, 0.24348505, 0.26158768)


def one_by_one(images, augment, draws):
    """The same augmentation, image by image and pixel by pixel."""
    out = np.zeros(images.shape, np.float32)
    size, pad, half = images.shape[-1], augment.pad, augment.cutout // 2
    mean, std = np.float32(augment.mean), np.float32(augment.std)
    for b, image in enumerate(images.numpy()):
        top, left, mirrored, row, column = draws.places[:, b].tolist()
        padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)))
        crop = padded[:, top : top + size, left : left + size]
        if augment.flip and mirrored:
            crop = crop[:, :, ::-1]
        scaled = crop.astype(np.float32) / np.float32(255)
        out[b] = (scaled - mean[:, None, None]) / std[:, None, None]
        for y in range(max(row - half, 0), min(row + half, size)):
            for x in range(max(column - half, 0), min(column + half, size)):
                out[b, :, y, x] = 0
    return torch.from_numpy(out)


@settings(deadline=None)
@given(
    size=st.integers(1, 9),
    pad=st.integers(0, 3),
    flip=st.booleans(),
    cutout=st.integers(0, 6),
    channels_last=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_batch_equals_its_images_one_by_one(size, pad, flip, cutout, channels_last, seed):
    augment = Augment(MEAN, STD, pad=pad, flip=flip, cutout=cutout, channels_last=channels_last)
    images = random_images(5, size, seed)
    draws = augment.draw(5, size, torch.Generator().manual_seed(seed))
    result = augment.apply(images, draws)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, one_by_one(images, augment, draws), rtol=0, atol=0)


def test_a_crop_is_a_slice_of_the_image_padded_with_black():
    image = torch.full((1, 3, 4, 4), 255, dtype=torch.uint8)
    augment = Augment(pad=2)
    corner = augment.apply(image, Draws(torch.tensor([[0], [4], [1], [0], [0]])))
    # 2 rows of padding above and 2 columns to the right; not mirrored, since flip is off
    expected = torch.zeros(1, 3, 4, 4)
    expected[:, :, 2:, :2] = 1
    torch.testing.assert_close(corner, expected, rtol=0, atol=0)


def test_a_flip_is_a_mirror():
    images = random_images(2)
    mirrored = Draws(torch.tensor([[0, 0], [0, 0], [1, 0], [0, 0], [0, 0]]))
    result = Augment(flip=True).apply(images, mirrored)
    torch.testing.assert_close(result[0], images[0].float().div(255).flip(-1), rtol=0, atol=0)
    torch.testing.assert_close(result[1], images[1].float().div(255), rtol=0, atol=0)


@pytest.mark.parametrize(("cutout", "middle", "corner"), [(4, 16, 4), (5, 16, 4), (16, 64, 64), (1, 0, 0)])
def test_the_area_of_a_cutout(cutout, middle, corner):
    images = torch.full((2, 3, 8, 8), 255, dtype=torch.uint8)
    augment = Augment(cutout=cutout)
    result = augment.apply(images, Draws(torch.tensor([[0, 0], [0, 0], [0, 0], [4, 0], [4, 0]])))
    # only the quarter around the corner is inside the image
    assert (result == 0).sum(dim=(2, 3)).tolist() == [[middle] * 3, [corner] * 3]


def test_cutout_sets_the_mean_not_black():
    images = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    result = Augment(MEAN, STD, cutout=8).apply(images, Draws(torch.tensor([[0], [0], [0], [2], [2]])))
    assert (result == 0).all()


def test_evaluation_only_normalises():
    images = random_images(3)
    augment = Augment(MEAN, STD)
    result = augment.apply(images, augment.draw(3, 8, torch.Generator().manual_seed(0)))
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(result, (images.float() / 255 - mean) / std, rtol=0, atol=0)


def test_draws_cover_every_place_and_nothing_else():
    augment = Augment(pad=2, flip=True, cutout=2)
    places = augment.draw(4000, 6, torch.Generator().manual_seed(0)).places
    for row, highest in zip(places, (4, 4, 1, 5, 5), strict=True):
        assert row.unique().tolist() == list(range(highest + 1))
        share = row.bincount() / len(row)
        assert (share - 1 / (highest + 1)).abs().max() < 0.04
    # rows are independent of columns
    assert (places[0] != places[1]).any()


def test_switching_one_augmentation_leaves_the_draws_of_the_others():
    full = Augment(pad=2, flip=True, cutout=4, jitter=ColourJitter())
    reference = full.draw(50, 8, torch.Generator().manual_seed(1)).places
    for changed in (replace(full, flip=False), replace(full, cutout=0), replace(full, jitter=None)):
        assert torch.equal(changed.draw(50, 8, torch.Generator().manual_seed(1)).places, reference)


@pytest.mark.parametrize("pad", [0, 2])
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_memory_format_is_the_one_asked_for(channels_last, pad):
    augment = Augment(pad=pad, channels_last=channels_last)
    draws = augment.draw(4, 8, torch.Generator().manual_seed(0))
    result = augment.apply(random_images(4), draws)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert result.is_contiguous(memory_format=layout)


def test_the_images_of_a_set_are_not_changed():
    images = random_images(4)
    before = images.clone()
    augment = Augment(MEAN, STD, pad=1, flip=True, cutout=4, jitter=ColourJitter())
    augment.apply(images, augment.draw(4, 8, torch.Generator().manual_seed(0)))
    assert torch.equal(images, before)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"mean": (0.5,)}, "mean"),
        ({"std": (1.0, 0.0, 1.0)}, "std"),
        ({"std": (1.0, 1.0)}, "std"),
        ({"pad": -1}, "pad"),
        ({"pad": 1.5}, "pad"),
        ({"cutout": -2}, "cutout"),
        ({"resized_crop": (0.0, 1.0)}, "resized_crop"),
        ({"resized_crop": (0.5, 1.5)}, "resized_crop"),
        ({"resized_ratio": (2.0, 1.0)}, "resized_ratio"),
        ({"centre_fraction": 0.0}, "centre_fraction"),
        ({"centre_fraction": 1.1}, "centre_fraction"),
    ],
)
def test_options_out_of_range(options, named):
    with pytest.raises(DataError, match=f"^{named}: expected"):
        Augment(**options)
