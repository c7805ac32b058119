"""Whole steps on a GPU, recorded in a CUDA graph."""

import copy

import pytest
import torch

from rfdarts_fast.nn import SearchNetwork, freeze_random_features
from rfdarts_fast.ops import backends, use_backend
from rfdarts_fast.runs.graph import GraphedStep, Recorder
from rfdarts_fast.search import search
from rfdarts_fast.search.architect import descend, gradients
from rfdarts_fast.spaces import get_space

MISSING = backends()["cuda"].status().get("reason")
pytestmark = pytest.mark.skipif(MISSING is not None, reason=f"needs a GPU: {MISSING}")


@pytest.mark.parametrize("amp", [False, True])
def test_replayed_steps_equal_eager_steps(amp):
    torch.manual_seed(0)
    network = SearchNetwork(get_space("darts"), C=16, layers=3, K=4, edge_norm=True).cuda()
    freeze_random_features(network)
    network.to(memory_format=torch.channels_last)
    batches = [(torch.randn(8, 3, 32, 32).cuda(), torch.randint(10, (8,)).cuda()) for _ in range(8)]

    def train(graphed):
        model = copy.deepcopy(network)
        parameters = [*model.arch_parameters(), *(p for p in model.parameters() if p.requires_grad)]
        optimizer = torch.optim.SGD(parameters, lr=torch.tensor(0.1).cuda(), momentum=0.9, fused=True)

        def step(kind, images, labels):
            with torch.autocast("cuda", torch.bfloat16, enabled=amp, cache_enabled=False):
                logits = model(images).float()
            loss = torch.nn.functional.cross_entropy(logits, labels)
            descend(optimizer, parameters, gradients(loss, parameters), 5.0)

        run = GraphedStep(step, Recorder(), required=True) if graphed else step
        for images, labels in batches:
            run("step", images, labels)
        return [p.detach() for p in parameters]

    with use_backend("cuda"):
        for a, b in zip(train(False), train(True), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"K": 2}, {"amp": "bf16"}], ids=str)
def test_a_recorded_search_is_the_same_search(tiny_search, tmp_path, changes):
    options = {"space": "darts", "channels": 4, "epochs": 3, "arch_warmup_epochs": 1, **changes}
    if "K" in options:
        options |= {"method": "rf-pcdarts", "partial_channels": options.pop("K"), "edge_norm": True}
    alphas = []
    for graph in ("off", "on"):
        out = tmp_path / graph
        search(tiny_search(out=out, device="cuda", backend="cuda", cuda_graph=graph, **options))
        alphas.append(torch.load(out / "checkpoint.pt", weights_only=False)["network"]["alphas_normal"])
    torch.testing.assert_close(*alphas, rtol=1e-3, atol=1e-5)
