"""Fused mixed ops inside a supernet that another project built."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import torch
from torch import nn

from rfdarts_fast.drop_in.fused import Fused, UnderstoodFront, fuse_network
from rfdarts_fast.drop_in.look_ahead import keep_momentum
from rfdarts_fast.drop_in.replacements import FrontForm, Replacements
from rfdarts_fast.drop_in.report import Report, grouped, lacking_optimizers, uncalled
from rfdarts_fast.nn import freeze_random_features
from rfdarts_fast.ops.dispatch import layer_reference_reason, reference_reason


def accelerate(
    model: nn.Module,
    *,
    random_features: bool = True,
    train_classifier: bool = False,
    strict: bool = True,
    example: Any = None,
) -> Report:
    """Fuses the mixed ops of a supernet in place; its tensors, names and classes stay.

    Modules are found by what they compute, whatever they are called: mixed ops (a list of primitives that
    `rfdarts_fast.nn` has registered, in wrappers or not, and `forward(x, weights)`, perhaps with other
    arguments that have defaults) with all channels or one in 2, 4 or 8, with operations of weight 0 skipped
    or not; and cells of them. A fused copy of each is run beside the original on random inputs, in training
    and in evaluation mode, and counts only if outputs, gradients and running statistics agree. The module's
    own forward goes on to run where an argument, an attribute, a part or a hook is another one.

    Call it after loading a checkpoint and before making the optimiser: BatchNorms get new parameters. An
    optimiser inside the model that lacks them is warned of.

    Args:
        model: the supernet, on any device.
        random_features: freeze convolutions and linear layers at the values they have, and give all
            BatchNorms a trainable gamma of 1 and beta of 0. A bias in front of such a BatchNorm goes into its
            running mean. False leaves parameters as they are; the fused kernels need frozen convolutions.
        train_classifier: leave linear layers trainable.
        strict: replace everything or nothing. False replaces what can be replaced.
        example: an input of the model, to see which modules it calls; images of 32x32 pixels by default.

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
    _check(model, replacements, strict)
    calls = uncalled(model, replacements.forms, example)
    descriptions = replacements.apply()
    report = Report(left={**replacements.left, **replacements.problems})
    if isinstance(calls, str):
        report.calls_unknown = calls
    else:
        report.never_called = calls
    if random_features:
        _train_batchnorms_only(model, train_classifier, report)
        if not isinstance(model, Fused):
            fuse_network(model)
        keep_momentum(model)
    for path, description in descriptions.items():
        reason = _plain_reason(replacements.modules[path])
        if reason is None:
            report.kernels[path] = description
        else:
            report.plain[path] = f"{description}: {reason}"
    report.frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    report.optimizers = lacking_optimizers(model, report.parameters)
    if report.optimizers:
        warnings.warn(
            f"model: {', '.join(report.optimizers)} trains none of the {len(report.parameters)} gammas and "
            f"betas that accelerate has made; with report = accelerate(model):\n{report.remedy}",
            stacklevel=2,
        )
    return report


def _check(model: nn.Module, replacements: Replacements, strict: bool) -> None:
    """Raises ValueError if there is nothing to replace or, in strict mode, something that cannot be."""
    problems = replacements.problems
    fusible = [form for form in replacements.forms.values() if not isinstance(form, FrontForm)]
    if problems and (strict or not fusible):
        count = len(problems)
        which = f"{count} of {count + len(fusible)}" if fusible else f"all {count}"
        others = f"; strict=False replaces the other {len(fusible)}" if fusible else ""
        reasons = "\n".join(f"  {text}" for text in grouped(problems))
        raise ValueError(
            f"model: {which} mixed ops and cells cannot be replaced; nothing was changed{others}\n{reasons}"
        )
    if not fusible and not replacements.left:
        doubts = "".join(f"\n  {text}" for text in grouped(replacements.doubts))
        raise ValueError(
            "model: expected a supernet with mixed ops, a list of the published operations and "
            f"forward(x, weights) each; there are none in {type(model).__name__}{doubts}"
        )


def _plain_reason(module: Any) -> str | None:
    """The reason why a replaced module stays in plain PyTorch, or None."""
    understood = module.rfdarts
    like = next(iter(module.parameters()), torch.empty(0))
    if isinstance(understood, UnderstoodFront):
        x = like.new_zeros(2, understood.layer.convs[0].in_channels, 4, 4)
        return layer_reference_reason(understood.layer, x)
    # an edge of identities alone takes any number of channels, and has kept the one that it was probed with
    channels = next((edge.channels for edge in understood.edges if edge.width), 8)
    edges: Any = [edge.on(channels) for edge in understood.edges]
    inputs = [like.new_zeros(2, channels, 4, 4)] * (len(getattr(understood, "front", ())) or 1)
    return reference_reason(edges, inputs)


@torch.no_grad()
def _train_batchnorms_only(model: nn.Module, train_classifier: bool, report: Report) -> None:
    """Freezes convolutions and linear layers and makes BatchNorms affine."""
    for path, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d) and not module.affine:
            like = module.running_mean if module.running_mean is not None else next(model.parameters())
            module.affine = True
            module.weight = nn.Parameter(torch.ones(module.num_features).to(like))
            module.bias = nn.Parameter(torch.zeros(module.num_features).to(like))
            report.affine += 1
            report.parameters |= {f"{path}.weight": module.weight, f"{path}.bias": module.bias}
    for path, sequence in model.named_modules():
        for (name, conv), (behind, norm) in itertools.pairwise(sequence.named_children()):
            if not isinstance(sequence, nn.Sequential) or not isinstance(norm, nn.BatchNorm2d):
                continue
            if isinstance(conv, nn.Conv2d) and conv.bias is not None:
                # no bias there is known to the kernels
                if norm.running_mean is not None:
                    norm.running_mean -= conv.bias
                conv.bias = None
                report.vanished[f"{path}.{name}.bias"] = f"{path}.{behind}.running_mean"
    freeze_random_features(model, conv_init=None, train_classifier=train_classifier)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            # an optimiser would decay a frozen parameter that still has a gradient
            parameter.grad = None
