"""Small data sets in every form that the package reads."""

import subprocess
import sys
from pathlib import Path

import pytest
from image_samples import write_photo

SHARED = Path(__file__).resolve().parents[3] / "shared"


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
