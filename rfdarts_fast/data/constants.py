"""What is known about each data set: channel statistics of pixels scaled to 0..1, and class names."""

from __future__ import annotations

from typing import NamedTuple


class Statistics(NamedTuple):
    """Mean and standard deviation of the red, green and blue channel."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


STATISTICS = {
    # quark0/darts cnn/utils.py; PC-DARTS and RobustDARTS use the same
    "cifar10": Statistics((0.49139968, 0.48215827, 0.44653124), (0.24703233, 0.24348505, 0.26158768)),
    # automl/RobustDARTS src/utils.py
    "cifar100": Statistics((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "svhn": Statistics((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    # the ImageNet constants of torchvision and of every recipe built on it
    "imagefolder": Statistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}

# mirrored digits are other shapes: a 2 becomes an S. SVHN is mirrored all the same in RobustDARTS.
NOT_FLIPPED = frozenset({"digits"})
