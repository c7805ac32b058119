"""SGD along a supernet's thousands of small vectors as along one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class _Bundle:
    """Vectors that are views of one, or a parameter by itself.

    Attributes:
        members: as the network has them.
        whole: the tensor that a step changes.
    """

    def __init__(self, members: Sequence[Tensor]) -> None:
        self.members = members
        self.whole = members[0] if len(members) == 1 else nn.Parameter(members[0].detach()[:0])
        self._addresses: list[int] = []
        self.share()

    def share(self) -> None:
        """Makes the members views of `whole`, at first and after the network was moved."""
        if len(self.members) > 1 and self._addresses != [p.data_ptr() for p in self.members]:
            self.whole.data = torch.cat([p.detach() for p in self.members])
            for p, part in zip(self.members, self.parts(self.whole.data), strict=True):
                p.data = part
            self._addresses = [p.data_ptr() for p in self.members]

    def parts(self, whole: Tensor) -> Sequence[Tensor]:
        """The members' views of a tensor like `whole`."""
        return [whole] if len(self.members) == 1 else whole.split([p.numel() for p in self.members])

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[0] if len(parts) == 1 else torch.cat([*parts])

    def set_gradients(self, grads: Sequence[Tensor]) -> None:
        self.share()
        self.whole.grad = self.join(grads)
        for p, part in zip(self.members, self.parts(self.whole.grad), strict=True):
            p.grad = part


def _bundles(parameters: Sequence[Tensor]) -> list[_Bundle]:
    vectors = [p for p in parameters if p.dim() == 1]
    kinds = {f"{p.dtype} on {p.device}" for p in vectors}
    if len(kinds) > 1:
        got = " and ".join(sorted(kinds))
        raise ValueError(f"params: expected vectors of one dtype and device in a group, got {got}")
    others = [[p] for p in parameters if p.dim() != 1]
    return [_Bundle(members) for members in ([vectors] if vectors else []) + others]


class FlatSGD(torch.optim.SGD):
    """torch.optim.SGD in a few operators for a network with thousands of gammas and betas.

    All parameters of one dimension in a group become views of one vector; so do their gradients and momentum.
    Numbers, hooks, `param_groups` and `state_dict()` are those of torch.optim.SGD.

    Raises:
        ValueError: for a group with vectors of several dtypes or devices.
    """

    def __init__(self, params: Iterable[Any], **options: Any) -> None:
        super().__init__(params, **options)
        self._bundles = [_bundles(group["params"]) for group in self.param_groups]
        groups = [{"params": [bundle.whole for bundle in bundles]} for bundles in self._bundles]
        self._inner = torch.optim.SGD(groups, **options)

    @property
    def stepped(self) -> list[Tensor]:
        """The tensors that a step changes: all vectors of a group as one, and its other parameters."""
        return [bundle.whole for bundles in self._bundles for bundle in bundles]

    def set_gradients(self, grads: Sequence[Tensor]) -> None:
        """Gives all parameters, in the order of `param_groups`, and `stepped` their gradients."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        by_parameter = dict(zip(parameters, grads, strict=True))
        for bundles in self._bundles:
            for bundle in bundles:
                bundle.set_gradients([by_parameter[p] for p in bundle.members])

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """A step along the gradients of `set_gradients`, or else those of the parameters.

        Raises ValueError for a parameter without a gradient.
        """
        for options, inner, bundles in zip(
            self.param_groups, self._inner.param_groups, self._bundles, strict=True
        ):
            for bundle in bundles:
                if bundle.whole.grad is None:
                    bundle.set_gradients([*map(_gradient, bundle.members)])
            inner.update({name: value for name, value in options.items() if name != "params"})
        self._inner.step()
        self._share_momentum()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """See torch.optim.SGD."""
        super().zero_grad(set_to_none)
        self._inner.zero_grad(set_to_none)

    def load_state_dict(self, state_dict: Any) -> None:
        """See torch.optim.SGD. A momentum that only some vectors of a group have is 0 for the others."""
        super().load_state_dict(state_dict)
        self._inner.state.clear()
        for bundles in self._bundles:
            for bundle in bundles:
                kept = [self.state[p].get("momentum_buffer") for p in bundle.members]
                if any(part is not None for part in kept):
                    pairs = zip(bundle.members, kept, strict=True)
                    parts = [torch.zeros_like(p) if part is None else part for p, part in pairs]
                    self._inner.state[bundle.whole]["momentum_buffer"] = bundle.join(parts)
        self.state.clear()
        self._share_momentum()

    def _share_momentum(self) -> None:
        """Makes the momentum of each parameter a view of what the steps change, once there is one."""
        for bundles in self._bundles:
            for bundle in bundles:
                momentum = self._inner.state[bundle.whole].get("momentum_buffer")
                if momentum is not None and "momentum_buffer" not in self.state[bundle.members[-1]]:
                    for p, part in zip(bundle.members, bundle.parts(momentum), strict=True):
                        self.state[p]["momentum_buffer"] = part


def _gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        raise ValueError("step: expected a gradient of every parameter")
    return parameter.grad
