"""The look-ahead of the published second-order Architect, for networks with frozen parameters.

It reads gradients and momentum of all of `model.parameters()`: here are zeros that take no memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook


class _Loss(Tensor):
    """A loss whose gradients with respect to frozen parameters are zeros instead of an error.

    The published second-order Architect calls `torch.autograd.grad(loss, model.parameters())`.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is torch.autograd.grad:
                return _gradients(*args, **(kwargs or {}))
            return func(*args, **(kwargs or {}))


def loss_of_frozen(loss: Tensor) -> Tensor:
    """The loss; `torch.autograd.grad` of it takes frozen parameters too."""
    return loss.as_subclass(_Loss)


def _gradients(outputs: Any, inputs: Any, *args: Any, **options: Any) -> tuple[Tensor | None, ...]:
    inputs = [inputs] if isinstance(inputs, Tensor) else [*inputs]
    trainable = [x for x in inputs if x.requires_grad]
    gradients = iter(torch.autograd.grad(outputs, trainable, *args, **options))
    return tuple(next(gradients) if x.requires_grad else _zeros(x) for x in inputs)


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros((), dtype=like.dtype, device=like.device).expand_as(like)


def forget_gradients(network: Any) -> Any:
    """The network without gradients, but for zeros where the published Architect reads them."""
    arch = getattr(network, "arch_parameters", None)
    for alpha in arch() if callable(arch) else []:
        alpha.grad = None
    for parameter in network.parameters():
        parameter.grad = None if parameter.requires_grad else _zeros(parameter)
    return network


@torch.no_grad()
def complete_momentum(optimizer: Optimizer) -> None:
    """Gives the frozen parameters of an SGD optimiser a momentum of zeros that take no memory.

    The published second-order Architect looks ahead with the momentum of every parameter, and silently with
    none at all if one has none, as frozen ones do. After a step this is done by itself for the parameters of
    drop-in and accelerated networks; a network that was copied or unpickled needs this call.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not parameter.requires_grad:
                optimizer.state[parameter]["momentum_buffer"] = _zeros(parameter)


def keep_momentum(network: nn.Module) -> None:
    """Has SGD give the network's frozen parameters their momentum in its first step."""
    global _hook
    for parameter in network.parameters():
        if not parameter.requires_grad:
            parameter.rfdarts_frozen = True  # type: ignore[attr-defined]
    _hook = _hook or register_optimizer_step_post_hook(_after_step)


_hook: Any = None


def _after_step(optimizer: Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups if type(optimizer) is torch.optim.SGD else ():
        for parameter in group["params"] if group["momentum"] else ():
            frozen = not parameter.requires_grad and hasattr(parameter, "rfdarts_frozen")
            if frozen and "momentum_buffer" not in optimizer.state[parameter]:
                optimizer.state[parameter]["momentum_buffer"] = _zeros(parameter)
