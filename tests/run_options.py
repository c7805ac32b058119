"""The effect of each option of every run: `check_<field>(lab)` for each field of RunConfig.

A lab has `start(**changes)`, a run at its first step, and `finish(**changes)`, the folder of a finished one.
"""

import shutil

import pytest
import torch
from PIL import Image

from rfdarts_fast.ops import SynchronisedBatchNorm2d
from rfdarts_fast.retrain.run import TrainConfig
from rfdarts_fast.retrain.run import opened as train_opened
from rfdarts_fast.runs import run as run_module
from rfdarts_fast.runs.check import check_folder
from rfdarts_fast.runs.config import ConfigError
from rfdarts_fast.runs.run_folder import RunFolder
from rfdarts_fast.runs.signals import Stopped
from rfdarts_fast.search.run import SearchConfig
from rfdarts_fast.search.run import opened as search_opened


def check_out(lab):
    assert (lab.finish(out=lab.tmp_path / "elsewhere", epochs=1) / "metrics.jsonl").exists()


def check_restart(lab):
    first = lab.finish(epochs=1)
    lab.finish(out=first, epochs=2, restart=True)
    lines = [
        len((path / "metrics.jsonl").read_text().splitlines()) for path in (first / "before-restart-1", first)
    ]
    assert lines == [1, 2]


def check_config(lab):
    file = lab.tmp_path / "config.yaml"
    file.write_text("weight-decay: 3e-2\nseed: 11")
    config = lab.parse("--config", str(file), "--seed", "12")
    assert (config.weight_decay, config.seed) == (0.03, 12)
    assert config.config == file


def check_dataset(lab):
    assert len(lab.start().batches.dataset) == 24
    assert len(lab.start(dataset="digits", data_root=None).batches.dataset) == 1442


def check_data_root(lab):
    with pytest.raises(ValueError, match=r"other\.npz"):
        lab.start(data_root=lab.tmp_path / "other.npz")


def check_corrupt(lab):
    lab.start(corrupt="fatal")
    with pytest.raises(ValueError, match="corrupt: expected fatal for the data set npz, got 'skip'"):
        lab.start(corrupt="skip")


def check_cache_on(lab):
    """See tests/cache for what it does."""
    with pytest.raises(ConfigError, match="cache_on: expected auto with the data set npz, got 'host'"):
        lab.start(cache_on="host")


def check_download(lab):
    asked = []
    load = run_module.load
    lab.monkeypatch.setattr(
        run_module, "load", lambda *a, download, **k: (asked.append(download), load(*a, **k))[1]
    )
    lab.start()
    lab.start(download=True)
    assert asked == [False, True]


def check_image_size(lab):
    assert [next(lab.start(image_size=s).batches.epoch(0))[0].shape[-1] for s in (None, 16)] == [8, 16]


def check_flip(lab):
    assert [lab.start(flip=flip).batches.augment.flip for flip in (None, True, False)] == [True, True, False]


def check_workers(lab):
    for part in ("train", "test"):
        for label in ("ant", "bee"):
            folder = lab.tmp_path / "photos" / part / label
            folder.mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (20, 20), (40 * i, 0, 0)).save(folder / f"{i}.png")
    options = {"dataset": "imagefolder", "data_root": lab.tmp_path / "photos", "image_size": 8}
    assert [lab.start(**options, workers=w).batches._reader._workers for w in (0, 1)] == [0, 1]


