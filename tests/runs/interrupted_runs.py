"""Runs of both commands that were interrupted in their second epoch, as folders to damage or to age."""

import json
import shutil

import torch
from interrupted import interrupted_before

from rfdarts_fast.ops import backends
from rfdarts_fast.retrain import TrainConfig, train
from rfdarts_fast.retrain.run import TrainRun
from rfdarts_fast.search import SearchConfig, search
from rfdarts_fast.search.run import SearchRun

COMMON = {"device": "cpu", "dataset": "npz", "channels": 4, "layers": 1, "batch_size": 4, "epochs": 2}
SEARCH = {
    **COMMON,
    "space": "s2",
    "method": "rf-pcdarts",
    "partial_channels": 2,
    "edge_norm": True,
    "learning_rate": 0.1,
    "learning_rate_min": 0.0,
    "arch_learning_rate": 6e-4,
    "backend": "cpu" if backends()["cpu"].status()["built"] else "reference",
}
TRAIN = {**COMMON, "auxiliary": False, "cutout": 0}
COMMANDS = {
    "search": (SearchConfig, SEARCH, search, SearchRun),
    "train": (TrainConfig, TRAIN, train, TrainRun),
}


class Runs:
    """A command's run that was left alone, and one that was interrupted in its second epoch."""

    def __init__(self, command, npz, folder):
        self.command = command
        self.config_class, options, self.start, run_class = COMMANDS[command]
        self.options = {**options, "data_root": npz}
        self.whole, self.interrupted = folder / "whole", folder / "interrupted"
        self.go_on(self.whole)
        with interrupted_before(run_class, 1, 1):
            self.go_on(self.interrupted)

    def go_on(self, folder, **changes):
        # see tests/conftest.py
        with torch.backends.mkldnn.flags(enabled=torch.backends.cpu.get_cpu_capability() == "AVX512"):
            return self.start(self.config_class(**{**self.options, "out": folder, **changes}))

    def copy(self, folder):
        """A copy of the interrupted run's folder."""
        return self.older(folder, lambda values: None)

    def older(self, folder, change):
        """A copy of the interrupted run's folder whose config.json is changed."""
        shutil.copytree(self.interrupted, folder)
        values = json.loads((folder / "config.json").read_text())
        change(values)
        (folder / "config.json").write_text(json.dumps(values))
        return folder
