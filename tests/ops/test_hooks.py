"""Hooks on modules inside a cell, which kernels do not call, fire all the same."""

import pytest
import torch

from rfdarts_fast import ops
from rfdarts_fast.nn import SearchNetwork, freeze_random_features
from rfdarts_fast.spaces import uniform_space

PATHS = [
    "cells.0._ops.0",
    "cells.0._ops.1._ops.1",
    "cells.0._ops.0._ops.1.op.1",
    "cells.0.preprocess0.op.0",
    "cells.0.preprocess1.op.2",
    "cells.1.preprocess1",
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.filterwarnings("ignore:mixed ops run on the slow PyTorch reference")
def test_a_hook_fires_once_and_changes_nothing(path):
    network = SearchNetwork(uniform_space("few", ("max_pool_3x3", "sep_conv_3x3"), 2), C=4, layers=2).double()
    freeze_random_features(network)
    x, calls = torch.randn(2, 3, 8, 8, dtype=torch.double), []
    expected = network(x)
    handle = network.get_submodule(path).register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(network(x), expected, rtol=1e-9, atol=1e-9)
    assert calls == [1]
    handle.remove()
    torch.testing.assert_close(network(x), expected, rtol=1e-9, atol=1e-9)
    assert calls == [1]


@pytest.mark.skipif(not ops.backends()["cpu"].status()["built"], reason="needs the CPU kernels")
def test_a_backend_that_was_named_says_that_there_are_hooks():
    network = SearchNetwork(uniform_space("few", ("skip_connect", "sep_conv_3x3"), 2), C=4, layers=2)
    freeze_random_features(network)
    network.cells[0]._ops[0]._ops[1].register_forward_hook(lambda *_: None)
    with ops.use_backend("cpu"), pytest.raises(ops.BackendError, match="hooks on its modules"):
        network(torch.randn(2, 3, 8, 8))
