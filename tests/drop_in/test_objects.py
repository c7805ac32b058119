"""What people do with a model besides training it."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .common import MODULES, batch, copies


def network(name="pc_darts", **options):
    return MODULES[name].Network(4, 10, 3, nn.CrossEntropyLoss(), 2, 2, **options)


def step(model, dtype=torch.float32):
    """One training step; the alpha gradients."""
    x, y = batch("darts", dtype)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=3e-4)
    nn.functional.cross_entropy(model(x), y).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 5.0)
    optimizer.step()


@pytest.mark.parametrize("name", MODULES)
def test_copies(name, tmp_path):
    ours = network(name)
    x, _ = batch(name, torch.float32)
    for other in copies(ours, tmp_path):
        torch.testing.assert_close(other(x), ours(x), rtol=0, atol=0)
        assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in ours.parameters()]
        mine, its = ours.arch_parameters(), other.arch_parameters()
        assert all(torch.equal(a, b) and a is not b for a, b in zip(mine, its, strict=True))
        assert not {id(p) for p in its} & {id(p) for p in other.parameters()}
        assert other.genotype() == ours.genotype()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("random_features", [True, False])
def test_other_dtypes(dtype, random_features):
    ours = network(random_features=random_features)
    x, y = batch("darts", torch.float32)
    expected = ours(x)
    grads = torch.autograd.grad(nn.functional.cross_entropy(expected, y), ours.arch_parameters())
    ours.to(dtype)
    assert all(p.dtype == dtype for p in [*ours.parameters(), *ours.arch_parameters()])
    logits = ours(x.to(dtype))
    assert logits.dtype == dtype
    tolerance = {torch.float64: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.3}[dtype]
    torch.testing.assert_close(logits.float(), expected, rtol=tolerance, atol=tolerance)
    after = torch.autograd.grad(nn.functional.cross_entropy(logits, y), ours.arch_parameters())
    assert all(g.isfinite().all() for g in after)
    if dtype is torch.float64:
        torch.testing.assert_close([g.float() for g in after], list(grads), rtol=1e-3, atol=1e-5)
    step(ours, dtype)


def test_channels_last():
    ours = network()
    x, y = batch("darts", torch.float32)
    expected = ours(x)
    grads = torch.autograd.grad(nn.functional.cross_entropy(expected, y), ours.arch_parameters())
    ours.to(memory_format=torch.channels_last)
    logits = ours(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    after = torch.autograd.grad(nn.functional.cross_entropy(logits, y), ours.arch_parameters())
    torch.testing.assert_close(after, grads, rtol=1e-3, atol=1e-5)


def test_autocast():
    ours = network()
    x, y = batch("darts", torch.float32)
    expected = ours(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = ours(x)
        loss = nn.functional.cross_entropy(logits, y)
    torch.testing.assert_close(logits.float(), expected, rtol=0.3, atol=0.3)
    loss.backward()
    assert all(a.grad.isfinite().all() for a in ours.arch_parameters())


def test_alphas_follow_to():
    ours = network().to("meta")
    assert all(p.device.type == "meta" for p in [*ours.parameters(), *ours.arch_parameters()])


def train_distributed(rank, world, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        torch.manual_seed(rank)
        torch.set_num_threads(1)
        ours = network()
        start = {n: p.detach().clone() for n, p in ours.named_parameters() if not p.requires_grad}
        wrapped = DistributedDataParallel(ours)
        first = {n: p.detach().clone() for n, p in ours.named_parameters()}
        step(wrapped)
        state = {n: p.detach() for n, p in ours.named_parameters()}
        everyone = [None] * world
        dist.all_gather_object(everyone, {n: v.double().sum().item() for n, v in state.items()})
        assert all(other == everyone[0] for other in everyone)
        for name, parameter in ours.named_parameters():
            assert torch.equal(parameter, first[name]) != parameter.requires_grad, name
            assert (parameter.grad is None) != parameter.requires_grad
        # rank 0 sends its frozen features to all
        assert rank or all(torch.equal(first[n], v) for n, v in start.items())
        assert all(alpha.grad.abs().sum() > 0 for alpha in ours.arch_parameters())
    finally:
        dist.destroy_process_group()


def test_distributed_data_parallel(tmp_path):
    train_distributed(0, 1, tmp_path)


@pytest.mark.slow
def test_distributed_data_parallel_on_two_processes(tmp_path):
    torch.multiprocessing.spawn(train_distributed, (2, tmp_path), nprocs=2)


def test_data_parallel_says_what_to_use():
    # what DataParallel calls for each GPU it copies to
    with pytest.raises(RuntimeError, match="DataParallel: expected DistributedDataParallel"):
        network()._replicate_for_data_parallel()


def test_alphas_cannot_be_replaced_by_tensors():
    with pytest.raises(TypeError, match="alphas_normal"):
        network().alphas_normal = torch.zeros(5, 8)
