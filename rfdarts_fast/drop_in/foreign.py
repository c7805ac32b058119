"""Fused mixed ops inside a supernet that another project built."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from rfdarts_fast.drop_in.replacements import Replacements
from rfdarts_fast.nn import freeze_random_features


@dataclass
class Report:
    """The changes that `accelerate` made; `str(report)` is for readers.

    Attributes:
        replaced: path of a module -> what computes it now.
        left: path of a module -> why it is as it was. In strict mode only modules that need no replacement.
        frozen: number of parameters, counted as scalars, that do not train.
        affine: number of BatchNorms that got a trainable gamma and beta.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    frozen: int = 0
    affine: int = 0

    def __str__(self) -> str:
        lines = [
            f"{len(self.replaced)} modules replaced, {len(self.left)} left; {self.frozen} scalars frozen, "
            f"{self.affine} BatchNorms got gamma and beta"
        ]
        lines += [f"  replaced {path}: {what}" for path, what in self.replaced.items()]
        lines += [f"  left {path}: {why}" for path, why in self.left.items()]
        return "\n".join(lines)


def accelerate(
    model: nn.Module,
    *,
    random_features: bool = True,
    train_classifier: bool = False,
    strict: bool = True,
) -> Report:
    """Fuses the mixed ops of a supernet in place; its tensors, names and classes stay.

    Modules are found by structure, wherever their classes were imported from: mixed ops (an `_ops` list of
    primitives that `rfdarts_fast.nn` has registered, `forward(x, weights)`) of quark0/darts, RobustDARTS and
    PC-DARTS, with K read from the width of the primitives; whole cells around them where the cell is the
    published one; search cells of NAS-Bench-201 (AutoDL-Projects). A fused copy is run once beside the
    original on a small input, in training and in evaluation mode, and counts only if outputs and running
    statistics agree.

    Call it after loading a checkpoint and before making the optimiser: BatchNorms get new parameters. A
    second-order architect must leave frozen parameters out (`p.requires_grad`) and copy the model with
    `copy.deepcopy`, as a `new()` of the foreign class knows nothing of what happened here.

    Args:
        model: the supernet, on any device.
        random_features: freeze convolutions and linear layers at the values they have, and give all
            BatchNorms a trainable gamma of 1 and beta of 0. A bias in front of such a BatchNorm goes into its
            running mean. False leaves parameters as they are; the fused kernels need frozen convolutions.
        train_classifier: leave linear layers trainable.
        strict: replace everything or nothing. False replaces what can be replaced.

    Returns:
        What was replaced, what was left and why.

    Raises:
        TypeError: if `model` is no module.
        ValueError: if it has no mixed ops, is wrapped for data parallelism or, in strict mode, has one that
            cannot be replaced; the model is as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ValueError(
            f"model: expected the supernet itself, got it wrapped in {type(model).__name__}; "
            "accelerate it first and wrap it then"
        )
    replacements = Replacements(model)
    fusible = replacements.edges or replacements.benchmark_cells
    if replacements.problems and (strict or not fusible):
        path, reason = next(iter(replacements.problems.items()))
        count = len(replacements.problems)
        raise ValueError(
            f"model: cannot replace {path or 'the model'} ({reason}), one of {count} such modules; nothing "
            "was changed. strict=False replaces the others"
        )
    if not fusible and not replacements.left:
        raise ValueError(
            f"model: expected a supernet with mixed ops, an `_ops` list of the published operations each, or "
            f"with search cells of NAS-Bench-201; found none in {type(model).__name__}"
        )
    report = Report(replacements.apply(), {**replacements.left, **replacements.problems})
    if random_features:
        report.affine = _train_batchnorms_only(model, train_classifier)
    report.frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    return report


@torch.no_grad()
def _train_batchnorms_only(model: nn.Module, train_classifier: bool) -> int:
    """Freezes convolutions and linear layers and makes BatchNorms affine; returns how many were not."""
    turned = 0
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and not module.affine:
            like = module.running_mean if module.running_mean is not None else next(model.parameters())
            module.affine = True
            module.weight = nn.Parameter(torch.ones(module.num_features).to(like))
            module.bias = nn.Parameter(torch.zeros(module.num_features).to(like))
            turned += 1
    for sequence in (m for m in model.modules() if isinstance(m, nn.Sequential)):
        for previous, module in zip(sequence, list(sequence)[1:], strict=False):
            if isinstance(previous, nn.Conv2d) and isinstance(module, nn.BatchNorm2d):
                _move_bias(previous, module)
    freeze_random_features(model, conv_init=None, train_classifier=train_classifier)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            # an optimiser would decay a frozen parameter that still has a gradient
            parameter.grad = None
    return turned


def _move_bias(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """Moves a convolution's bias into the running mean behind it: no bias there is known to the kernels."""
    if conv.bias is not None:
        if norm.running_mean is not None:
            norm.running_mean -= conv.bias
        conv.bias = None
