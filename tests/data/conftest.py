"""Small data sets in every form that the package reads."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

SHARED = Path(__file__).resolve().parents[3] / "shared"


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


@pytest.fixture
def photos(tmp_path):
    """ROOT/{train,val}/<class>/*: 12 training and 4 held-out images of different sizes, two classes."""
    for part, count in (("train", 6), ("val", 2)):
        for label, name in enumerate(("ant", "bee")):
            for i in range(count):
                suffix = (".png", ".jpg")[i % 2]
                write_photo(
                    tmp_path / part / name / f"{i}{suffix}", 40 + 7 * i, 30 + 5 * label, 10 * label + i
                )
    return tmp_path


@pytest.fixture(scope="session")
def cifar10_npz(tmp_path_factory):
    """The first 400 + 100 images of CIFAR-10, JPEG-compressed, decoded by the shared tool."""
    tool, pack = SHARED / "tools" / "unpack.py", SHARED / "data" / "cifar10_full_jpeg.npz"
    if not (tool.is_file() and pack.is_file()):
        pytest.skip("needs the CIFAR-10 pack in ../shared")
    out = tmp_path_factory.mktemp("cifar10") / "cifar10.npz"
    command = [sys.executable, str(tool), "cifar10", str(out), "--train", "400", "--test", "100"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return out


@pytest.fixture(scope="session")
def cifar_split_file():
    path = SHARED / "data" / "nb201_splits" / "cifar-split.txt.gz"
    if not path.is_file():
        pytest.skip("needs the NAS-Bench-201 split files in ../shared")
    return path
