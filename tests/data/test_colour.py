"""Colour jitter against the standard library, a loop, and torchvision where it is installed."""

import colorsys

import pytest
import torch
from image_samples import random_images

from rfdarts_fast.data import ColourJitter, DataError
from rfdarts_fast.data.colour import CHANGES, ColourDraws, adjust_contrast, adjust_hue, adjust_saturation


def pixels(seed=0):
    x = random_images(6, 5, seed).float() / 255
    # grey, black and white pixels have no hue
    x[0, :, 0, 0], x[0, :, 0, 1], x[0, :, 0, 2] = 0.0, 1.0, 0.5
    return x


def test_hue_against_colorsys():
    x = pixels()
    turn = torch.linspace(-0.5, 0.5, 6)
    result = adjust_hue(x, turn.view(-1, 1, 1, 1))
    for b in range(6):
        for i in range(5):
            for j in range(5):
                h, s, v = colorsys.rgb_to_hsv(*x[b, :, i, j].tolist())
                expected = colorsys.hsv_to_rgb((h + turn[b].item()) % 1, s, v)
                torch.testing.assert_close(result[b, :, i, j], torch.tensor(expected), rtol=0, atol=2e-6)


def test_contrast_zero_is_the_mean_grey_and_saturation_zero_is_grey():
    x = pixels()
    zero = torch.zeros(6, 1, 1, 1)
    grey = 0.2989 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]
    torch.testing.assert_close(adjust_saturation(x, zero), grey.expand_as(x))
    torch.testing.assert_close(adjust_contrast(x, zero), grey.mean((2, 3), keepdim=True).expand_as(x))


def test_every_image_gets_its_own_factors_in_its_own_order():
    jitter, x = ColourJitter(), pixels()
    generator = torch.Generator().manual_seed(3)
    factors = 0.6 + 0.8 * torch.rand(6, 4, generator=generator)
    order = torch.stack([torch.randperm(4, generator=generator) for _ in range(6)])
    result = jitter.apply(x.clone(), ColourDraws.of(factors, order))
    for b in range(6):
        expected = x[b : b + 1].clone()
        for change in order[b].tolist():
            expected = CHANGES[change](expected, factors[b, change].view(1, 1, 1, 1))
        torch.testing.assert_close(result[b : b + 1], expected, rtol=0, atol=1e-6)


def test_draws_stay_within_the_strengths_and_use_every_order():
    draws = ColourJitter(0.4, 0.3, 0.2, 0.1).draw(4000, torch.Generator().manual_seed(0))
    for column, (centre, strength) in enumerate([(1, 0.4), (1, 0.3), (1, 0.2), (0, 0.1)]):
        drawn = draws.factors[:, column] - centre
        assert drawn.abs().max() <= strength + 1e-6
        assert drawn.min() < -0.95 * strength and drawn.max() > 0.95 * strength
    for sizes in draws.sizes:
        assert sum(sizes) == 4000 and min(sizes) > 900


def test_no_strength_changes_nothing():
    x = pixels()
    jitter = ColourJitter(0, 0, 0, 0)
    result = jitter.apply(x.clone(), jitter.draw(6, torch.Generator().manual_seed(0)))
    torch.testing.assert_close(result, x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_strengths_out_of_range(name):
    for value in (-0.1, 1.1):
        with pytest.raises(DataError, match=f"^jitter {name}: expected"):
            ColourJitter(**{name: value})


@pytest.mark.parametrize("change", range(4))
def test_each_change_equals_torchvision(change):
    functional = pytest.importorskip("torchvision.transforms.functional", reason="torchvision not installed")
    names = ("adjust_brightness", "adjust_contrast", "adjust_saturation", "adjust_hue")
    theirs = getattr(functional, names[change])
    x = pixels()
    factors = torch.linspace(-0.4, 0.4, 6) + (change != 3)
    result = CHANGES[change](x, factors.view(-1, 1, 1, 1))
    expected = torch.stack([theirs(image, factor) for image, factor in zip(x, factors.tolist(), strict=True)])
    torch.testing.assert_close(result, expected, rtol=0, atol=5e-6)
