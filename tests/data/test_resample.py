"""Random parts of whole batches, resized as torchvision does it."""

import math

import pytest
import torch
from image_samples import random_images

from rfdarts_fast.data import resample


def boxes_of(side, count=64, seed=0, area=(0.08, 1.0), ratio=(3 / 4, 4 / 3)):
    return resample.draw_boxes(count, side, area, ratio, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("side", [1, 7, 64, 256])
def test_boxes_lie_within_the_image(side):
    top, left, height, width = boxes_of(side, 2000)
    assert min(top.min(), left.min()) >= 0
    assert min(height.min(), width.min()) >= 1
    assert int((top + height).max()) <= side
    assert int((left + width).max()) <= side


def test_boxes_are_distributed_as_torchvision_s():
    """Areas and ratios over 20,000 draws; the places are uniform over what is free."""
    transforms = pytest.importorskip("torchvision.transforms")
    side, count = 256, 20_000
    image = torch.empty(3, side, side)
    torch.manual_seed(0)
    drawn = [
        transforms.RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(count)
    ]
    theirs, ours = torch.tensor(drawn).t().double(), boxes_of(side, count).double()
    for a, b in (
        (theirs[2] * theirs[3], ours[2] * ours[3]),
        ((theirs[3] / theirs[2]).log(), (ours[3] / ours[2]).log()),
        (theirs[0], ours[0]),
        (theirs[1], ours[1]),
    ):
        # two samples of a distribution: means and deviations within five standard errors
        error = a.std() * math.sqrt(2 / count)
        assert abs(a.mean() - b.mean()) < 5 * error
        assert abs(a.std() - b.std()) < 5 * error


def test_no_box_fits():
    """Twice as wide as high: the largest centred box."""
    assert boxes_of(8, 1, area=(1.0, 1.0), ratio=(2.0, 2.0)).flatten().tolist() == [2, 0, 4, 8]


def test_crops_are_torchvision_s():
    """Bit by bit on the CPU, up and down."""
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    images, boxes = random_images(16, size=40), boxes_of(40, 16)
    crops = resample.crop_and_resize(images, boxes, 24)
    for image, crop, (top, left, height, width) in zip(images, crops, boxes.t().tolist(), strict=True):
        expected = functional.resized_crop(image, top, left, height, width, [24, 24], antialias=True)
        assert torch.equal(crop, expected)


@pytest.mark.parametrize("size", [8, 24, 56])
def test_products_give_the_same_up_to_rounding(size):
    """What GPUs do: within a level, half of it of the exact value."""
    images, boxes = random_images(64, size=40), boxes_of(40)
    ours = resample.resized_by_products(images, boxes, size)
    theirs = resample.crop_and_resize(images, boxes, size)
    difference = (ours.int() - theirs.int()).abs()
    assert difference.max() <= 1
    exact = [
        torch.nn.functional.interpolate(
            image[None, :, t : t + h, x : x + w].double(), (size, size), mode="bilinear", antialias=True
        )
        for image, (t, x, h, w) in zip(images, boxes.t().tolist(), strict=True)
    ]
    assert (ours.double() - torch.cat(exact)).abs().max() < 0.501


def test_centre_boxes():
    assert resample.centre_boxes(2, 256, 7 / 8).t().tolist() == [[16, 16, 224, 224]] * 2
    images = random_images(2, size=16)
    centre = resample.crop_and_resize(images, resample.centre_boxes(2, 16, 0.5), 8)
    assert torch.equal(centre, images[:, :, 4:12, 4:12])
