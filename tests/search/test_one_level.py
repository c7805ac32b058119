"""`--levels 1`: one backward pass on a training batch moves weights and architecture."""

import json

import torch

from rfdarts_fast.search import search


def test_both_move_along_the_gradients_of_one_pass(start):
    run = start(levels=1)
    batch = next(run.batches.epoch(0))
    loss, _ = run.architect.loss(batch)
    expected = torch.autograd.grad(loss, [*run.architect.weights, *run.architect.arch])
    seen, passes = {}, []
    for optimizer in (run.weight_optimizer, run.arch_optimizer):
        optimizer.register_step_pre_hook(
            lambda o, *_: seen.update({p: p.grad.clone() for g in o.param_groups for p in g["params"]})
        )
    run.network.register_forward_hook(lambda *_: passes.append(1))
    run.train_step(*batch)
    assert passes == [1]
    # the weights' gradient is clipped to norm 5
    norm = torch.linalg.vector_norm(torch.cat([g.flatten() for g in expected[:-1]]))
    factor = min(1.0, 5.0 / float(norm))
    for parameter, grad in zip(run.architect.weights, expected, strict=False):
        torch.testing.assert_close(seen[parameter], factor * grad)
    torch.testing.assert_close(seen[run.architect.arch[0]], expected[-1])


def test_images_that_are_used(start, tiny_search):
    run = start(levels=1, epochs=1)
    run._val_stream = iter(())
    run.run()
    assert run.val_position == 0
    record = json.loads((run.folder.path / "metrics.jsonl").read_text())
    assert record["arch"]["loss"] is None
    assert record["train"]["loss"] > 0 and record["val"]["loss"] > 0
    assert record["alpha_gradient"]["cell"]["nor_conv_3x3"] > 0


def test_warm_up_moves_the_weights_alone(tiny_search):
    config = tiny_search(levels=1, epochs=2, arch_warmup_epochs=1)
    search(config)
    first, second = map(json.loads, (config.out / "alphas.jsonl").read_text().splitlines())
    assert first["alphas"] != second["alphas"]
    gradients = [
        json.loads(line)["alpha_gradient"] for line in (config.out / "metrics.jsonl").read_text().splitlines()
    ]
    assert gradients[0] is None and gradients[1]["cell"]["none"] > 0
