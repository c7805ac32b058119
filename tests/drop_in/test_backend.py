"""The compiled CPU backend takes every frozen network of the DARTS family, and only those."""

import pytest
import torch
from torch import nn

import rfdarts_fast
from rfdarts_fast.ops import BackendError, backends, use_backend

from . import forks
from .common import MODULES, batch, drop_in_network, foreign_network
from .test_accelerate import NETWORKS

pytestmark = pytest.mark.skipif(
    not backends()["cpu"].status()["built"],
    reason="the compiled kernels are not built here",
)


@pytest.fixture(autouse=True)
def cpu_only():
    with use_backend("cpu"):
        yield


@pytest.mark.parametrize("name", MODULES)
def test_takes_the_drop_in_networks(name):
    network = drop_in_network(name, 4, 3, steps=2, multiplier=2)
    network._loss(*batch(name, torch.float32)).backward()
    network.eval()(batch(name, torch.float32)[0])


@pytest.mark.parametrize("name", ["quark0", "PC-DARTS K=2", "RobustDARTS S1", "RobustDARTS S3"])
def test_takes_accelerated_networks(name):
    network = NETWORKS[name]()
    rfdarts_fast.accelerate(network)
    x, y = batch("pc_darts_imagenet" if "ImageNet" in name else "darts", torch.float32)
    nn.functional.cross_entropy(network(x), y).backward()
    network.eval()(x)


def test_is_asked_for_whole_cells(monkeypatch):
    calls = []
    backend = backends()["cpu"]
    mixed_cell = backend.mixed_cell

    def spy(call):
        calls.append((len(call.plan.edges), len(call.inputs)))
        return mixed_cell(call)

    monkeypatch.setattr(backend, "mixed_cell", spy)
    small = {"steps": 2, "multiplier": 2}
    ours, theirs = drop_in_network("pc_darts", 4, 3, **small), foreign_network("pc_darts", 4, 3, **small)
    rfdarts_fast.accelerate(theirs)
    for network in (ours, theirs):
        calls.clear()
        network(batch("pc_darts", torch.float32)[0])
        assert calls == [(5, 2)] * 3


def test_trainable_convolutions_stay_on_the_reference():
    network = drop_in_network("darts", 4, 3, random_features=False)
    with pytest.raises(BackendError, match="a convolution is trained"):
        network(batch("darts", torch.float32)[0])
    with use_backend("auto"):
        network(batch("darts", torch.float32)[0])


def test_noise():
    names = (("noise", "sep_conv_3x3"),) * 5
    primitives = {"normal": names, "reduce": names}
    network = forks.RobustNetwork(4, 10, 3, None, 2, 2, primitives=primitives)
    rfdarts_fast.accelerate(network)
    x = batch("darts", torch.float32)[0]
    assert network(x).isfinite().all() and not torch.equal(network(x), network(x))
