"""Every option of `rfdarts train` has an effect on what it names: a field without a check here fails."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import pytest
import run_options
import torch
from torch import nn

from rfdarts_fast.cli import parse_config
from rfdarts_fast.nn.derived import Cell
from rfdarts_fast.ops import use_backend
from rfdarts_fast.retrain import PRESETS, TrainConfig, train
from rfdarts_fast.retrain import run as train_module
from rfdarts_fast.retrain.config import preset_values
from rfdarts_fast.retrain.run import TrainRun, load_network, read_genotype
from rfdarts_fast.runs.config import ConfigError
from rfdarts_fast.runs.run import RunFailed, load_data
from rfdarts_fast.runs.run_folder import RunFolder

NASBENCH201 = "|skip_connect~0|+|none~0|nor_conv_1x1~1|+|nor_conv_1x1~0|nor_conv_3x3~1|none~2|"
AUXILIARY = {"auxiliary": True, "image_size": 32, "layers": 3}

pytestmark = pytest.mark.usefixtures("without_onednn")


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


def check_batch_size(lab):
    run = lab.start(batch_size=8)
    assert (len(run.batches), len(run.test_batches)) == (3, 2)


def check_learning_rate(lab):
    assert rates(lab, learning_rate=0.2, epochs=1) == pytest.approx([0.2])


def check_learning_rate_min(lab):
    assert rates(lab, learning_rate=0.2, learning_rate_min=0.1) == pytest.approx([0.2, 0.15])


def check_learning_rate_warmup_epochs(lab):
    assert rates(lab, learning_rate=0.2, learning_rate_warmup_epochs=2) == pytest.approx([0.1, 0.2])


def check_learning_rate_scaling(lab):
    # batches of 24 images
    changes = {"learning_rate": 0.2, "learning_rate_min": 0.1, "base_batch_size": 96}
    for scaling, factor in (("none", 1), ("linear", 1 / 4), ("sqrt", 1 / 2)):
        expected = [0.2 * factor, 0.15 * factor]
        assert rates(lab, **changes, learning_rate_scaling=scaling) == pytest.approx(expected)


def check_base_batch_size(lab):
    changes = {"learning_rate": 0.2, "epochs": 1, "learning_rate_scaling": "linear"}
    assert [rates(lab, **changes, base_batch_size=n)[0] for n in (12, 48)] == pytest.approx([0.4, 0.1])
    for name, values in PRESETS.items():
        assert lab.parse("--preset", name).base_batch_size == values.get("batch_size", 96)


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


def check_max_multiply_adds(lab):
    # DARTS_V2 with 4 channels and one cell on 8 x 8 pixels
    lab.finish(max_multiply_adds=1.0, epochs=1)
    with pytest.raises(ConfigError, match=r"network below 0\.001 million, got 0\.0\d* with 4 channels"):
        lab.finish(max_multiply_adds=0.001)


def check_auto_width(lab):
    """The published count of PC_DARTS_image, and the widest network below it; see method.md."""
    wanted = lab.parse("--preset", "pc-darts-imagenet", "--genotype", "PC_DARTS_image")
    genotype = read_genotype("PC_DARTS_image")

    def channels(**changes):
        return train_module.fitted(dataclasses.replace(wanted, **changes), genotype, 1000, 224).channels

    assert channels() == 48
    with pytest.raises(
        ConfigError, match=r"below 580 million, got 581\.6 with 48 channels \(--auto-width takes 46"
    ):
        channels(max_multiply_adds=580.0)
    assert channels(max_multiply_adds=580.0, auto_width=True) == 46
    assert channels(max_multiply_adds=600.0, auto_width=True) == 48
    with pytest.raises(ConfigError, match="no width stays below it"):
        channels(max_multiply_adds=0.1, auto_width=True)


def check_ema_decay(lab):
    """The average of what PyTorch's own gives; it is tested, kept and loaded."""
    folder = lab.finish(ema_decay=0.9, epochs=2)
    state = torch.load(folder / "best.pt", weights_only=True)
    record = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][-1]
    assert {"test", "without_ema"} <= record.keys()
    assert state["ema"]["n_averaged"] == 6 * state["epoch"] or state["ema"]["n_averaged"] % 6 == 0
    _, network, _ = load_network(folder)
    name, weight = next(iter(network.state_dict().items()))
    assert torch.equal(weight, state["ema"][f"module.{name}"])
    assert not torch.equal(weight, state["network"][name])
    run, values = lab.start(ema_decay=0.5), []
    average = run.network.classifier.weight.detach().clone()
    run.optimizer.register_step_post_hook(
        lambda *_: values.append(run.network.classifier.weight.detach().clone())
    )
    for images, labels in run.batches.epoch(0):
        run.train_step(images, labels)
        # the first is taken as it is
        average = values[0] if len(values) == 1 else 0.5 * average + 0.5 * values[-1]
    torch.testing.assert_close(run.ema.module.classifier.weight, average)


def check_amp(lab):
    for amp in ("off", "bf16"):
        run, seen = lab.start(amp=amp), []
        run.network.classifier.register_forward_hook(lambda m, x, y, seen=seen: seen.append(y.dtype))
        run.train_step(*next(run.batches.epoch(0)))
        assert seen == [torch.bfloat16 if amp == "bf16" else torch.float32]
        assert {p.dtype for p in run.network.parameters()} == {torch.float32}


def check_compile(lab):
    compiled = []
    lab.monkeypatch.setattr(torch, "compile", lambda network: compiled.append(network) or network)
    assert [lab.start(compile=c, drop_path=0.0).network for c in (False, True)][1:] == compiled
    with pytest.raises(ConfigError, match="compile: expected --drop-path 0 beside it, got True"):
        lab.start(compile=True, drop_path=0.1)


def check_evaluate_every(lab):
    lines = (lab.finish(evaluate_every=2, epochs=3) / "metrics.jsonl").read_text().splitlines()
    assert ["test" in json.loads(line) for line in lines] == [False, True, True]


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(TrainConfig)])
def test_option_reaches_what_it_names(field, lab):
    check = globals().get(f"check_{field}") or getattr(run_options, f"check_{field}", None)
    assert check is not None, f"no check of --{field}: add check_{field} here"
    check(lab)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here")
def test_a_compiled_network_computes_the_same(lab):
    """Two steps, the second of another number of images: the losses are those of the network as it is."""
    losses = []
    for compiled in (False, True):
        run = lab.start(compile=compiled, drop_path=0.0, batch_size=16, label_smoothing=0.1)
        with use_backend("reference"):
            for batch in run.batches.epoch(0):
                run.train_step(*batch)
        losses.append(run.meter.sums[0])
    torch.testing.assert_close(*losses, rtol=1e-4, atol=0)


def test_a_network_that_cannot_be_compiled(lab):
    def broken(network):
        def forward(images):
            raise RuntimeError("no compiler\nmore")

        return forward

    lab.monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(RunFailed, match=r"^compile: .* cannot be compiled here: no compiler; the last"):
        lab.finish(compile=True, drop_path=0.0)
