"""Reading batches of image files, decoded by worker processes that stay alive."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .augment import Augment
from .device import Batch
from .errors import DataError
from .photo import centre_crop, random_resized_crop, read_rgb, to_tensor
from .seeding import Purpose, numpy_generator
from .sets import ImageFolderSet

# (epoch, step, indices into the data set) of every batch, in order
BatchOrder = Iterable[tuple[int, int, Tensor]]


class FileReader:
    """Decodes batches in a given order, with one pool of workers for all orders.

    Reading a new order ends the one before; going on with that raises RuntimeError.
    """

    def __init__(
        self, dataset: ImageFolderSet, augment: Augment, seed: int, workers: int, pinned: bool
    ) -> None:
        self._decoder = _Decoder(dataset, augment, seed)
        self._workers = workers
        self._pinned = pinned
        self._queue = _Queue()
        # the reasons of the images that were skipped, by file
        self.skipped: dict[str, str] = {}
        self._loader: DataLoader[Any] | None = None
        self._reads = 0

    def read(self, order: BatchOrder) -> Iterator[Batch]:
        """The batches of `order`: uint8 [B, 3, S, S] and int64 [B], on the CPU, in pinned memory if so asked.

        Raises DataError for an unreadable file.
        """
        self._reads += 1
        this_read = self._reads
        if self._loader is None:
            self._loader = self._new_loader()
        self._queue.order = order
        for batch in self._loader:
            # an error travels as a value: raised in a worker it would come out wrapped in its traceback
            if isinstance(batch, DataError):
                raise batch
            images, labels, problems = batch
            self._report(problems)
            yield images, labels
            if this_read != self._reads:
                raise RuntimeError("these batches ended when others were asked of the same Batches")

    def _report(self, problems: dict[str, str]) -> None:
        """Each skipped file once on stderr, with how many there are by now."""
        for file, why in problems.items():
            if file not in self.skipped:
                self.skipped[file] = why
                tqdm.write(f"skipped: {why} ({len(self.skipped)} so far)", file=sys.stderr)

    def close(self) -> None:
        self._reads += 1
        self._loader = None

    def _new_loader(self) -> DataLoader[Any]:
        return DataLoader(
            self._decoder,
            batch_sampler=self._queue,  # type: ignore[arg-type]
            num_workers=self._workers,
            persistent_workers=self._workers > 0,
            collate_fn=_as_it_is,
            pin_memory=self._pinned,
            worker_init_fn=_leave_process_group,
            # without its own generator the loader would draw from the global one
            generator=torch.Generator(),
        )


class _Decoder(Dataset[Any]):
    """Turns (epoch, indices) into a batch; all that a worker process holds."""

    def __init__(self, dataset: ImageFolderSet, augment: Augment, seed: int) -> None:
        self.dataset = dataset
        self.augment = augment
        self.seed = seed

    def __getitems__(self, keys: tuple[int, list[int]]) -> tuple[Tensor, Tensor, dict[str, str]] | DataError:
        epoch, indices = keys
        problems: dict[str, str] = {}
        try:
            read = [self._readable_square(epoch, index, problems) for index in indices]
        except DataError as error:
            return error
        images, used = zip(*read, strict=True)
        return torch.stack(images), self.dataset.labels[list(used)], problems

    def _readable_square(self, epoch: int, index: int, problems: dict[str, str]) -> tuple[Tensor, int]:
        """The square of the image at `index`, or if that may be, of the next that can be read; its index."""
        count = len(self.dataset)
        for other in (k % count for k in range(index, index + count)):
            try:
                return self._square(epoch, other), other
            except DataError as error:
                if not self.dataset.skip_corrupt:
                    raise
                problems[str(self.dataset.path(other))] = str(error)
        raise DataError("expected an image that can be read, got none")

    def _square(self, epoch: int, index: int) -> Tensor:
        image, size, augment = read_rgb(self.dataset.path(index)), self.dataset.image_size, self.augment
        if augment.resized_crop is None:
            return to_tensor(centre_crop(image, size, augment.centre_fraction))
        random = numpy_generator(self.seed, Purpose.PHOTO, epoch, index)
        return to_tensor(
            random_resized_crop(image, size, augment.resized_crop, augment.resized_ratio, random)
        )


class _Queue:
    """The loader's batch sampler: hands out the order that is current when the loader starts over."""

    def __init__(self) -> None:
        self.order: BatchOrder = ()

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        # plain numbers: a tensor would travel to the workers through shared memory, one file each
        return ((epoch, indices.tolist()) for epoch, _, indices in self.order)


def _as_it_is(batch: object) -> object:
    return batch


def _leave_process_group(_worker: int) -> None:
    # Ctrl-C and signals to the group are for the main process, which finishes its step and saves. Ignoring
    # SIGTERM would not do: multiprocessing ends its children with it and then waits for them
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
