"""The bilevel loop: what trains and what stays, the order of steps, warm-up, rates and clipping."""

import hashlib

import pytest
import torch
from torch import nn

from rfdarts_fast.search import run as search_module

RF = {
    "rf-darts": {"method": "rf-darts", "space": "s1", "layers": 3, "channels": 2},
    "rf-pcdarts": {
        "method": "rf-pcdarts", "space": "s3", "layers": 3, "partial_channels": 2, "edge_norm": True
    },
    "nasbench201": {"method": "rf-darts", "space": "nasbench201"},
}  # fmt: skip


def frozen_tensors(network):
    return {
        f"{name}.{field}": value
        for name, module in network.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
        for field, value in module.named_parameters(recurse=False)
    }


def digest(tensors):
    return {
        name: hashlib.sha256(t.detach().contiguous().numpy().tobytes()).hexdigest()
        for name, t in tensors.items()
    }


@pytest.mark.parametrize("options", RF.values(), ids=RF.keys())
@pytest.mark.parametrize("order", ["first", "second"])
def test_frozen_tensors_are_bit_identical_and_the_rest_moves(start, options, order):
    run = start(**options, order=order, epochs=1, learning_rate_min=0.025, arch_learning_rate=0.01)
    frozen = frozen_tensors(run.network)
    before = digest(frozen)
    others = {
        **{name: p for name, p in run.network.named_parameters() if name not in frozen},
        **run.network.named_arch_parameters(),
    }
    start_values = {name: p.detach().clone() for name, p in others.items()}
    seen = []
    for optimizer in (run.weight_optimizer, run.arch_optimizer):
        optimizer.register_step_pre_hook(
            lambda *_: seen.append([name for name, p in frozen.items() if p.grad is not None])
        )
    run.run()
    assert digest(frozen) == before
    assert seen == [[]] * 6
    assert all(p.grad is None and not p.requires_grad for p in frozen.values())
    unmoved = [name for name, p in others.items() if torch.equal(p, start_values[name])]
    assert not unmoved
    held = {id(p) for group in run.weight_optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in run.network.parameters()} - {id(p) for p in frozen.values()}
    arch = {id(p) for group in run.arch_optimizer.param_groups for p in group["params"]}
    assert arch == {id(p) for p in run.network.arch_parameters()}


def test_darts_trains_the_convolutions(start):
    run = start(method="darts", epochs=1)
    before = digest(frozen_tensors(run.network))
    run.run()
    after = digest(frozen_tensors(run.network))
    assert not [name for name in before if before[name] == after[name]]


@pytest.mark.parametrize("train_classifier", [True, False])
def test_train_classifier(start, train_classifier):
    run = start(train_classifier=train_classifier, epochs=1)
    before = digest(frozen_tensors(run.network))
    run.run()
    after = digest(frozen_tensors(run.network))
    moved = {name for name in before if before[name] != after[name]}
    assert moved == ({"classifier.weight", "classifier.bias"} if train_classifier else set())


