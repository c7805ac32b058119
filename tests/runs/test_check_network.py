"""A network is tried before a run: on the CPU, and with a backend asked for by name on the run's device."""

import pytest
import torch

from rfdarts_fast.ops import BackendError, use_backend
from rfdarts_fast.runs.run import check_network


@pytest.mark.parametrize("name", ["auto", "reference", "cpu"])
def test_where_a_network_is_tried(name):
    tried = []

    class Network(torch.nn.Module):
        def forward(self, x):
            tried.append((use_backend.name, x.device.type))

    with use_backend(name):
        check_network(Network, 2, [4], 8, torch.device("meta"))
    # a backend for GPUs alone would refuse the CPU's tensors
    named = [("cpu", "meta")] if name == "cpu" else []
    assert tried == [("reference", "cpu"), *named]


def test_a_named_backend_that_cannot_run_raises():
    class Network(torch.nn.Module):
        def forward(self, x):
            if use_backend.name == "triton":
                raise BackendError("triton cannot run")

    with use_backend("triton"), pytest.raises(BackendError):
        check_network(Network, 2, [4], 8, torch.device("cpu"))
