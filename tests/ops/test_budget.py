"""A memory budget: what is kept, and that nothing else changes."""

import pytest
import torch

from rfdarts_fast import ops
from rfdarts_fast.bench.variants import make_network
from rfdarts_fast.ops import Budget, backends, use_backend

SIZES = {"a": 40, "b": 20, "c": 10, "d": 20}


def step(budget, sizes=SIZES):
    return [name for name, size in sizes.items() if budget.keeps(name, size)]


@pytest.mark.parametrize(
    ("limit", "kept"), [(0, ""), (9, ""), (10, "c"), (30, "bc"), (50, "bcd"), (89, "bcd"), (90, "abcd")]
)
def test_the_smallest_are_kept_once_a_step_was_seen(limit, kept):
    budget = Budget(limit)
    assert step(budget) == []
    assert step(budget) == step(budget) == [*kept]


def test_what_has_grown_is_not_kept():
    budget = Budget(100)
    step(budget)
    assert step(budget, SIZES | {"b": 21, "c": 9}) == ["a", "c", "d"]
    assert step(budget) == ["a", "b", "d"]
    assert step(budget) == ["a", "b", "c", "d"]


@torch.no_grad()
def test_an_evaluation_keeps_nothing_and_is_no_step():
    budget = Budget(100)
    with torch.enable_grad():
        step(budget)
    assert step(budget) == []
    with torch.enable_grad():
        assert step(budget) == ["a", "b", "c", "d"]


def test_a_negative_budget_is_refused():
    with pytest.raises(ValueError, match="memory_budget: expected bytes, at least 0, got -1"):
        use_backend("cpu", memory_budget=-1)
    assert use_backend.budget is None


@pytest.mark.skipif(not backends()["cpu"].status()["built"], reason="the CPU kernels are not built")
@pytest.mark.parametrize(("method", "space"), [("rf-pcdarts", "darts"), ("rf-darts", "nasbench201")])
@pytest.mark.parametrize("amp", [False, True])
def test_every_budget_has_the_same_bits(monkeypatch, method, space, amp):
    network = make_network(method, 16, 4 if space == "darts" else 1, space)
    x = torch.randn(2, 3, 16, 16)
    parameters = [p for p in [*network.parameters(), *network.arch_parameters()] if p.requires_grad]
    recomputed = []
    real = backends()["cpu"].mixed_cell

    def mixed_cell(call):
        recomputed.append(call.recompute)
        return real(call)

    monkeypatch.setattr(backends()["cpu"], "mixed_cell", mixed_cell)

    def gradients(budget=None):
        with use_backend("cpu", memory_budget=budget), torch.autocast("cpu", torch.bfloat16, enabled=amp):
            return torch.autograd.grad(network(x).float().square().sum(), parameters, allow_unused=True)

    expected, shares = gradients(), []
    assert not any(recomputed)
    sizes = []

    class Recorded(Budget):
        def keeps(self, key, size):
            sizes.append(size)
            return super().keeps(key, size)

    gradients(Recorded(0))
    for limit in (0, sum(sizes) // 2, sum(sizes)):
        budget = Budget(limit)
        gradients(budget)
        recomputed.clear()
        found = gradients(budget)
        shares.append(sum(recomputed) / len(recomputed))
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert shares[0] == 1 > shares[1] > shares[2] == 0
    assert ops.use_backend.budget is None
