"""CIFAR-10, CIFAR-100 and SVHN as torchvision stores them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import DataError
from ..sets import ImageSet
from .registry import Images

# a torchvision built for another torch fails with RuntimeError or OSError when it loads its library
_NOT_INSTALLED = (ImportError, RuntimeError, OSError)
# what torchvision and its unpicklers raise for files that are missing or damaged
_DAMAGED = (RuntimeError, OSError, EOFError, ValueError, KeyError, TypeError, pickle.UnpicklingError)


def load(name: str, root: Path, download: bool) -> Images:
    """The data set `name` ("cifar10", "cifar100" or "svhn") in the folder `root`.

    The training images are the 50,000 of CIFAR, and for SVHN the 73,257 of split "train" without the "extra"
    ones, as RobustDARTS uses it. Raises DataError without torchvision, and for missing or damaged files.
    """
    datasets = _torchvision_datasets(name)
    opened: list[Any] = []
    try:
        for train in (True, False):
            if name == "svhn":
                opened.append(datasets.SVHN(root, split="train" if train else "test", download=download))
            else:
                cifar = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
                opened.append(cifar(root, train=train, download=download))
    except _DAMAGED as error:
        raise DataError(
            f"{root}: expected the files of {name} as torchvision stores them, got: {error}"
        ) from error
    names = tuple(opened[0].classes) if name != "svhn" else tuple(str(digit) for digit in range(10))
    return Images(_image_set(opened[0]), _image_set(opened[1]), names)


def _torchvision_datasets(name: str) -> Any:
    try:
        from torchvision import datasets
    except _NOT_INSTALLED as error:
        raise DataError(
            f"dataset: {name} is read through torchvision, which cannot be imported here ({error}); "
            "install it with `pip install torchvision`, or convert the images to an .npz file and use npz, "
            "which does without"
        ) from error
    return datasets


def _image_set(part: Any) -> ImageSet:
    pixels = np.asarray(part.data)
    # CIFAR is kept as NHWC with `targets`, SVHN as NCHW with `labels`
    if hasattr(part, "targets"):
        images, labels = pixels.transpose(0, 3, 1, 2), part.targets
    else:
        images, labels = pixels, part.labels
    return ImageSet(
        torch.from_numpy(np.ascontiguousarray(images)),
        torch.from_numpy(np.asarray(labels, dtype=np.int64)),
    )
