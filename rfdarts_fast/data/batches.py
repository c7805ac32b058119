"""Batches that depend only on (seed, epoch, step): a resumed run needs no state but its position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from .augment import Augment
from .device import Batch, copied_ahead, upload
from .errors import DataError, require, require_int
from .files import FileReader
from .resample import centre_boxes, crop_and_resize, draw_boxes
from .seeding import Purpose, torch_generator
from .sets import ImageFolderSet, ImageSet
from .store import StoredSet


class Batches:
    """Endlessly repeatable batches of the images at `indices` (None: all of them) of `dataset`.

    A batch is (images, labels): normalised float32 [B, 3, S, S] and int64 [B], on `device`. What it holds,
    crops included, depends on `seed`, the epoch and the step alone: not on the device, not on `workers`, not
    on what was drawn before, and never on the global random state, which stays untouched.

    Each epoch visits every image once, in an order of its own if `shuffle`; `drop_last` leaves out a last,
    smaller batch. For image folders `workers` processes decode (0: this one) and live until `close` or the
    end of the program; an image set in memory needs none and ignores the number.

    With `shard` (k, n) these are the k-th of n equal parts of the same batches, crops included: the parts are
    disjoint, and one after the other they are the batch that a single process gets. A batch with fewer images
    than parts leaves some parts out.

    Attributes:
        whole: the number of images in the whole batch of which a part came last.
        share: the number of images in that part, over those in the whole batch.

    Raises DataError for indices out of range, an empty subset, options out of range, and `drop_last` with a
    batch_size that leaves no step in an epoch.
    """

    def __init__(
        self,
        dataset: ImageSet | ImageFolderSet | StoredSet,
        indices: Tensor | np.ndarray | Sequence[int] | None,
        batch_size: int,
        *,
        augment: Augment,
        seed: int,
        device: torch.device | str = "cpu",
        shuffle: bool = True,
        drop_last: bool = False,
        workers: int = 0,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        self.dataset = dataset
        self.indices = _checked_indices(indices, len(dataset))
        self.batch_size = require_int(batch_size, "batch_size", 1)
        self.augment = augment
        self.seed = require_int(seed, "seed", 0)
        self.device = torch.device(device)
        self.shuffle = shuffle
        self.shard = shard
        self.whole = 0
        self.share = 1.0
        self.drop_last = drop_last
        full, rest = divmod(len(self.indices), batch_size)
        self._steps = full + (rest > 0 and not drop_last)
        require(
            self._steps > 0,
            f"batch_size: expected at most {len(self.indices)}, the number of images, with drop_last, "
            f"got {batch_size}",
        )
        workers = require_int(workers, "workers", 0)
        self._reader: FileReader | None = None
        if isinstance(dataset, ImageFolderSet):
            pinned = self.device.type == "cuda"
            self._reader = FileReader(dataset, augment, self.seed, workers, pinned)
        elif augment.resized_crop is not None and not dataset.photos:
            raise DataError("resized_crop: expected None for images in memory (crop them with pad)")

    def __len__(self) -> int:
        """Steps per epoch."""
        return self._steps

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, from step `start` on."""
        require_int(epoch, "epoch", 0)
        require(
            0 <= require_int(start, "start", 0) <= self._steps,
            f"start: expected a step within 0..{self._steps}, got {start}",
        )
        return self._batches(epoch * self._steps + start, (epoch + 1) * self._steps)

    def stream(self, position: int = 0) -> Iterator[Batch]:
        """Epoch after epoch without end, starting after `position` batches."""
        return self._batches(require_int(position, "position", 0), None)

    def close(self) -> None:
        """End the worker processes; the next batch starts new ones."""
        if self._reader is not None:
            self._reader.close()

    def _batches(self, position: int, stop: int | None) -> Iterator[Batch]:
        if isinstance(self.dataset, ImageSet):
            return self._from_memory(self.dataset.on(self.device), position, stop)
        order = self._order(position, stop)
        if isinstance(self.dataset, StoredSet):
            return self._from_host(self.dataset.read(order, self.device), position, stop)
        assert self._reader is not None
        return self._from_host(self._reader.read(order), position, stop)

    def _from_memory(self, dataset: ImageSet, position: int, stop: int | None) -> Iterator[Batch]:
        for epoch, step, indices in self._order(position, stop):
            chosen = upload(indices, self.device)
            images = dataset.images.index_select(0, chosen)
            self._note_size(len(indices), step)
            yield self._augmented(images, epoch, step), dataset.labels.index_select(0, chosen)

    def _from_host(self, batches: Iterator[Batch], position: int, stop: int | None) -> Iterator[Batch]:
        read = copied_ahead(batches, self.device)
        for (epoch, step, _), (images, labels) in zip(self._order(position, stop), read, strict=False):
            self._note_size(len(labels), step)
            yield self._augmented(images, epoch, step), labels

    def _augmented(self, images: Tensor, epoch: int, step: int) -> Tensor:
        generator = torch_generator(self.seed, Purpose.BATCH, epoch, step)
        size = self._size(step)
        draws = self.augment.draw(size, self.dataset.image_size, generator)
        if isinstance(self.dataset, StoredSet):
            boxes = self._boxes(size, self.dataset.side, generator)[:, slice(*self._part(size))]
            images = crop_and_resize(images, boxes, self.dataset.image_size)
        if len(images) < size:
            draws = draws.part(*self._part(size))
        return self.augment.apply(images, draws.to(self.device))

    def _boxes(self, count: int, side: int, generator: torch.Generator) -> Tensor:
        augment = self.augment
        if augment.resized_crop is None:
            return centre_boxes(count, side, augment.centre_fraction)
        return draw_boxes(count, side, augment.resized_crop, augment.resized_ratio, generator)

    def _note_size(self, images: int, step: int) -> None:
        self.whole = self._size(step)
        self.share = images / self.whole

    def _size(self, step: int) -> int:
        """Images of a whole batch."""
        return min(self.batch_size, len(self.indices) - step * self.batch_size)

    def _part(self, size: int) -> tuple[int, int]:
        """First and last + 1 of a whole batch's images in this shard."""
        k, n = self.shard
        return size * k // n, size * (k + 1) // n

    def _order(self, position: int, stop: int | None) -> Iterator[tuple[int, int, Tensor]]:
        """(epoch, step, indices into the data set) of every part of a batch from `position` on, to `stop`."""
        chosen = self.indices
        while stop is None or position < stop:
            epoch, start = divmod(position, self._steps)
            if self.shuffle:
                generator = torch_generator(self.seed, Purpose.ORDER, epoch)
                chosen = self.indices[torch.randperm(len(self.indices), generator=generator)]
            for step in range(start, self._steps):
                first, last = self._part(self._size(step))
                if last > first:
                    offset = step * self.batch_size
                    yield epoch, step, chosen[offset + first : offset + last]
            position = (epoch + 1) * self._steps


def _checked_indices(indices: Tensor | np.ndarray | Sequence[int] | None, size: int) -> Tensor:
    if indices is None:
        return torch.arange(size)
    chosen = torch.as_tensor(indices)
    require(chosen.numel() > 0, "indices: expected at least one image, got an empty subset")
    if chosen.ndim != 1 or chosen.is_floating_point() or chosen.dtype == torch.bool:
        raise DataError(f"indices: expected integers [n], got {chosen.dtype} {list(chosen.shape)}")
    chosen = chosen.to("cpu", torch.int64)
    low, high = int(chosen.min()), int(chosen.max())
    require(low >= 0 and high < size, f"indices: expected them within 0..{size - 1}, got {low}..{high}")
    return chosen
