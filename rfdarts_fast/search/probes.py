"""Costly looks at a supernet between epochs, which leave it, its buffers and the random state as they were.

Batches are normalised by their own statistics, as in training: running ones are those of the whole supernet,
and would not fit a pruned one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rfdarts_fast.data import Batches
from rfdarts_fast.nn import Supernet
from rfdarts_fast.ops import use_backend
from rfdarts_fast.runs.meters import Meter
from rfdarts_fast.search.architect import Architect, Batch, kept_buffers
from rfdarts_fast.spaces import AnyGenotype, CellGenotype, parse
from rfdarts_fast.tables import Table

# two digits are enough for a curve
_EIGENVALUE_TOLERANCE = 1e-2


def diagnose(architect: Architect, batches: Batches, genotype: AnyGenotype) -> dict[str, Any]:
    """The largest Hessian eigenvalue, on the first of the batches, and the discretisation gap, on all."""
    network = architect.network
    supernet = accuracy(network, batches)
    with pruned(network, genotype):
        pruned_accuracy = accuracy(network, batches)
    return {
        "hessian_eigenvalue": largest_eigenvalue(architect, next(batches.epoch(0))),
        "supernet_accuracy": supernet,
        "pruned_accuracy": pruned_accuracy,
        "discretisation_gap": supernet - pruned_accuracy,
    }


@contextmanager
def untouched(network: Supernet) -> Iterator[None]:
    """Training mode inside; buffers, the random state and the mode are put back at the end."""
    training = network.training
    device = network.arch_parameters()[0].device
    with torch.random.fork_rng([device] if device.type == "cuda" else []), kept_buffers(network):
        network.train()
        yield
        network.train(training)


@torch.no_grad()
def accuracy(network: Supernet, batches: Batches) -> float:
    """Top-1 accuracy in percent, normalised by each batch's statistics."""
    meter = Meter(batches.device)
    with untouched(network):
        for images, labels in batches.epoch(0):
            logits = network(images)
            meter.add(F.cross_entropy(logits, labels), logits, labels)
    accuracy = meter.result()["accuracy"]
    assert accuracy is not None
    return accuracy


@contextmanager
def pruned(network: Supernet, genotype: AnyGenotype) -> Iterator[None]:
    """The supernet with weight 1 on the genotype's primitives and 0 on all others; nothing is retrained."""
    weights = {cell: _one_hot(network, cell, genotype) for cell in network.space.cells}
    # an attribute of the object hides the method of its class
    network.cell_weights = weights.__getitem__  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        del network.cell_weights


def _one_hot(network: Supernet, cell: str, genotype: AnyGenotype) -> tuple[Tensor, Tensor | None]:
    edges = network.space.cells[cell]
    alpha, beta = network.arch_names[cell]
    weights = torch.zeros_like(getattr(network, alpha))
    if isinstance(genotype, CellGenotype):
        chosen = list(enumerate(genotype.edges))
    else:
        first = [node.start for node in network.space.node_slices()]
        chosen = [(first[k // 2] + j, name) for k, (name, j) in enumerate(getattr(genotype, cell))]
    for edge, name in chosen:
        weights[edge, edges[edge].index(name)] = 1.0
    return weights, None if beta is None else torch.ones_like(getattr(network, beta))


def largest_eigenvalue(architect: Architect, batch: Batch) -> float | None:
    """The largest eigenvalue of the Hessian of the batch's loss in the architecture parameters.

    Its growth announces the collapse of DARTS (Zela et al., arXiv 1909.09656). Lanczos iterations on products
    with the Hessian, by double backward through the reference; None if they do not converge.
    """
    from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

    with use_backend("reference"), untouched(architect.network):
        loss = F.cross_entropy(architect.network(batch[0]), batch[1])
        # a supernet of few layers has no reduction cells
        grads_or_none = torch.autograd.grad(loss, architect.arch, create_graph=True, allow_unused=True)
        used = [(g, p) for g, p in zip(grads_or_none, architect.arch, strict=True) if g is not None]
        grads, arch = [g for g, _ in used], [p for _, p in used]

        def product(vector: np.ndarray) -> np.ndarray:
            parts = torch.as_tensor(vector, dtype=arch[0].dtype, device=arch[0].device).flatten()
            directions = [v.view_as(p) for v, p in zip(parts.split(sizes), arch, strict=True)]
            products = torch.autograd.grad(
                grads, arch, directions, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            return torch.cat([p.flatten() for p in products]).double().cpu().numpy()

        sizes = [p.numel() for p in arch]
        hessian = LinearOperator((sum(sizes), sum(sizes)), matvec=product, dtype=np.float64)
        start = np.random.RandomState(0).randn(sum(sizes))
        try:
            values = eigsh(
                hessian, 1, which="LA", v0=start, tol=_EIGENVALUE_TOLERANCE, return_eigenvectors=False
            )
        except ArpackError:
            return None
    return float(values[0])


def kendall_tau(network: Supernet, batches: Batches, table: Table, dataset: str, count: int) -> float | None:
    """Kendall's tau-b between the pruned supernet's accuracy and the table's test accuracy.

    Taken over `count` cells of the table, always the same. None if all of them tie.
    """
    from scipy.stats import kendalltau

    cells = random.Random(0).sample(sorted(table.cells), min(count, len(table.cells)))
    by_supernet = []
    for cell in cells:
        with pruned(network, parse(cell)):
            by_supernet.append(accuracy(network, batches))
    by_table = [table.accuracies(cell)[f"{dataset}_test"] for cell in cells]
    tau = float(kendalltau(by_supernet, by_table).statistic)
    return None if np.isnan(tau) else tau
