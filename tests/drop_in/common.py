"""Pairs of a foreign supernet and the drop-in for it, with equal weights."""

import copy
import pickle

import torch
from torch import nn

from rfdarts_fast.drop_in import darts, pc_darts, pc_darts_imagenet

from . import forks

MODULES = {"darts": darts, "pc_darts": pc_darts, "pc_darts_imagenet": pc_darts_imagenet}


def foreign_network(name, C, layers, K=None, **options):
    default = {"darts": 1, "pc_darts": 4, "pc_darts_imagenet": 2}[name]
    return forks.Network(
        C, 10, layers, nn.CrossEntropyLoss(), k=K or default, imagenet=name.endswith("imagenet"), **options
    )


def drop_in_network(name, C, layers, K=None, **options):
    return MODULES[name].Network(C, 10, layers, nn.CrossEntropyLoss(), K=K, **options)


def copy_arch(source, target):
    with torch.no_grad():
        for theirs, ours in zip(source.arch_parameters(), target.arch_parameters(), strict=True):
            # larger than at the start, so that an alpha that is mixed up shows
            theirs.copy_(torch.randn_like(theirs))
            ours.copy_(theirs)


def turn_affine(network):
    """Gamma and beta for every BatchNorm of a foreign network, neither at its default."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.affine = True
            module.weight = nn.Parameter(1 + 0.2 * torch.randn(module.num_features))
            module.bias = nn.Parameter(0.2 * torch.randn(module.num_features))


def freeze_convolutions(network):
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.requires_grad_(False)


def pair(name, C, layers, K=None, dtype=torch.float64, affine=False, nodes=4, **options):
    """A foreign network and a drop-in that loaded its state."""
    theirs = foreign_network(name, C, layers, K, steps=nodes, multiplier=nodes)
    if affine:
        turn_affine(theirs)
    ours = drop_in_network(name, C, layers, K, steps=nodes, multiplier=nodes, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    copy_arch(theirs, ours)
    # the alphas of the foreign network are no parameters, so .to() leaves them where they are
    for alpha in theirs.arch_parameters():
        alpha.data = alpha.data.to(dtype)
    return theirs.to(dtype), ours.to(dtype)


def batch(name, dtype=torch.float64, n=2, classes=10):
    side = 32 if name.endswith("imagenet") else 8
    return torch.randn(n, 3, side, side, dtype=dtype), torch.randint(classes, (n,))


def gradients(network, x, y):
    """Logits, and the gradients of alphas (and betas) and of what trains, by name."""
    named = {n: p for n, p in network.named_parameters() if p.requires_grad}
    arch = network.arch_parameters()
    logits = network(x)
    loss = nn.functional.cross_entropy(logits, y)
    grads = torch.autograd.grad(loss, [*arch, *named.values()], allow_unused=True, materialize_grads=True)
    return logits.detach(), grads[: len(arch)], dict(zip(named, grads[len(arch) :], strict=True))


def assert_equal_in_double(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-8)


def assert_as_accurate(draws):
    """Errors within a few times those of the foreign network: a BatchNorm over few pixels amplifies rounding.

    draws: (ours, theirs, truth) for each of several batches, compared in the median: gradients of either
    jump where rounding takes a value across a ReLU's kink, or changes which value of a window is the largest.
    """
    rows = []
    for ours, theirs, truth in draws:
        triples = zip(ours, theirs, truth, strict=True)
        rows.append([[(ours - t).norm(), (its - t).norm(), t.norm()] for ours, its, t in triples])
    for error, theirs, norm in torch.tensor(rows).median(dim=0).values.tolist():
        allowed = 10 * theirs + 1e-5 * (1 + norm)
        assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e} at a norm of {norm:.2e}"


def copies(module, folder):
    """The module as it is copied, pickled, and saved to a file."""
    torch.save(module, folder / "module.pt")
    saved = torch.load(folder / "module.pt", weights_only=False)
    return copy.deepcopy(module), pickle.loads(pickle.dumps(module)), saved


def in_double(network):
    copied = copy.deepcopy(network).double()
    for alpha in copied.arch_parameters():
        alpha.data = alpha.data.double()
    return copied
