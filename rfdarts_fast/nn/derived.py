"""The network of a genotype, for retraining: quark0/darts cnn/model.py."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfdarts_fast.nn.primitives import FactorizedReduce, ReLUConvBN, make_primitive
from rfdarts_fast.nn.stems import cifar_stem, imagenet_stem
from rfdarts_fast.spaces import Genotype

# side of the feature maps that the auxiliary head pools with a 5x5 window and convolves with a 2x2 kernel
AUXILIARY_MIN_SIDE = {"cifar": 8, "imagenet": 7}


def drop_path(x: Tensor, probability: float) -> Tensor:
    """Zeroes whole samples of x [N, C, H, W] with this probability and scales the others up."""
    keep = 1.0 - probability
    mask = x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(keep)
    return x / keep * mask


class Cell(nn.Module):
    """Two genes for each node; the output concatenates the states that the genotype names."""

    def __init__(
        self,
        genotype: Genotype,
        c_prev_prev: int,
        c_prev: int,
        c: int,
        reduction: bool,
        reduction_prev: bool,
    ) -> None:
        super().__init__()
        if reduction_prev:
            self.preprocess0: nn.Module = FactorizedReduce(c_prev_prev, c)
        else:
            self.preprocess0 = ReLUConvBN(c_prev_prev, c, 1)
        self.preprocess1 = ReLUConvBN(c_prev, c, 1)
        genes = genotype.reduce if reduction else genotype.normal
        self.concat = genotype.reduce_concat if reduction else genotype.normal_concat
        self.indices = tuple(j for _, j in genes)
        self._ops = nn.ModuleList(
            make_primitive(name, c, 2 if reduction and j < 2 else 1) for name, j in genes
        )

    def forward(self, s0: Tensor, s1: Tensor, drop_path_prob: float = 0.0) -> Tensor:
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        for first in range(0, len(self._ops), 2):
            terms = []
            for k in (first, first + 1):
                op = self._ops[k]
                h = op(states[self.indices[k]])
                if self.training and drop_path_prob > 0.0 and not isinstance(op, nn.Identity):
                    h = drop_path(h, drop_path_prob)
                terms.append(h)
            states.append(terms[0] + terms[1])
        return torch.cat([states[i] for i in self.concat], dim=1)


class AuxiliaryHead(nn.Module):
    """A second classifier at two thirds of the depth (quark0/darts AuxiliaryHeadCIFAR and -ImageNet).

    The published heads fit 8x8 (CIFAR) and 7x7 (ImageNet) features; a global average makes larger ones fit.
    """

    def __init__(self, c: int, num_classes: int, stem: Literal["cifar", "imagenet"]) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.ReLU(),
            nn.AvgPool2d(5, stride=3 if stem == "cifar" else 2, padding=0, count_include_pad=False),
            nn.Conv2d(c, 128, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.Conv2d(128, 768, 2, bias=False),
        ]
        # the published ImageNet head has no BatchNorm here
        if stem == "cifar":
            layers.append(nn.BatchNorm2d(768))
        layers.append(nn.ReLU())
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(768, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))


class Network(nn.Module):
    """The derived network.

    Args:
        genotype: of the DARTS family.
        C: channels of the first cells (36 for CIFAR-10, 48 for ImageNet as published).
        layers: number of cells (20 and 14); reductions at layers // 3 and 2 * layers // 3.
        auxiliary: add the auxiliary head; in training mode `forward` then returns its logits too.
        stem: "cifar" or "imagenet".
    """

    def __init__(
        self,
        genotype: Genotype,
        C: int = 36,
        num_classes: int = 10,
        layers: int = 20,
        auxiliary: bool = False,
        stem: Literal["cifar", "imagenet"] = "cifar",
    ) -> None:
        super().__init__()
        self.layers = layers
        self.drop_path_prob = 0.0
        if stem == "cifar":
            c_prev_prev = c_prev = 3 * C
            self.stem = cifar_stem(c_prev)
        else:
            c_prev_prev = c_prev = C
            self.stem0, self.stem1 = imagenet_stem(C)
        self.cells = nn.ModuleList()
        reduction_prev = stem == "imagenet"
        c = C
        for i in range(layers):
            reduction = i in (layers // 3, 2 * layers // 3)
            c = 2 * c if reduction else c
            cell = Cell(genotype, c_prev_prev, c_prev, c, reduction, reduction_prev)
            self.cells.append(cell)
            reduction_prev = reduction
            c_prev_prev, c_prev = c_prev, len(cell.concat) * c
            if i == 2 * layers // 3:
                c_auxiliary = c_prev
        self.auxiliary_head = AuxiliaryHead(c_auxiliary, num_classes, stem) if auxiliary else None
        self.global_pooling = nn.AdaptiveAvgPool2d(1)
        self.classifier: nn.Module = nn.Linear(c_prev, num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images [N, 3, H, W] -> logits [N, num_classes] and, in training, the auxiliary ones (else None)."""
        x, auxiliary = self.features(x)
        return self.classifier(self.global_pooling(x).flatten(1)), auxiliary

    def features(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The last cell's output, [N, C', H', W'], and the auxiliary logits as of `forward`."""
        auxiliary = None
        if hasattr(self, "stem"):
            s0 = s1 = self.stem(x)
        else:
            s0 = self.stem0(x)
            s1 = self.stem1(s0)
        for i, cell in enumerate(self.cells):
            s0, s1 = s1, cell(s0, s1, self.drop_path_prob)
            if i == 2 * self.layers // 3 and self.auxiliary_head is not None and self.training:
                auxiliary = self.auxiliary_head(s1)
        return s1, auxiliary
