"""A run whose loss or gradient is no longer a number stops at that step and names it."""

import pytest
import torch
from same_run import assert_same_run
from torch.utils._python_dispatch import TorchDispatchMode

from rfdarts_fast.runs.run import Diverged
from rfdarts_fast.runs.watch import Watch
from rfdarts_fast.search import PRESETS, SearchConfig, search
from rfdarts_fast.search.architect import Architect

TINY = {"channels": 4, "layers": 2, "image_size": 8, "batch_size": 512, "epochs": 2, "arch_warmup_epochs": 1}


def start(folder, **changes):
    search(SearchConfig(out=folder, **{**PRESETS["quick"], **TINY, **changes}))


def test_a_search_that_diverges_stops(tmp_path, monkeypatch):
    cross_entropy = torch.nn.functional.cross_entropy
    monkeypatch.setattr(
        "rfdarts_fast.search.architect.F.cross_entropy", lambda *a: cross_entropy(*a) * float("nan")
    )
    saved = f"the last good state is {tmp_path}/run/checkpoint.pt, epoch 0, step 0"
    with pytest.raises(Diverged, match=f"^loss: became NaN or infinite in epoch 0, step 0; {saved}"):
        start(tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("levels", "name"),
    [(2, "validation loss"), (2, "the gradient of alphas_normal"), (1, "the gradient of betas_normal")],
)
def test_the_first_bad_tensor_is_named(tmp_path, monkeypatch, levels, name):
    """Of the first step of the second epoch; then the same command goes on from the epoch's beginning."""
    step_gradients, calls = Architect.step_gradients, []

    def spoiled(self, batch, parameters, share=1.0):
        grads, sums = step_gradients(self, batch, parameters, share)
        calls.append(parameters)
        # after two steps of warm-up
        if len(calls) == 3 and name == "validation loss":
            sums[0] = float("inf")
        elif len(calls) == 3:
            names = [f"the gradient of {n}" for n in self.network.named_arch_parameters()]
            grads[names.index(name) - len(names)][0] = float("nan")
        return grads, sums

    start(tmp_path / "whole", levels=levels)
    with monkeypatch.context() as patch:
        patch.setattr(Architect, "step_gradients", spoiled)
        with pytest.raises(
            Diverged, match=f"^{name}: became NaN or infinite in epoch 1, step 0; .*epoch 1, step 0"
        ):
            start(tmp_path / "run", levels=levels)
    start(tmp_path / "run", levels=levels)
    assert_same_run(tmp_path / "run", tmp_path / "whole", unlike={"checkpoint.previous.pt"})


class NeverAsked(TorchDispatchMode):
    """Fails where a value is read on the host, which a recorded CUDA graph cannot do."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return function(*args, **(kwargs or {}))


def test_a_watch_notes_the_first_bad_step_without_being_asked():
    watch = Watch(torch.device("cpu"), ["loss", "a", "b"], ["other", "c"])
    good, bad = torch.ones(3), torch.tensor([1.0, float("inf"), 0.0])
    steps = [
        (0, good[0], [good, good]),
        (1, good[0], [good]),
        (0, good[0], [good, bad]),
        (0, bad[1], [bad, bad]),
    ]
    found = []
    for which, loss, grads in steps:
        with NeverAsked():
            watch.see(which, loss, grads)
        found.append(watch.end_step())
    assert found == [None, None, (2, "b"), (2, "b")]
    with pytest.raises(AssertionError), NeverAsked():
        good[0].item()
