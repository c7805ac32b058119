"""Images a second that search and retraining can read: from a store, its copy on the device, and JPEGs.

python -m benchmarks.loader --store STORE --data-root IMAGENET --size 224 --batch 32 --workers 0 2 \\
    --threads 1 --partial-channels 2

Each source makes augmented batches (random crop, resize, mirror, normalisation) of the same size, in turns;
the median over the rounds is printed. With --partial-channels a step of the ImageNet search's supernet of
this K (its forward and backward, which a batch is needed for) takes turns with them.
"""

import argparse
import os
import statistics
import time
from itertools import islice
from pathlib import Path

import torch

from rfdarts_fast.bench.variants import step_of
from rfdarts_fast.data import Batches, default_augment, load
from rfdarts_fast.runs.environment import environment

STEP = "step"


def sources(args):
    """(name, endless batches) of each source."""
    options = {"seed": 0, "device": args.device}
    if args.store:
        source = load("cache", root=args.store, image_size=args.size)
        for where in ("host", "device"):
            images = source.train.placed(where)
            yield (
                f"store, {where}",
                Batches(images, None, args.batch, augment=default_augment(source), **options),
            )
    if args.data_root:
        source = load("imagefolder", root=args.data_root, image_size=args.size)
        for workers in args.workers:
            batches = Batches(
                source.train, None, args.batch, augment=default_augment(source), workers=workers, **options
            )
            yield f"JPEG, {workers} workers", batches


def steps(args):
    """Steps without end of rf-pcdarts-imagenet's supernet, each a forward and backward."""
    shape = {"channels": 16, "layers": 8, "space": "darts", "stem": "imagenet", "classes": 1000}
    options = {**shape, "K": args.partial_channels, "device": args.device}
    step = step_of(args.variant, "rf-pcdarts", args.batch, args.size, **options)
    while True:
        yield step()


def seconds(stream, count, device):
    """The time of `count` batches."""
    start = time.perf_counter()
    for _ in islice(stream, count):
        pass
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", type=Path)
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--batches", type=int, default=5, help="in a turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--partial-channels", type=int, help="K of the supernet whose step is timed, too")
    parser.add_argument("--variant", default="fast", help="of the step, as of `rfdarts bench`")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    streams = {name: batches.stream() for name, batches in sources(args)}
    for stream in streams.values():
        # workers start, and pages of the file are read
        next(stream)
    if args.partial_channels:
        streams[STEP] = steps(args)
        next(streams[STEP])
    times = {name: [] for name in streams}
    for _ in range(args.rounds):
        for name, stream in streams.items():
            times[name].append(seconds(stream, args.batches, args.device) / args.batches)
    here = environment()
    print(f"{here['cpu']}, {torch.get_num_threads()} threads, torch {here['torch']}, commit {here['commit']}")
    print(f"batch {args.batch}, {args.size} x {args.size}, {args.device}, load {os.getloadavg()[0]:.1f}")
    step = statistics.median(times[STEP]) if STEP in times else None
    for name, taken in times.items():
        batch = statistics.median(taken)
        share = f"{100 * batch / step:7.1f} % of a step" if step and name != STEP else ""
        print(f"{name:18}{1e3 * batch:9.1f} ms a batch{args.batch / batch:10.0f} images/s{share}")


if __name__ == "__main__":
    main()
