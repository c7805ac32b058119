"""Every option of `rfdarts train` has an effect on what it names: a field without a check here fails."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import run_options
import torch
from torch import nn

from rfdarts_fast.cli import parse_config
from rfdarts_fast.nn.derived import Cell
from rfdarts_fast.retrain import PRESETS, TrainConfig, train
from rfdarts_fast.retrain import run as train_module
from rfdarts_fast.retrain.config import preset_values
from rfdarts_fast.retrain.run import TrainRun, read_genotype
from rfdarts_fast.runs.run import load_data
from rfdarts_fast.runs.run_folder import RunFolder

NASBENCH201 = "|skip_connect~0|+|none~0|nor_conv_1x1~1|+|nor_conv_1x1~0|nor_conv_3x3~1|none~2|"
AUXILIARY = {"auxiliary": True, "image_size": 32, "layers": 3}


@pytest.fixture
def lab(tiny_train, tmp_path, monkeypatch):
    counter = iter(range(1000))

    def config(**changes):
        return tiny_train(**{"out": tmp_path / str(next(counter)), **changes})

    def start(**changes):
        wanted = config(**changes)
        wanted.check()
        folder = RunFolder(wanted.out, "train", wanted)
        return TrainRun(wanted, read_genotype(wanted.genotype), load_data(wanted), folder)

    def finish(**changes):
        wanted = config(**changes)
        train(wanted)
        return wanted.out

    def parse(*args):
        return parse_config(TrainConfig, preset_values, [*args, "--out", "x"], "rfdarts train")

    return SimpleNamespace(
        start=start, finish=finish, parse=parse, tmp_path=tmp_path, monkeypatch=monkeypatch
    )


def rates(lab, **changes):
    """The learning rate of each epoch."""
    run, seen = lab.start(batch_size=24, **changes), []
    run.optimizer.register_step_pre_hook(lambda o, *_: seen.append(o.param_groups[0]["lr"]))
    run.run()
    return seen


def option(lab, name, value):
    return lab.start(**{name: value}).optimizer.param_groups[0][name]


def losses(lab, **changes):
    """Label smoothing of each loss, and total minus main loss over the auxiliary loss, in one step."""
    run, values = lab.start(**AUXILIARY, **changes), []
    cross_entropy = torch.nn.functional.cross_entropy

    def note(logits, labels, label_smoothing=0.0):
        values.append((label_smoothing, cross_entropy(logits, labels, label_smoothing=label_smoothing)))
        return values[-1][1]

    totals, backward = [], torch.Tensor.backward
    lab.monkeypatch.setattr(train_module.F, "cross_entropy", note)
    lab.monkeypatch.setattr(torch.Tensor, "backward", lambda t: (totals.append(t), backward(t)))
    run.train_step(*next(run.batches.epoch(0)))
    (first, main), (second, auxiliary) = values
    return {first, second}, ((totals[0] - main) / auxiliary).item()


def check_genotype(lab):
    run = lab.start(genotype="DARTS_V1")
    other = lab.start(genotype="PC_DARTS_cifar")
    assert run.network.cells[0].indices != other.network.cells[0].indices
    assert len(lab.start(genotype=NASBENCH201, drop_path=0.0).network.cells) == 5


def check_preset(lab):
    assert lab.parse("--preset", "quick").epochs == PRESETS["quick"]["epochs"]
    assert lab.parse("--preset", "imagenet").stem == "imagenet"


def check_channels(lab):
    assert [lab.start(channels=c).network.stem[0].out_channels for c in (4, 8)] == [12, 24]


def check_layers(lab):
    assert [len(lab.start(layers=n).network.cells) for n in (1, 2)] == [1, 2]


def check_cells_per_stage(lab):
    options = {"genotype": NASBENCH201, "drop_path": 0.0}
    assert [len(lab.start(**options, cells_per_stage=n).network.cells) for n in (1, 2)] == [5, 8]


def check_stem(lab):
    assert hasattr(lab.start(stem="imagenet", image_size=32).network, "stem1")


def check_auxiliary(lab):
    heads = [lab.start(**{**AUXILIARY, "auxiliary": on}).network.auxiliary_head for on in (True, False)]
    assert isinstance(heads[0], nn.Module)
    assert heads[1] is None


def check_auxiliary_weight(lab):
    assert losses(lab, auxiliary_weight=0.7)[1] == pytest.approx(0.7, rel=1e-4)


def check_label_smoothing(lab):
    assert losses(lab, label_smoothing=0.2)[0] == {0.2}


def check_drop_path(lab):
    seen, forward = [], Cell.forward
    lab.monkeypatch.setattr(
        Cell, "forward", lambda self, *a: (seen.append((self.training, a[-1])), forward(self, *a))[1]
    )
    lab.finish(drop_path=0.4, epochs=4, batch_size=24)
    # the first cell runs once before training, to try the image size
    probabilities = [probability for training, probability in seen if training][1:]
    assert probabilities == pytest.approx([0.0, 0.1, 0.2, 0.3])


def check_epochs(lab):
    for n in (1, 3):
        assert len((lab.finish(epochs=n) / "metrics.jsonl").read_text().splitlines()) == n


def check_batch_size(lab):
    run = lab.start(batch_size=8)
    assert (len(run.batches), len(run.test_batches)) == (3, 2)


def check_learning_rate(lab):
    assert rates(lab, learning_rate=0.2, epochs=1) == pytest.approx([0.2])


def check_learning_rate_min(lab):
    assert rates(lab, learning_rate=0.2, learning_rate_min=0.1) == pytest.approx([0.2, 0.15])


def check_learning_rate_warmup_epochs(lab):
    assert rates(lab, learning_rate=0.2, learning_rate_warmup_epochs=2) == pytest.approx([0.1, 0.2])


def check_schedule(lab):
    assert rates(lab, learning_rate=0.2, schedule="linear", epochs=7)[:3] == pytest.approx([0.2, 0.1, 0.1])
    assert rates(lab, learning_rate=0.2, schedule="constant") == pytest.approx([0.2, 0.2])


def check_learning_rate_decay(lab):
    changes = {"schedule": "step", "learning_rate_decay": 0.5, "learning_rate": 0.2}
    assert rates(lab, **changes, epochs=3) == pytest.approx([0.2, 0.1, 0.05])


def check_momentum(lab):
    assert option(lab, "momentum", 0.7) == 0.7


def check_nesterov(lab):
    assert [option(lab, "nesterov", on) for on in (False, True)] == [False, True]


def check_weight_decay(lab):
    assert option(lab, "weight_decay", 0.3) == 0.3


def check_grad_clip(lab):
    norms = {}
    for clip in (1e-3, 0.0):
        run = lab.start(grad_clip=clip)
        grads = norms.setdefault(clip, [])
        run.optimizer.register_step_pre_hook(
            lambda o, *_, grads=grads: grads.append(
                torch.cat([p.grad.flatten() for p in o.param_groups[0]["params"]]).norm().item()
            )
        )
        run.train_step(*next(run.batches.epoch(0)))
    assert norms[1e-3] == pytest.approx([1e-3], rel=1e-2)
    assert norms[0.0][0] > 2e-3


def check_cutout(lab):
    run = lab.start(cutout=3)
    assert [batches.augment.cutout for batches in (run.batches, run.test_batches)] == [3, 0]


def check_colour_jitter(lab):
    run = lab.start(colour_jitter=True)
    assert dataclasses.astuple(run.batches.augment.jitter) == (0.4, 0.4, 0.4, 0.2)
    assert run.test_batches.augment.jitter is None
    assert lab.start().batches.augment.jitter is None


def check_evaluate_every(lab):
    lines = (lab.finish(evaluate_every=2, epochs=3) / "metrics.jsonl").read_text().splitlines()
    assert ["test" in json.loads(line) for line in lines] == [False, True, True]


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(TrainConfig)])
def test_option_reaches_what_it_names(field, lab):
    check = globals().get(f"check_{field}") or getattr(run_options, f"check_{field}", None)
    assert check is not None, f"no check of --{field}: add check_{field} here"
    check(lab)
