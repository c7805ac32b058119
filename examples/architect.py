"""The alpha step of DARTS (arXiv 1806.09055, section 2.3) for any supernet with the published methods.

quark0's `Architect` runs unchanged on the drop-in networks too. This one leaves frozen parameters out, so
that the second order needs no `complete_momentum`, and looks ahead in place instead of building a network at
each step.
"""

import torch
from torch import nn


class Architect:
    def __init__(self, model, momentum, weight_decay, arch_learning_rate, arch_weight_decay):
        self.model = model
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(
            model.arch_parameters(), lr=arch_learning_rate, betas=(0.5, 0.999), weight_decay=arch_weight_decay
        )

    def step(self, train, valid, eta, network_optimizer, unrolled, clip=10.0):
        """One alpha step; `train` and `valid` are (images, labels), `eta` is the weights' learning rate."""
        alphas = self.model.arch_parameters()
        if unrolled:
            grads = self._unrolled(train, valid, eta, network_optimizer)
        else:
            grads = torch.autograd.grad(self.model._loss(*valid), alphas)
        for alpha, grad in zip(alphas, grads, strict=True):
            alpha.grad = grad
        norm = nn.utils.clip_grad_norm_(alphas, clip)
        self.optimizer.step()
        return norm

    def _unrolled(self, train, valid, eta, network_optimizer):
        alphas, weights = self.model.arch_parameters(), self.weights
        here = [w.detach().clone() for w in weights]
        grads = torch.autograd.grad(self.model._loss(*train), weights)
        # the published code looks ahead in a copy, so that its running statistics do not count
        buffers = [b.clone() for b in self.model.buffers()]
        with torch.no_grad():
            for w, grad in zip(weights, grads, strict=True):
                step = grad + self.weight_decay * w
                moment = network_optimizer.state[w].get("momentum_buffer")
                w -= eta * (step if moment is None else step + self.momentum * moment)
        grads = torch.autograd.grad(self.model._loss(*valid), [*alphas, *weights])
        arch_grads, direction = grads[: len(alphas)], grads[len(alphas) :]
        with torch.no_grad():
            for b, kept in zip(self.model.buffers(), buffers, strict=True):
                b.copy_(kept)

        radius = 0.01 / torch.cat([d.flatten() for d in direction]).norm()
        sides = []
        for sign in (1, -1):
            self._move(here, direction, sign * radius)
            sides.append(torch.autograd.grad(self.model._loss(*train), alphas))
        self._move(here, direction, 0.0)
        return [g - eta * (p - n) / (2 * radius) for g, p, n in zip(arch_grads, *sides, strict=True)]

    @torch.no_grad()
    def _move(self, here, direction, by):
        for w, origin, d in zip(self.weights, here, direction, strict=True):
            w.copy_(origin + by * d)
