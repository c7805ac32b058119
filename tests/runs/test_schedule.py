"""Learning rates against literal tables of the published schedules."""

import pytest
import torch

from rfdarts_fast.runs.schedule import learning_rate


@pytest.mark.parametrize(
    ("epochs", "initial", "final"), [(50, 0.025, 0.001), (50, 0.1, 0.0), (600, 0.025, 0.0), (1, 0.1, 0.0)]
)
def test_cosine_is_torchs(epochs, initial, final):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=initial)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, eta_min=final)
    for epoch in range(epochs):
        rate = learning_rate("cosine", epoch, epochs, initial, final)
        assert rate == pytest.approx(scheduler.get_last_lr()[0], rel=1e-6, abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_cosine_within_an_epoch():
    assert learning_rate("cosine", 0.5, 1, 1.0, 0.0) == pytest.approx(0.5)
    assert learning_rate("cosine", 12.5, 50, 0.1, 0.0) == pytest.approx(0.0853553390593)


def test_pc_darts_imagenet_search():
    """yuhuixu1993/PC-DARTS train_search_imagenet.py: five epochs of warm-up, then the cosine."""
    rates = [learning_rate("cosine", epoch, 50, 0.5, 0.0, warmup_epochs=5) for epoch in range(50)]
    assert rates[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert rates[5] == pytest.approx(0.487764, rel=1e-5)
    assert rates[25] == pytest.approx(0.25)


def test_pc_darts_imagenet_training():
    """train_imagenet.py `adjust_lr`: linear, the last five of 250 epochs with a gentler slope."""

    def adjust_lr(epoch):
        if epoch < 5:
            return 0.5 * (epoch + 1) / 5.0
        if 250 - epoch > 5:
            return 0.5 * (250 - 5 - epoch) / (250 - 5)
        return 0.5 * (250 - epoch) / ((250 - 5) * 5)

    rates = [learning_rate("linear", epoch, 250, 0.5, warmup_epochs=5) for epoch in range(250)]
    assert rates == pytest.approx([adjust_lr(epoch) for epoch in range(250)])
    assert rates[245:] == pytest.approx([0.5 * k / 1225 for k in (5, 4, 3, 2, 1)])
    assert min(rates) > 0


@pytest.mark.parametrize("epochs", [1, 3, 5, 6])
def test_linear_of_a_short_training_stays_positive_and_falls(epochs):
    rates = [learning_rate("linear", epoch, epochs, 1.0) for epoch in range(epochs)]
    assert all(0 < rate <= 1 for rate in rates)
    assert rates == sorted(rates, reverse=True)


def test_step():
    """quark0/darts train_imagenet.py: StepLR of gamma 0.97 each epoch."""
    rates = [learning_rate("step", epoch, 250, 0.1, decay=0.97) for epoch in range(3)]
    assert rates == pytest.approx([0.1, 0.097, 0.09409])


def test_constant():
    assert {learning_rate("constant", epoch, 10, 0.3) for epoch in range(10)} == {0.3}


def test_unknown():
    with pytest.raises(ValueError, match="schedule: expected cosine"):
        learning_rate("exponential", 0, 1, 0.1)
