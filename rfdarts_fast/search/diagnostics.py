"""Signs in a search that the architecture settles, or that it collapses to skip connections."""

from __future__ import annotations

import torch
from torch import nn

from rfdarts_fast.nn import PRIMITIVES, MixedOp, Supernet


@torch.no_grad()
def architecture_diagnostics(network: Supernet) -> dict:
    """Entropy of each cell type's alphas (nats, mean over edges), and counts in the current genotype."""
    entropy = {}
    for cell in network.space.cells:
        op_weights, _ = network.cell_weights(cell)
        entropy[cell] = float(torch.special.entr(op_weights).sum(dim=-1).mean())
    genotype = network.genotype()
    return {
        "entropy": entropy,
        "skip_connects": genotype.ops().count("skip_connect"),
        "parameter_free_ops": sum(PRIMITIVES[op].parameter_free for op in genotype.ops()),
        "genotype": str(genotype),
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
