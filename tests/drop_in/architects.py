"""What quark0/darts cnn/architect.py does (commit f276dd3), on current PyTorch and any device.

Kept step for step, with its bare `except`, because the point is whether that code runs unchanged.
"""

import torch


def flat(tensors):
    return torch.cat([t.view(-1) for t in tensors])


class PublishedArchitect:
    def __init__(self, model, momentum=0.9, weight_decay=3e-4, rate=3e-4):
        self.network_momentum = momentum
        self.network_weight_decay = weight_decay
        self.model = model
        self.optimizer = torch.optim.Adam(
            model.arch_parameters(), lr=rate, betas=(0.5, 0.999), weight_decay=1e-3
        )

    def parameters(self, model):
        return model.parameters()

    def named_parameters(self, model):
        return model.named_parameters()

    def step(self, train, valid, eta, network_optimizer, unrolled):
        self.optimizer.zero_grad()
        if unrolled:
            self._backward_step_unrolled(train, valid, eta, network_optimizer)
        else:
            self.model._loss(*valid).backward()
        self.optimizer.step()

    def _compute_unrolled_model(self, train, eta, network_optimizer):
        loss = self.model._loss(*train)
        theta = flat(self.parameters(self.model)).data
        try:
            moment = flat(
                network_optimizer.state[v]["momentum_buffer"] for v in self.parameters(self.model)
            ).mul_(self.network_momentum)
        except:  # noqa: E722
            moment = torch.zeros_like(theta)
        grads = torch.autograd.grad(loss, self.parameters(self.model))
        dtheta = flat(grads).data + self.network_weight_decay * theta
        return self._construct_model_from_theta(theta.sub(moment + dtheta, alpha=eta))

    def _backward_step_unrolled(self, train, valid, eta, network_optimizer):
        unrolled_model = self._compute_unrolled_model(train, eta, network_optimizer)
        unrolled_loss = unrolled_model._loss(*valid)
        unrolled_loss.backward()
        dalpha = [v.grad for v in unrolled_model.arch_parameters()]
        vector = [v.grad.data for v in self.parameters(unrolled_model)]
        implicit_grads = self._hessian_vector_product(vector, train)
        for g, ig in zip(dalpha, implicit_grads, strict=True):
            g.data.sub_(ig.data, alpha=eta)
        for v, g in zip(self.model.arch_parameters(), dalpha, strict=True):
            v.grad = g.data.clone()

    def _construct_model_from_theta(self, theta):
        model_new = self.model.new()
        model_dict = self.model.state_dict()
        params, offset = {}, 0
        for name, v in self.named_parameters(self.model):
            params[name] = theta[offset : offset + v.numel()].view(v.size())
            offset += v.numel()
        assert offset == len(theta)
        model_dict.update(params)
        model_new.load_state_dict(model_dict)
        return model_new

    def _hessian_vector_product(self, vector, train, r=1e-2):
        R = r / flat(vector).norm()
        grads = []
        for step in (R, -2 * R):
            for p, v in zip(self.parameters(self.model), vector, strict=True):
                p.data.add_(v, alpha=step)
            loss = self.model._loss(*train)
            grads.append(torch.autograd.grad(loss, self.model.arch_parameters()))
        for p, v in zip(self.parameters(self.model), vector, strict=True):
            p.data.add_(v, alpha=R)
        return [(x - y).div_(2 * R) for x, y in zip(*grads, strict=True)]


class TrainableArchitect(PublishedArchitect):
    """The same over the parameters that train: what it should compute for a network with frozen ones."""

    def parameters(self, model):
        return [p for p in model.parameters() if p.requires_grad]

    def named_parameters(self, model):
        return [(n, p) for n, p in model.named_parameters() if p.requires_grad]
