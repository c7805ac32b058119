"""The handwritten digits that come with scikit-learn: real images, no network."""

from __future__ import annotations

from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from ..sets import ImageSet
from .registry import Images

_TEST_EVERY = 5


def load(root: Path, download: bool) -> Images:
    """The 1,797 digits of 8 x 8 pixels, grey repeated to 3 channels. Needs no `root`.

    The split is fixed: of each class, in the order of the data
    set, every fifth image is a test image. That leaves 1,442 to train and 355 to test, needs no
    random numbers and keeps the classes in proportion.
    """
    data = load_digits()
    labels = torch.from_numpy(data.target).to(torch.int64)
    # stored as 0..16
    bytes_ = torch.from_numpy(data.images).mul(255 / 16).round().to(torch.uint8)
    images = bytes_[:, None].expand(-1, 3, -1, -1)
    held_out = _every_fifth_of_each_class(labels)
    train, test = (ImageSet(images[part], labels[part]) for part in (~held_out, held_out))
    return Images(train, test, tuple(str(name) for name in data.target_names))


def _every_fifth_of_each_class(labels: Tensor) -> Tensor:
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        chosen[members[_TEST_EVERY - 1 :: _TEST_EVERY]] = True
    return chosen
