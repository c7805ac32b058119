"""Fixtures that more than one folder of tests uses."""

import contextlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

# a machine that is lent for its GPU may lack it, and the tests there do without
with contextlib.suppress(ModuleNotFoundError):
    from hypothesis import HealthCheck, settings

    # a busy machine is no failure
    settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("patient")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny tensors gain nothing from threads, and the number of threads may change the last bit."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# trained convolutions corrupt the heap on processors without AVX-512 ("corrupted double-linked list"): torch
# 2.14.1 on an AVX2 EPYC, on the reference as well, gone without oneDNN
@pytest.fixture
def without_onednn():
    with torch.backends.mkldnn.flags(enabled=torch.backends.cpu.get_cpu_capability() == "AVX512"):
        yield


@pytest.fixture
def shared_data():
    """Path of a file of ../shared/data; skips the test where it is absent."""

    def find(name):
        path = SHARED_DATA / name
        if not path.is_file():
            pytest.skip(f"needs shared/data/{name} beside the repository")
        return path

    return find


@pytest.fixture
def rfdarts(monkeypatch, capsys):
    """Runs the command line in this process; returns (exit code, stdout, stderr)."""
    from rfdarts_fast import cli

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["rfdarts", *map(str, args)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def tiny_npz(tmp_path_factory):
    """24 training and 10 test images of 8 x 8 pixels, four classes that their brightness tells apart."""
    random = np.random.RandomState(0)
    arrays = {}
    for part, n in (("train", 24), ("test", 10)):
        labels = np.arange(n) % 4
        noise = random.randint(0, 64, (n, 8, 8, 3))
        arrays[f"x_{part}"] = (48 * labels[:, None, None, None] + noise).astype(np.uint8)
        arrays[f"y_{part}"] = labels
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(path, **arrays)
    return path


@pytest.fixture
def tiny_run(tiny_npz, tmp_path):
    """Options of the smallest run: 3 steps an epoch (search) or 6 (train), a fraction of a second."""
    return {
        "out": tmp_path / "run",
        "dataset": "npz",
        "data_root": tiny_npz,
        "device": "cpu",
        "channels": 4,
        "layers": 1,
        "cells_per_stage": 1,
        "epochs": 2,
        "batch_size": 4,
        "cutout": 0,
    }


@pytest.fixture
def tiny_search(tiny_run):
    """A SearchConfig of a NAS-Bench-201 search unless the changes say otherwise."""
    from rfdarts_fast.search import SearchConfig

    def config(**changes):
        return SearchConfig(**{**tiny_run, "method": "rf-darts", "space": "nasbench201", **changes})

    return config


@pytest.fixture
def tiny_train(tiny_run):
    from rfdarts_fast.retrain import TrainConfig

    def config(**changes):
        return TrainConfig(**{**tiny_run, "auxiliary": False, **changes})

    return config
