"""All data sets that come with the package, one module per kind of source."""

from functools import partial

from . import digits, folder, npz, store, vision
from .registry import DATASETS, Dataset, Images, load, register_dataset
from .source import DataSource, Statistics

# mirrored digits are other shapes: a 2 becomes an S. SVHN is mirrored all the same in RobustDARTS.
register_dataset(Dataset("digits", digits.load, image_size=16, mirrored=False))
register_dataset(Dataset("npz", npz.load, root="an .npz file"))
for _name, _statistics in {
    # quark0/darts cnn/utils.py; PC-DARTS and RobustDARTS use the same
    "cifar10": Statistics((0.49139968, 0.48215827, 0.44653124), (0.24703233, 0.24348505, 0.26158768)),
    # automl/RobustDARTS src/utils.py
    "cifar100": Statistics((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "svhn": Statistics((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
}.items():
    register_dataset(Dataset(_name, partial(vision.load, _name), root="a folder", statistics=_statistics))
# the ImageNet constants of torchvision and of every recipe built on it
_PHOTOS = Statistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
register_dataset(
    Dataset(
        "imagefolder",
        folder.load,
        root="the folder that holds train/<class>/*",
        image_size=224,
        statistics=_PHOTOS,
        skip=partial(folder.load, skip_corrupt=True),
    )
)
register_dataset(
    Dataset("cache", store.load, root="the folder of a store that `rfdarts cache` made", statistics=_PHOTOS)
)

__all__ = ["DATASETS", "DataSource", "Dataset", "Images", "Statistics", "load", "register_dataset"]
