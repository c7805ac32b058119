"""A search on the kernels is one on the reference: the same losses over 20 steps, the same genotype."""

import itertools

import pytest
import torch

from rfdarts_fast.ops import backends, use_backend

STEPS = 20
METHODS = {
    "rf-darts": {"method": "rf-darts", "channels": 4},
    "rf-pcdarts": {"method": "rf-pcdarts", "channels": 8, "partial_channels": 4, "edge_norm": True},
}


@pytest.mark.skipif(not backends()["cpu"].status()["built"], reason="needs the compiled CPU kernels")
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_twenty_steps(start, tmp_path, method):
    def losses_and_genotype(backend, dtype):
        losses = []
        with use_backend(backend):
            run = start(
                **method,
                space="darts",
                dataset="digits",
                data_root=None,
                layers=3,
                batch_size=8,
                epochs=1,
                arch_warmup_epochs=0,
                out=tmp_path / f"{backend}-{dtype}",
            )
            run.network.to(dtype)
            run._val_stream = ((images.to(dtype), labels) for images, labels in run._val_stream)
            step_gradients = run.architect.step_gradients

            def noted(*args):
                grads, sums = step_gradients(*args)
                losses.append(float(sums[0] / sums[3]))
                return grads, sums

            run.architect.step_gradients = noted
            for images, labels in itertools.islice(run.batches.epoch(0), STEPS):
                run.train_step(images.to(dtype), labels)
        assert len(losses) == 2 * STEPS
        return losses, run.network.genotype()

    truth, genotype = losses_and_genotype("reference", torch.float64)
    losses, searched = losses_and_genotype("cpu", torch.float64)
    assert losses == pytest.approx(truth, rel=1e-9)
    assert searched == genotype

    # Adam turns the signs of gradients of no size into steps, so that rounding decides between equal
    # operations, in the reference too, whose own losses are the measure then
    def gaps(backend):
        return (torch.tensor(losses_and_genotype(backend, torch.float32)[0]) / torch.tensor(truth) - 1).abs()

    ours = gaps("cpu")
    assert ours[:2].max() < 1e-5
    assert ours.max() <= 2e-3 or ours.max() <= 2 * gaps("reference").max()
