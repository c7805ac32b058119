"""Signs in a search that the architecture settles, or that it collapses to skip connections."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rfdarts_fast.nn import PRIMITIVES, MixedOp, Supernet
from rfdarts_fast.spaces import AnyGenotype, GenotypeRule


@torch.no_grad()
def architecture_diagnostics(network: Supernet, genotype: AnyGenotype, rule: GenotypeRule) -> dict:
    """Entropy of each cell type's alphas (nats, mean over edges), and counts in the current genotype."""
    entropy = {}
    for cell in network.space.cells:
        op_weights, _ = network.cell_weights(cell)
        entropy[cell] = float(torch.special.entr(op_weights).sum(dim=-1).mean())
    return {
        "entropy": entropy,
        "skip_connects": genotype.ops().count("skip_connect"),
        "parameter_free_ops": sum(PRIMITIVES[op].parameter_free for op in genotype.ops()),
        "genotype": str(genotype),
        "genotype_rule": rule,
    }


@torch.no_grad()
def gamma_diagnostics(network: Supernet) -> dict[str, dict[str, float]]:
    """Mean and standard deviation of |gamma| of each primitive's last BatchNorm, over all cells.

    Affine BatchNorm lets an op rescale its output, so part of its strength may sit here and not in alpha.
    """
    collected: dict[str, list[torch.Tensor]] = {}
    for edge in network.modules():
        if isinstance(edge, MixedOp):
            for name, op in zip(edge.primitives, edge._ops, strict=True):
                norms = [m for m in op.modules() if isinstance(m, nn.BatchNorm2d) and m.affine]
                if norms:
                    collected.setdefault(name, []).append(norms[-1].weight.abs())
    return {
        name: {"mean": float(torch.cat(values).mean()), "std": float(torch.cat(values).std(correction=0))}
        for name, values in collected.items()
    }


@torch.no_grad()
def alphas(network: Supernet) -> dict[str, list]:
    """All architecture parameters as nested lists."""
    return {name: value.tolist() for name, value in network.named_arch_parameters().items()}


class AlphaGradients:
    """Running sums of the alphas' squared gradients, kept on the device so that no step waits for them."""

    def __init__(self, network: Supernet) -> None:
        self._network = network
        self._sums = [torch.zeros_like(p, dtype=torch.float64) for p in network.arch_parameters()]
        self._steps = torch.zeros((), dtype=torch.float64, device=self._sums[0].device)

    def state(self) -> list[Tensor]:
        """The tensors that change, for a checkpoint."""
        return [self._steps, *self._sums]

    def load(self, state: list[Tensor]) -> None:
        for mine, there in zip(self.state(), state, strict=True):
            mine.copy_(there)

    def reset(self) -> None:
        for tensor in self.state():
            tensor.zero_()

    @torch.no_grad()
    def add(self, grads: list[Tensor]) -> None:
        """The gradients of a step, in the order of `network.arch_parameters()`."""
        self._steps += 1
        for total, grad in zip(self._sums, grads, strict=True):
            total += grad.double().square()

    def result(self) -> dict[str, dict[str, float]] | None:
        """Cell type -> primitive -> norm over all edges, root mean square over the steps; None before one."""
        steps = float(self._steps)
        if not steps:
            return None
        sums = dict(zip(self._network.named_arch_parameters(), self._sums, strict=True))
        norms: dict[str, dict[str, float]] = {}
        for cell, edges in self._network.space.cells.items():
            squares: dict[str, float] = {}
            for names, values in zip(edges, sums[self._network.arch_names[cell][0]].tolist(), strict=True):
                for name, value in zip(names, values, strict=True):
                    squares[name] = squares.get(name, 0.0) + value
            norms[cell] = {name: (square / steps) ** 0.5 for name, square in squares.items()}
        return norms
