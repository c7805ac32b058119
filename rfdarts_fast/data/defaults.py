"""The augmentation that suits a data set."""

from __future__ import annotations

from .augment import Augment
from .colour import ColourJitter
from .sources.source import DataSource


def default_augment(
    source: DataSource,
    *,
    cutout: int = 0,
    jitter: ColourJitter | None = None,
    flip: bool | None = None,
    channels_last: bool = False,
) -> Augment:
    """The training augmentation of a data set; `cutout` (pixels) and `jitter` are off unless asked for.

    Image folders and stores: a random part of 8% to 100% of the area, resized, and a mirror, as in the
    ImageNet recipes.
    All others: a random crop after padding by an eighth of the side, and a mirror. That is the published
    4 pixels for CIFAR and SVHN at 32 and 2 at 16 (DARTS, RobustDARTS, NAS-Bench-201). `flip` overrides
    `source.mirrored`; turn it off for an npz of images that have a left and a right.
    """
    photos = source.train.photos
    return Augment(
        mean=source.mean,
        std=source.std,
        pad=0 if photos else source.image_size // 8,
        flip=source.mirrored if flip is None else flip,
        cutout=cutout,
        jitter=jitter,
        resized_crop=(0.08, 1.0) if photos else None,
        channels_last=channels_last,
    )


def evaluation_augment(source: DataSource, *, channels_last: bool = False) -> Augment:
    """Normalisation alone, for evaluation; from image folders the centre, 7/8 of the resized short side.

    At 224 pixels that is the usual resize to 256 and centre crop.
    """
    photos = source.train.photos
    return Augment(
        mean=source.mean,
        std=source.std,
        centre_fraction=7 / 8 if photos else 1.0,
        channels_last=channels_last,
    )
