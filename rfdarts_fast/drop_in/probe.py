"""Proof that a module computes what was understood of it: copies run side by side on random inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rfdarts_fast.drop_in.edges import RULES
from rfdarts_fast.drop_in.recognise import Unrecognised
from rfdarts_fast.ops.backend import use_backend
from rfdarts_fast.ops.hooks import Hooks

_SIDE = 4


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def state(channels: int, enlarged: int = 1) -> Tensor:
    """A random state [2, channels, H, W]."""
    return random(2, channels, _SIDE * enlarged, _SIDE * enlarged)


def weights_of(*shape: int) -> Tensor:
    """Random weights, every third of which is 0."""
    weights = 0.2 + random(*shape).abs()
    weights.view(-1)[::3] = 0.0
    return weights


def on_copies(module: nn.Module, count: int) -> list[Any]:
    """Copies in float64 on the CPU, all of whose parameters train and which have no hooks."""
    try:
        copies = [copy.deepcopy(module).to("cpu", torch.float64) for _ in range(count)]
    except Exception as error:
        raise Unrecognised(f"it cannot be copied ({_text(error)})") from None
    for each in copies:
        without_hooks(each).requires_grad_()
    return copies


def without_hooks(module: nn.Module) -> nn.Module:
    for inner in module.modules():
        for table in Hooks([inner]).tables:
            table.clear()
    return module


def disagreement(
    module: nn.Module, fuse: Callable[[Any], None], tensors: Sequence[Tensor], named: dict[str, Any]
) -> str | None:
    """The difference between module(*tensors, **named) and a fused copy; None if outputs, gradients and
    statistics are the same in training and in evaluation mode.

    Also in which parameters have a gradient at all: those of an operation that was skipped have none.
    """
    theirs, ours = on_copies(module, 2)
    fuse(ours)
    with torch.random.fork_rng([]), use_backend("reference"), torch.enable_grad():
        for training in (True, False):
            try:
                expected = _results(theirs.train(training), tensors, named)
            except Exception as error:
                return f"its own code fails: {_text(error)}"
            try:
                same = _close(_results(ours.train(training), tensors, named), expected)
            except Exception as error:
                return f"other code fails: {_text(error)}"
            if not same:
                return "it computes something else"
    if not _close([*ours.buffers()], [*theirs.buffers()]):
        return "it leaves other statistics"
    return None


def output_channels(module: nn.Module, tensors: Sequence[Tensor], named: dict[str, Any]) -> int:
    """Channels of module(*tensors, **named). Raises Unrecognised if it takes no such arguments."""
    [copied] = on_copies(module, 1)
    with torch.no_grad(), torch.random.fork_rng([]), use_backend("reference"):
        try:
            return copied(*tensors, **named).shape[1]
        except Exception as error:
            raise Unrecognised(f"its own code fails: {_text(error)}") from None


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _results(module: nn.Module, tensors: Sequence[Tensor], named: dict[str, Any]) -> list[Tensor | None]:
    """The output, and the gradients of tensors and parameters."""
    torch.manual_seed(0)
    leaves = [x.clone().requires_grad_() for x in tensors]
    given = {k: x.clone().requires_grad_() if isinstance(x, Tensor) else x for k, x in named.items()}
    before = {**vars(module)}
    output = module(*leaves, **given)
    if not isinstance(output, Tensor):
        raise TypeError(f"expected a tensor, got {type(output).__name__}")
    changed = [name for name, value in vars(module).items() if before.get(name, module) is not value]
    if changed:
        raise RuntimeError(f"forward changes attributes ({', '.join(changed)})")
    wanted = [*leaves, *(x for x in given.values() if isinstance(x, Tensor)), *module.parameters()]
    loss = (output * random(*output.shape)).sum()
    return [output.detach(), *torch.autograd.grad(loss, wanted, allow_unused=True)]


def _close(ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None]) -> bool:
    return len(ours) == len(theirs) and all(
        b is None if a is None else b is not None and _close_tensors(a, b)
        for a, b in zip(ours, theirs, strict=True)
    )


def _close_tensors(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-5, atol=1e-6)


def rule_of(
    module: nn.Module, operations: Callable[[Any], nn.ModuleList], x: Tensor, primitives: Sequence[str]
) -> str:
    """The rule of `RULES` by which forward(x, weights) skips operations.

    Raises:
        Unrecognised: if there is no such rule.
    """
    [copied] = on_copies(module, 1)
    ran: set[int] = set()
    for i, op in enumerate(operations(copied)):
        op.register_forward_hook(lambda *_, i=i: ran.add(i))
    computed = {i for i, name in enumerate(primitives) if name != "none"}
    rules = {*RULES}
    with torch.no_grad(), torch.random.fork_rng([]), use_backend("reference"):
        # every operation meets a weight that is 0, next to nothing, negative and an ordinary one
        for values in ((0.0, 0.7), (0.7, 0.0), (-0.7, 1e-12), (1e-12, -0.7)):
            op_weights = random(len(primitives)).abs() + 1
            op_weights[::2] *= values[0]
            op_weights[1::2] *= values[1]
            ran.clear()
            try:
                copied(x, op_weights)
            except Exception as error:
                raise Unrecognised(f"its own code fails: {_text(error)}") from None
            for name in [*rules]:
                rule = RULES[name]
                expected = (
                    computed if rule is None else computed & {*rule(op_weights).nonzero()[:, 0].tolist()}
                )
                if ran & computed != expected:
                    rules.discard(name)
    if not rules:
        raise Unrecognised("it leaves out operations by a rule of its own")
    return next(name for name in RULES if name in rules)
