"""The cost of checkpoints, locks and fingerprints, against an epoch of RF-PCDARTS on data of CIFAR-10's size.

    python benchmarks/run_folder.py        the preset rf-pcdarts, random images, 4 timed steps

An epoch is the median step (both halves: the architecture moves) times the steps of an epoch. A checkpoint is
saved at each epoch's end and every ten minutes; lock, fingerprint and loading are paid once for each start.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from rfdarts_fast.data import Dataset, Images, ImageSet, register_dataset
from rfdarts_fast.runs.checkpoint import load_checkpoint
from rfdarts_fast.runs.fingerprint import fingerprint
from rfdarts_fast.runs.lock import FolderLock
from rfdarts_fast.runs.run import load_data
from rfdarts_fast.search import PRESETS, SearchConfig
from rfdarts_fast.search.run import opened, split


def load_random(root: Path, download: bool) -> Images:
    """50,000 and 10,000 images of 32 x 32 random pixels, ten classes."""
    random = torch.Generator().manual_seed(0)

    def images(number: int) -> ImageSet:
        pixels = torch.randint(256, (number, 3, 32, 32), dtype=torch.uint8, generator=random)
        return ImageSet(pixels, torch.arange(number) % 10)

    return Images(images(50_000), images(10_000), tuple("0123456789"))


def seconds(work: Callable[[], object], times: int) -> float:
    """The median of several runs."""
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    register_dataset(Dataset("cifar10_size", load_random))
    with tempfile.TemporaryDirectory() as folder:
        values = {**PRESETS["rf-pcdarts"], "dataset": "cifar10_size", "arch_warmup_epochs": 0}
        config = SearchConfig(out=Path(folder) / "run", **values)
        source = load_data(config)
        parts = dict(zip(("weights", "architecture"), split(config, source), strict=True))
        hashing = seconds(lambda: (fingerprint(source, parts), _forget(source)), 3)
        locking = seconds(lambda: FolderLock(Path(folder)).release(), 10)
        with opened(config) as run:
            batches = run.batches.epoch(0)
            run.train_step(*next(batches))
            step = seconds(lambda: run.train_step(*next(batches)), args.steps)
            saving = seconds(run.save, 10)
            loading = seconds(lambda: run.misfit(load_checkpoint(run.folder.checkpoint)), 5)
            size = run.folder.checkpoint.stat().st_size
            steps = len(run.batches)
    epoch, minutes = steps * step, values.get("checkpoint_minutes", 10.0)
    saves = 1 + epoch / 60 / minutes
    print(f"{torch.get_num_threads()} threads, batch {config.batch_size}: {step:.2f} s/step, {steps} steps")
    print(f"an epoch, without validation          {epoch:9.1f} s")
    for name, cost, times in (
        (f"checkpoint of {size / 1e6:.1f} MB, {saves:.1f} an epoch", saving, saves),
        ("lock, each start", locking, 1),
        ("fingerprint of 184 MB, each start", hashing, 1),
        ("checkpoint read and checked, each start", loading, 1),
    ):
        print(f"{name:40} {cost:6.3f} s {100 * cost * times / epoch:7.3f} % of an epoch")


def _forget(source) -> None:
    """Has the images hashed anew next time."""
    for images in (source.train, source.test):
        images._images_hash = None


if __name__ == "__main__":
    main()