@pytest.mark.parametrize("decay", [True, False])
@pytest.mark.parametrize("method", ["darts", "rf-darts"])
def test_decay_of_batch_norm(start, method, decay):
    run = start(method=method, bn_weight_decay=decay, weight_decay=0.5, learning_rate=0.1)
    norms = {p for m in run.network.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    for p in run.architect.weights:
        nn.init.ones_(p)
        p.grad = torch.zeros_like(p)
    run.weight_optimizer.step()
    for p in run.architect.weights:
        value = 1 - 0.1 * 0.5 if decay or p not in norms else 1.0
        assert torch.allclose(p, torch.full_like(p, value))


def record_steps(run):
    """The optimisers' steps in order, as ('weights' | 'arch', norm of the gradient, learning rate)."""
    steps = []
    for name, optimizer in (("weights", run.weight_optimizer), ("arch", run.arch_optimizer)):

        def note(stepping, *_, name=name):
            grads = [p.grad for group in stepping.param_groups for p in group["params"]]
            norm = torch.linalg.vector_norm(torch.cat([g.flatten() for g in grads])).item()
            steps.append((name, norm, stepping.param_groups[0]["lr"]))

        optimizer.register_step_pre_hook(note)
    return steps


@pytest.mark.parametrize(
    ("step_order", "expected"),
    [("arch-first", ["arch", "weights"] * 6), ("weights-first", ["weights", "arch"] * 6)],
)
def test_order_of_steps(start, step_order, expected):
    run = start(step_order=step_order)
    steps = record_steps(run)
    run.run()
    assert [name for name, *_ in steps] == expected


def test_weights_train_on_one_half_and_the_architecture_on_the_other(start, monkeypatch):
    run = start(epochs=1)
    first, second = run.batches.indices.tolist(), run.val_batches.indices.tolist()
    assert (first, second) == (list(range(12)), list(range(12, 24)))
    seen = {}
    for name in ("_weight_step", "_arch_step"):
        method = getattr(run, name)
        monkeypatch.setattr(
            run,
            name,
            lambda *batches, name=name, method=method: (seen.setdefault(name, batches[0]), method(*batches)),
        )
    drawn = []
    gradients = run.architect.gradients
    monkeypatch.setattr(
        run.architect, "gradients", lambda train, val, shares: (drawn.append(val), gradients(train, val))[1]
    )
    run.run()
    expected = next(run.val_batches.stream())
    assert torch.equal(drawn[0][0], expected[0])
    assert torch.equal(drawn[0][1], expected[1])
    assert torch.equal(seen["_weight_step"][0], next(run.batches.epoch(0))[0])
    assert len(drawn) == 3


def test_warm_up_leaves_the_architecture_and_its_images_alone(start, monkeypatch):
    run = start(epochs=3, arch_warmup_epochs=2)
    before = {name: p.detach().clone() for name, p in run.network.named_arch_parameters().items()}
    first_step = []

    def note(step):
        def wrapped(*batches):
            if not first_step:
                first_step.append((run.epoch, run.step, run.val_position))
                same = [
                    torch.equal(p, before[name]) for name, p in run.network.named_arch_parameters().items()
                ]
                assert all(same)
            return step(*batches)

        return wrapped

    monkeypatch.setattr(run, "_arch_step", note(run._arch_step))
    run.run()
    assert first_step == [(2, 0, 0)]
    assert run.val_position == 3
    assert not torch.equal(run.network.alphas, before["alphas"])
    records = run.folder.metrics.read()
    assert [record["arch"]["loss"] is None for record in records] == [True, True, False]


COURSES = {
    # 2 epochs of 3 steps from 0.1 to 0.02
    "per-epoch": ({}, [0.1] * 3 + [0.06] * 3),
    "per-step": ({"schedule_per_step": True}, [0.1, 0.0946410, 0.08, 0.06, 0.04, 0.0253590]),
    "warm-up": (
        {"learning_rate_warmup_epochs": 2, "epochs": 4},
        [0.05] * 3 + [0.1] * 3 + [0.06] * 3 + [0.0317157] * 3,
    ),
    "long-warm-up": ({"learning_rate_warmup_epochs": 4}, [0.025] * 3 + [0.05] * 3),
}


@pytest.mark.parametrize(("options", "rates"), COURSES.values(), ids=COURSES.keys())
def test_learning_rate_of_each_step(start, options, rates):
    run = start(learning_rate=0.1, learning_rate_min=0.02, **options)
    steps = record_steps(run)
    run.run()
    assert [rate for name, _, rate in steps if name == "weights"] == pytest.approx(rates, rel=1e-5)
    assert {rate for name, _, rate in steps if name == "arch"} == {3e-4}


@pytest.mark.parametrize(
    ("options", "name", "largest"),
    [({"grad_clip": 1e-3}, "weights", 1e-3), ({"arch_grad_clip": 1e-6}, "arch", 1e-6)],
    ids=["weights", "arch"],
)
def test_clipping(start, tmp_path, options, name, largest):
    norms = {}
    for out, changes in (("clipped", options), ("free", dict.fromkeys(options, 0.0))):
        run = start(epochs=1, out=tmp_path / out, **changes)
        steps = record_steps(run)
        run.run()
        norms[out] = [norm for stepping, norm, _ in steps if stepping == name]
    assert norms["clipped"] == pytest.approx([largest] * 3, rel=1e-2)
    assert min(norms["free"]) > 2 * largest


def test_published_default_is_no_clipping_of_the_architecture(start, monkeypatch):
    run = start(epochs=1)
    calls = []
    monkeypatch.setattr(search_module, "descend", lambda *a: calls.append(a[-1]))
    for images, labels in run.batches.epoch(0):
        run.train_step(images, labels)
    assert calls == [0.0, 5.0] * 3
