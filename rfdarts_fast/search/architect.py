"""The two halves of a bilevel step: the weights on training images, the architecture on validation images.

DARTS, arXiv 1806.09055, section 2.3; quark0/darts cnn/architect.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfdarts_fast.nn import Supernet
from rfdarts_fast.runs.meters import batch_sums
from rfdarts_fast.runs.micro_batches import micro_batches, weighed
from rfdarts_fast.runs.world import ALONE, World
from rfdarts_fast.search.flat_sgd import FlatSGD

Batch = Sequence[Tensor]


class Portion(NamedTuple):
    """The part of a batch that a process computes.

    Attributes:
        share: of its images in the batch of all processes.
        micro_batches: the number of those in which it is computed, one after the other.
    """

    share: float = 1.0
    micro_batches: int = 1


WHOLE = Portion()

# radius of the finite difference, over the norm of the direction (DARTS, footnote 2)
FINITE_DIFFERENCE = 0.01

# numbers that torch adds up on one thread, and so in one order
_PIECE = 1 << 14


def gradients(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """d loss / d parameters; zeros for a parameter that the loss does not depend on."""
    return list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))


def norm(tensors: Iterable[Tensor]) -> Tensor:
    """The Euclidean norm of all numbers in some tensors."""
    pieces = [piece for tensor in tensors for piece in tensor.flatten().split(_PIECE)]
    return nn.utils.get_total_norm(pieces)


def descend(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], grads: Sequence[Tensor], clip: float
) -> None:
    """One step of an optimiser of these parameters along these gradients, clipped to a norm of `clip` unless
    it is 0.

    Only these parameters ever get a `.grad`: those of frozen tensors stay None.
    """
    if isinstance(optimizer, FlatSGD):
        optimizer.set_gradients(grads)
        parameters = optimizer.stepped
    else:
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
    if clip:
        nn.utils.clip_grads_with_norm_(
            parameters, clip, norm(p.grad for p in parameters if p.grad is not None)
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@contextmanager
def kept_buffers(network: nn.Module) -> Iterator[None]:
    """Puts the network's buffers, such as running statistics, back at the end."""
    before = [buffer.clone() for buffer in network.buffers()]
    yield
    for buffer, kept in zip(network.buffers(), before, strict=True):
        buffer.copy_(kept)


class Architect:
    """Gradients of the validation loss with respect to the architecture weights.

    Args:
        network: the supernet.
        weight_optimizer: SGD over the trainable weights; the second order looks one of its steps ahead.
        order: "first" takes the weights as they are, "second" as they would be after that step.
        amp: activations in bfloat16.
        world: the processes over which gradients are summed.
    """

    def __init__(
        self,
        network: Supernet,
        weight_optimizer: torch.optim.SGD,
        order: str,
        amp: bool = False,
        world: World = ALONE,
    ) -> None:
        self.network = network
        self.weight_optimizer = weight_optimizer
        self.order = order
        self.amp = amp
        self.world = world
        self.weights = [p for group in weight_optimizer.param_groups for p in group["params"]]
        self.arch = network.arch_parameters()

    def gradients(
        self, train: Batch, val: Batch, portions: tuple[Portion, Portion] = (WHOLE, WHOLE)
    ) -> tuple[list[Tensor], Tensor]:
        """Gradients in the order of `network.arch_parameters()`, and sums of losses and hits on `val`.

        `portions` are those of the two batches.
        """
        if self.order == "first":
            return self.step_gradients(val, self.arch, portions[1])
        return self._second_order(train, val, portions)

    def step_gradients(
        self, batch: Batch, parameters: Sequence[Tensor], portion: Portion = WHOLE
    ) -> tuple[list[Tensor], Tensor]:
        """Gradients of the mean loss over the batches of all processes, and their sums as of `batch_sums`.

        They travel once, after the last micro-batch.
        """
        grads: list[Tensor] = []
        sums = torch.zeros(4, dtype=torch.float64, device=batch[0].device)
        for part, share in micro_batches(batch, portion.micro_batches):
            loss, logits = self.loss(part)
            sums += batch_sums(loss, logits, part[1])
            terms = gradients(weighed(loss, share * portion.share), parameters)
            grads = list(torch._foreach_add(grads, terms)) if grads else terms
        return self.world.sum_step(grads, sums)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Cross entropy and logits, [N, classes] in float32."""
        with torch.autocast(batch[0].device.type, torch.bfloat16, enabled=self.amp, cache_enabled=False):
            logits = self.network(batch[0])
        logits = logits.float() if self.amp else logits
        return F.cross_entropy(logits, batch[1]), logits

    def _second_order(
        self, train: Batch, val: Batch, portions: tuple[Portion, Portion]
    ) -> tuple[list[Tensor], Tensor]:
        weights = [p.detach().clone() for p in self.weights]
        rate = self.weight_optimizer.param_groups[0]["lr"]
        self._look_ahead(self.step_gradients(train, self.weights, portions[0])[0])
        # the published code looks ahead with a copy of the network, so its running statistics stay put
        with kept_buffers(self.network):
            grads, sums = self.step_gradients(val, [*self.arch, *self.weights], portions[1])
        arch_grads, direction = grads[: len(self.arch)], grads[len(self.arch) :]

        radius = FINITE_DIFFERENCE / torch.linalg.vector_norm(torch.cat([v.flatten() for v in direction]))
        forward = self._arch_gradients_at(weights, direction, radius, train, portions[0])
        backward = self._arch_gradients_at(weights, direction, -radius, train, portions[0])
        self._set_weights(weights)
        arch_grads = [
            grad - rate * (plus - minus) / (2 * radius)
            for grad, plus, minus in zip(arch_grads, forward, backward, strict=True)
        ]
        return arch_grads, sums

    @torch.no_grad()
    def _look_ahead(self, grads: Sequence[Tensor]) -> None:
        """One step of SGD with momentum and weight decay that leaves the optimiser's state alone."""
        remaining = iter(grads)
        for group in self.weight_optimizer.param_groups:
            for parameter in group["params"]:
                step = next(remaining).add(parameter, alpha=group["weight_decay"])
                momentum = self.weight_optimizer.state[parameter].get("momentum_buffer")
                if momentum is not None:
                    step.add_(momentum, alpha=group["momentum"])
                parameter.sub_(step, alpha=group["lr"])

    def _arch_gradients_at(
        self,
        weights: Sequence[Tensor],
        direction: Sequence[Tensor],
        radius: Tensor,
        train: Batch,
        portion: Portion,
    ) -> list[Tensor]:
        self._set_weights([w + radius * v for w, v in zip(weights, direction, strict=True)])
        return self.step_gradients(train, self.arch, portion)[0]

    @torch.no_grad()
    def _set_weights(self, weights: Sequence[Tensor]) -> None:
        for parameter, weight in zip(self.weights, weights, strict=True):
            parameter.copy_(weight)
