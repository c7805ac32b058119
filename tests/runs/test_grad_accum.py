"""Gradient accumulation: what is a mean over images is the whole batch's, in however many micro-batches."""

import pytest
import torch
from interrupted import interrupted_before
from same_run import assert_same_run

from rfdarts_fast.retrain import train
from rfdarts_fast.retrain.run import TrainRun, read_genotype
from rfdarts_fast.runs.micro_batches import micro_batch_count, micro_batch_size, micro_batches
from rfdarts_fast.runs.run import load_data
from rfdarts_fast.runs.run_folder import RunFolder
from rfdarts_fast.search import search
from rfdarts_fast.search.architect import Architect, Portion
from rfdarts_fast.search.run import SearchRun

# batches of seven images: micro-batches of 3, 2 and 2; in an epoch of 24 (search: 12) one of 3 (5) is left
SIZES = {"batch_size": 7, "grad_accum_steps": 3}


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [7, 8, 64])
def test_no_micro_batch_is_empty_or_larger_than_a_whole_batchs(batch_size, processes):
    for steps in range(1, batch_size // processes + 1):
        assert micro_batch_count(batch_size, batch_size, steps, processes) == steps
        for size in range(processes, batch_size + 1):
            count = micro_batch_count(size, batch_size, steps, processes)
            parts = [size * (k + 1) // processes - size * k // processes for k in range(processes)]
            assert 1 <= count <= min(parts)
            if processes == 1:
                assert -(-size // count) <= micro_batch_size(batch_size, steps)


def test_micro_batches_are_the_batch():
    batch = torch.arange(14.0).view(7, 2), torch.arange(7)
    parts, shares = zip(*micro_batches(batch, 3), strict=True)
    assert [len(labels) for _, labels in parts] == [3, 2, 2]
    assert shares == (3 / 7, 2 / 7, 2 / 7)
    for whole, of_parts in zip(batch, zip(*parts, strict=True), strict=True):
        assert torch.equal(torch.cat(of_parts), whole)


def assert_close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def started(command, tiny_search, tiny_train, **changes):
    if command == "search":
        config = tiny_search(space="s2", layers=2, **changes)
        run = SearchRun(config, load_data(config), RunFolder(config.out, "search", config))
    else:
        config = tiny_train(label_smoothing=0.1, **changes)
        genotype, folder = read_genotype(config.genotype), RunFolder(config.out, "train", config)
        run = TrainRun(config, genotype, load_data(config), folder)
    run.network.double().eval()
    return run


@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize("normalised_by", ["running statistics", "its own statistics"])
def test_gradients_are_those_of_the_whole_batch(tiny_search, tiny_train, order, normalised_by):
    """In float64, where BatchNorm has running statistics; by its own, each micro-batch has others."""
    run = started("search", tiny_search, tiny_train)
    network = run.network.train(normalised_by != "running statistics")
    train, val = ((torch.randn(7, 3, 8, 8, dtype=torch.float64), torch.randint(4, (7,))) for _ in range(2))
    architect = Architect(network, run.weight_optimizer, order)
    whole, sums = architect.gradients(train, val)
    parts, sums_of_parts = architect.gradients(train, val, (Portion(1.0, 3), Portion(1.0, 2)))
    if normalised_by == "running statistics":
        # of the second order a difference over 2e-2 / |direction|
        scale = 1 if order == "first" else 1e-3
        assert_close([scale * grad for grad in parts], [scale * grad for grad in whole])
        assert_close(sums_of_parts, sums)
    else:
        with pytest.raises(AssertionError):
            assert_close(parts, whole)


@pytest.mark.parametrize("command", ["search", "search-one-level", "train"])
def test_steps_are_those_of_the_whole_batch(command, tiny_search, tiny_train, tmp_path):
    """A whole epoch of steps, its last and smaller batch included: as many, and to the same weights."""
    changes = {"levels": 1} if command == "search-one-level" else {}
    runs = [
        started(command.split("-")[0], tiny_search, tiny_train, out=tmp_path / str(n), **changes,
                batch_size=7, grad_accum_steps=n, learning_rate=0.1)
        for n in (1, 3)
    ]  # fmt: skip
    for run in runs:
        steps = 0
        for images, labels in run.batches.epoch(0):
            if command == "search":
                # the other half's images come in float32, too
                run._val_stream = ((x.double(), y) for x, y in run.val_batches.stream(steps))
            run.train_step(images.double(), labels)
            steps += 1
        assert steps == len(run.batches) == (4 if command == "train" else 2)
    for a, b in zip(*(run.agreed() for run in runs), strict=True):
        assert_close(a, b)
    assert_close(runs[0].meter.sums, runs[1].meter.sums)


def test_a_micro_batch_is_all_that_is_computed_at_a_time(tiny_search, tiny_train, monkeypatch):
    for config, command in ((tiny_search(**SIZES, epochs=1), search), (tiny_train(**SIZES, epochs=1), train)):
        seen = []
        hook = torch.nn.modules.module.register_module_forward_pre_hook(
            lambda module, args, seen=seen: seen.append(len(args[0])) if hasattr(module, "stem") else None
        )
        try:
            command(config.__class__(**{**vars(config), "out": config.out / command.__name__}))
        finally:
            hook.remove()
        # before the run the network is tried on one and two images
        assert max(seen) == 3


@pytest.mark.parametrize("command", ["search", "train"])
def test_interrupted_and_resumed(command, tiny_search, tiny_train, tmp_path):
    make, go = (tiny_search, search) if command == "search" else (tiny_train, train)
    run_class = SearchRun if command == "search" else TrainRun
    # noise and drop path draw a number for each micro-batch
    changes = {**SIZES, "checkpoint_minutes": 1e-9, "learning_rate": 0.1}
    changes |= {"space": "s4"} if command == "search" else {"drop_path": 0.5}
    whole, config = (make(**changes, out=tmp_path / name) for name in ("whole", "resumed"))
    go(whole)
    with interrupted_before(run_class, 1, 1):
        go(config)
    go(config)
    assert_same_run(config.out, whole.out)