def check_seed(lab):
    first, again, other = (lab.start(seed=seed) for seed in (1, 1, 2))
    images = [next(run.batches.epoch(0))[0] for run in (first, again, other)]
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])
    weights = [run.network.classifier.weight for run in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def check_device(lab):
    assert lab.start(device="cpu").batches.device == torch.device("cpu")
    with pytest.raises(ConfigError, match="device: 'cuda:99' cannot be used"):
        lab.start(device="cuda:99")


def check_threads(lab):
    asked = []
    lab.monkeypatch.setattr(torch, "set_num_threads", asked.append)
    lab.finish(epochs=1, threads=3)
    assert asked == [3]


def check_memory_format(lab):
    for name, layout in (("channels_last", torch.channels_last), ("contiguous", torch.contiguous_format)):
        run = lab.start(memory_format=name)
        stem = next(m for m in run.network.modules() if isinstance(m, torch.nn.Conv2d)).weight
        for tensor in (stem, next(run.batches.epoch(0))[0]):
            assert tensor.is_contiguous(memory_format=layout)
            assert not tensor.is_contiguous(
                memory_format=torch.contiguous_format if name == "channels_last" else torch.channels_last
            )


def check_epochs(lab):
    """Of both commands."""
    for n in (1, 3):
        assert len((lab.finish(epochs=n) / "metrics.jsonl").read_text().splitlines()) == n


def check_checkpoint_minutes(lab):
    saved = []
    lab.monkeypatch.setattr(RunFolder, "save", lambda self, state, name="": saved.append(state["step"]))
    lab.start(epochs=1, checkpoint_minutes=60.0).run()
    steps = set(saved)
    saved.clear()
    run = lab.start(epochs=1, checkpoint_minutes=1e-9)
    run.run()
    assert steps - {len(run.batches)} == {0}
    assert set(saved) == set(range(len(run.batches) + 1))


def check_keep_checkpoints(lab):
    folder = lab.finish(epochs=5, keep_checkpoints=2)
    assert sorted(p.name for p in folder.glob("checkpoint*")) == [
        "checkpoint.epoch-4.pt", "checkpoint.epoch-5.pt", "checkpoint.previous.pt", "checkpoint.pt"
    ]  # fmt: skip
    commands = {"search": (SearchConfig, search_opened), "train": (TrainConfig, train_opened)}
    assert check_folder(folder, commands).sound
    kept = (folder / "checkpoint.epoch-4.pt").read_bytes()
    (folder / "checkpoint.epoch-4.pt").write_bytes(kept[:-9])
    assert "checkpoint.epoch-4.pt" in str(check_folder(folder, commands))
    assert not check_folder(folder, commands).sound
    (folder / "checkpoint.epoch-4.pt").write_bytes(kept)
    last = (folder / "checkpoint.pt").read_bytes()
    assert last == (folder / "checkpoint.epoch-5.pt").read_bytes()
    # back by an epoch
    shutil.copy(folder / "checkpoint.epoch-4.pt", folder / "checkpoint.pt")
    lab.finish(out=folder, epochs=5)
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["epoch"] == 5
    lab.finish(out=folder, epochs=1, restart=True)
    assert not list(folder.glob("checkpoint.epoch*"))
    assert (folder / "before-restart-1" / "checkpoint.epoch-5.pt").exists()


def check_sync_batch_norm(lab):
    for wanted in (False, True):
        network = lab.start(sync_batch_norm=wanted).network
        norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        assert norms
        assert {isinstance(m, SynchronisedBatchNorm2d) for m in norms} == {wanted}


def check_grad_accum_steps(lab):
    """See tests/runs/test_grad_accum.py for what it computes."""
    counts = []
    for wanted in (1, 2):
        run = lab.start(grad_accum_steps=wanted)
        calls = []
        run.network.register_forward_pre_hook(lambda module, args, calls=calls: calls.append(len(args[0])))
        run.train_step(*next(run.batches.epoch(0)))
        assert set(calls) == {4 // wanted}
        counts.append(len(calls))
    assert counts[1] == 2 * counts[0]


def check_time_limit_minutes(lab):
    lab.start(time_limit_minutes=60.0, epochs=1).run()
    run = lab.start(time_limit_minutes=1e-9)
    with pytest.raises(Stopped) as stopped:
        run.run()
    assert stopped.value.code == 75
    assert (run.epoch, run.step) == (0, 1)
    assert "step 1" in run.folder.last_saved


def check_tensorboard(lab):
    pytest.importorskip("tensorboard")
    assert list((lab.finish(epochs=1, tensorboard=True) / "tensorboard").glob("events*"))
    assert not (lab.finish(epochs=1, out=lab.tmp_path / "without") / "tensorboard").exists()
