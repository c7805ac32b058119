"""Command lines of the smallest runs, for `killed_runs.py`."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

# the noise of S4 and drop path draw from the global random state, which must be put back too
SEARCH = (
    "--method rf-pcdarts --space s4 --partial-channels 2 --channels 4 --layers 1 --batch-size 6 --epochs 2 "
    "--arch-warmup-epochs 0"
)
TRAIN = (
    "--genotype DARTS_V2 --no-auxiliary --drop-path 0.5 --channels 4 --layers 2 --cutout 4 --batch-size 12 "
    "--epochs 2"
)
OPTIONS = {"search": SEARCH, "train": TRAIN}


def arguments(command, npz, out, options=None):
    words = (options or OPTIONS[command]).split()
    always = ["--dataset", "npz", "--data-root", str(npz), "--device", "cpu", "--checkpoint-minutes", "1e-9"]
    return [command, *words, *always, "--out", str(out)]
