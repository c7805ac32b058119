"""A run that ends before a step, and would go on from its checkpoint."""

from contextlib import contextmanager

import pytest


class Interrupt(Exception):
    pass


@contextmanager
def interrupted_before(run_class, epoch, step):
    """The block must raise: the run's step number `step` of `epoch` is not taken."""
    take_step = run_class.train_step

    def train_step(run, *batch):
        if (run.epoch, run.step) == (epoch, step):
            raise Interrupt
        take_step(run, *batch)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupt):
        patch.setattr(run_class, "train_step", train_step)
        yield
