"""Parameters and multiply-adds of the networks that a genotype stands for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from rfdarts_fast.nn import NasBench201Network, Network
from rfdarts_fast.nn.counting import multiply_adds
from rfdarts_fast.spaces import AnyGenotype, CellGenotype


@dataclass(frozen=True)
class Counts:
    """A network's size.

    Attributes:
        network: its shape in words.
        parameters: all of them, without an auxiliary head.
        multiply_adds: as in `nn.counting.CONVENTION`.
    """

    network: str
    parameters: int
    multiply_adds: int

    def __str__(self) -> str:
        return f"{self.network}: {self.parameters / 1e6:.3f} M parameters, {self.multiply_adds / 1e6:.1f} M"


def counted(network: nn.Module, image_size: int, words: str) -> Counts:
    """The counts of a network on the meta device, so that nothing is computed."""
    return Counts(words, sum(p.numel() for p in network.parameters()), multiply_adds(network, image_size))


def count_genotype(genotype: AnyGenotype) -> list[Counts]:
    """The counts of the networks that papers report: for CIFAR and ImageNet, or the benchmark's."""
    with torch.device("meta"):
        if isinstance(genotype, CellGenotype):
            return [counted(NasBench201Network(genotype), 32, "NAS-Bench-201, C=16, N=5, 32x32, 10 classes")]
        cifar = Network(genotype, 36, 10, 20)
        imagenet = Network(genotype, 48, 1000, 14, stem="imagenet")
    return [
        counted(cifar, 32, "CIFAR, C=36, 20 cells, 32x32, 10 classes"),
        counted(imagenet, 224, "ImageNet, C=48, 14 cells, 224x224, 1000 classes"),
    ]
