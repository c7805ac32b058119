"""Costly diagnostics: against what they mean, and without any trace in the search."""

import json

import pytest
import torch
import torch.nn.functional as F

from rfdarts_fast.nn import NasBench201Network
from rfdarts_fast.search import probes, search
from rfdarts_fast.spaces import parse
from rfdarts_fast.tables import open_table

DARTS = {"space": "s3", "method": "rf-pcdarts", "layers": 1, "partial_channels": 2, "edge_norm": True}
CELLS = [
    "|{0}~0|+|{0}~0|{0}~1|+|{0}~0|{0}~1|{1}~2|".format(*ops)
    for ops in (("skip_connect", "none"), ("nor_conv_3x3", "nor_conv_1x1"), ("avg_pool_3x3", "skip_connect"))
]


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "table.csv"
    rows = [f"{cell},{10 * (k + 1)}.5" for k, cell in enumerate(CELLS)]
    path.write_text("\n".join(["arch,cifar10_test", *rows]))
    return path


@pytest.mark.parametrize("changes", [{}, DARTS], ids=["nasbench201", "s3"])
def test_eigenvalue_is_the_hessian_s(start, changes):
    run = start(**changes)
    for p in run.architect.arch:
        torch.nn.init.normal_(p, std=0.5)
    batch = next(run.held_out.epoch(0))
    found = probes.largest_eigenvalue(run.architect, batch)
    # one layer is a reduction cell
    arch = [p for name, p in run.network.named_arch_parameters().items() if "normal" not in name]
    loss = F.cross_entropy(run.network(batch[0]), batch[1])
    grads = torch.autograd.grad(loss, arch, create_graph=True)
    flat = torch.cat([g.flatten() for g in grads])
    rows = [torch.autograd.grad(value, arch, retain_graph=True) for value in flat]
    hessian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    assert found == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]), rel=0.02)


def test_a_pruned_supernet_is_the_network_of_the_cell(start):
    run = start(train_classifier=True)
    images, _ = next(run.held_out.epoch(0))
    for text in CELLS:
        cell = parse(text)
        network = NasBench201Network(cell, 4, 4, 1).train()
        state = {
            name.replace(
                f"_ops.{e}._ops.{run.network.space.cells['cell'][e].index(op)}.", f"_ops.{e}."
            ): value
            for name, value in run.network.state_dict().items()
            for e, op in [*enumerate(cell.edges), (0, cell.edges[0])]
            if f"_ops.{e}._ops.{run.network.space.cells['cell'][e].index(op)}." in name or "_ops" not in name
        }
        missing, _ = network.load_state_dict(state, strict=False)
        assert not [name for name in missing if "running" not in name and "tracked" not in name]
        with probes.pruned(run.network, cell):
            torch.testing.assert_close(run.network(images), network(images)[0], atol=1e-5, rtol=1e-4)
    assert run.network.cell_weights("cell")[0].unique().numel() > 2


def test_pruned_cells_of_the_darts_family(start):
    run = start(**DARTS)
    genotype = run.network.genotype()
    with probes.pruned(run.network, genotype):
        for cell in ("normal", "reduce"):
            weights, edge_weights = run.network.cell_weights(cell)
            assert weights.sum() == 8 and (edge_weights == 1).all()
            for k, (name, j) in enumerate(getattr(genotype, cell)):
                edge = run.network.space.node_slices()[k // 2].start + j
                assert weights[edge, run.network.space.cells[cell][edge].index(name)] == 1


@pytest.mark.parametrize("changes", [{}, {**DARTS, "space": "s4"}], ids=["nasbench201", "s4"])
def test_diagnostics_leave_no_trace(tiny_search, table, tmp_path, changes):
    """S4 draws noise in every forward pass."""
    with_table = {} if changes else {"table": table}
    plain, seen = (tiny_search(out=tmp_path / name, **changes) for name in ("plain", "seen"))
    search(plain)
    search(type(seen)(**{**vars(seen), "diagnose_every": 1, "diagnose_images": 9, **with_table}))
    for name in ("alphas.jsonl", "genotype.json"):
        assert (plain.out / name).read_bytes() == (seen.out / name).read_bytes()
    states = [torch.load(c.out / "checkpoint.pt", weights_only=True)["network"] for c in (plain, seen)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    for line in (seen.out / "metrics.jsonl").read_text().splitlines():
        found = json.loads(line)["diagnostics"]
        assert found["discretisation_gap"] == found["supernet_accuracy"] - found["pruned_accuracy"]
        assert isinstance(found["hessian_eigenvalue"], float)
        assert ("kendall_tau" in found) == (not changes)


def test_kendall_tau(start, table, monkeypatch):
    run, truth = start(), open_table(table)
    for order, tau in ((1, 1.0), (-1, -1.0), (0, None)):
        accuracies = {weights: order * k for k, weights in enumerate(CELLS)}

        def accuracy(network, batches, accuracies=accuracies):
            weights, _ = network.cell_weights("cell")
            names = network.space.cells["cell"]
            ops = [names[e][int(k)] for e, k in enumerate(weights.argmax(dim=1))]
            return accuracies["|{}~0|+|{}~0|{}~1|+|{}~0|{}~1|{}~2|".format(*ops)]

        monkeypatch.setattr(probes, "accuracy", accuracy)
        assert probes.kendall_tau(run.network, run.diagnosed, truth, "cifar10", 50) == tau
