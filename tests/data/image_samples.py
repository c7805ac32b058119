"""Small images, arrays and files to test with."""

import numpy as np
import torch
from PIL import Image


def random_images(count, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


def npz_arrays(count=12, size=8, classes=3):
    random = np.random.default_rng(0)
    return {
        "x_train": random.integers(0, 256, (count, size, size, 3), dtype=np.uint8),
        "y_train": np.arange(count) % classes,
        "x_test": random.integers(0, 256, (classes, size, size, 3), dtype=np.uint8),
        "y_test": np.arange(classes),
    }


def write_photo(path, width, height, seed):
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(path)
