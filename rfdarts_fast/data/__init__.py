"""Images for search and training: sources, on-device augmentation, repeatable batches and splits.

source = load("digits")
first, second = split_half(len(source.train))
batches = Batches(source.train, first, 64, augment=default_augment(source), seed=0, device="cpu")
for images, labels in batches.epoch(0): ...
"""

from .augment import Augment, Draws
from .batches import Batches
from .colour import ColourJitter
from .defaults import default_augment, evaluation_augment
from .errors import DataError
from .sets import ImageFolderSet, ImageSet
from .sources import DATASETS, Dataset, DataSource, Images, Statistics, load, register_dataset
from .splits import read_split_file, split_half, split_per_class, split_stratified
from .store import StoredSet

__all__ = [
    "DATASETS",
    "Augment",
    "Batches",
    "ColourJitter",
    "DataError",
    "DataSource",
    "Dataset",
    "Draws",
    "ImageFolderSet",
    "ImageSet",
    "Images",
    "Statistics",
    "StoredSet",
    "default_augment",
    "evaluation_augment",
    "load",
    "read_split_file",
    "register_dataset",
    "split_half",
    "split_per_class",
    "split_stratified",
]
