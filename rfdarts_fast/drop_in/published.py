"""The common part of the three published `model_search` modules, on top of this package's supernet.

Sources: quark0/darts cnn/model_search.py, yuhuixu1993/PC-DARTS model_search.py and model_search_imagenet.py.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from rfdarts_fast import nn as rfnn
from rfdarts_fast.drop_in.look_ahead import forget_gradients, keep_momentum, loss_of_frozen
from rfdarts_fast.nn.random_features import ConvInit, GammaInit, freeze_random_features
from rfdarts_fast.nn.supernet import ARCH_INIT_STD
from rfdarts_fast.spaces import DARTS_PRIMITIVES, Space, uniform_space

PRIMITIVES = list(DARTS_PRIMITIVES)
Genotype = namedtuple("Genotype", "normal normal_concat reduce reduce_concat")


class PublishedMixedOp(rfnn.MixedOp):
    """The published MixedOp(C, stride); `forward(x, weights)` takes the softmax weights [8] of the edge."""

    default_K: ClassVar[int] = 1

    def __init__(self, C: int, stride: int, *, K: int | None = None, affine: bool = False) -> None:
        super().__init__(PRIMITIVES, C, stride, self.default_K if K is None else K, affine)


class PublishedCell(rfnn.SearchCell):
    """The published Cell; `forward(s0, s1, weights)`, in PC-DARTS `forward(s0, s1, weights, weights2)`."""

    mixed_op: ClassVar[type[PublishedMixedOp]] = PublishedMixedOp

    def __init__(
        self,
        steps: int,
        multiplier: int,
        C_prev_prev: int,
        C_prev: int,
        C: int,
        reduction: bool,
        reduction_prev: bool,
        *,
        K: int | None = None,
        affine: bool = False,
    ) -> None:
        space = uniform_space("darts", DARTS_PRIMITIVES, steps)
        cell_type = "reduce" if reduction else "normal"
        K = self.mixed_op.default_K if K is None else K
        super().__init__(
            space, cell_type, C_prev_prev, C_prev, C, reduction_prev, K, affine, multiplier=multiplier
        )
        self._steps = steps
        self._multiplier = multiplier

    def make_edge(self, primitives: Any, c: int, stride: int, K: int, affine: bool, track: bool) -> Any:
        return self.mixed_op(c, stride, K=K, affine=affine)


class PublishedNetwork(rfnn.SearchNetwork):
    """The published supernet, frozen and fused.

    Args:
        C, num_classes, layers, criterion, steps, multiplier, stem_multiplier: as published.
        random_features: freeze all convolutions and the classifier at their random initialisation and train
            gamma and beta of every BatchNorm (RF-DARTS). False gives the published supernet: everything
            trainable, BatchNorms in the cells without gamma and beta.
        K: partial channels; by default as published. Must divide C.
        conv_init, gamma_init, train_classifier: as of `rfdarts_fast.nn.freeze_random_features`.

    `parameters()` holds the weights, frozen ones with requires_grad False and grad None, and no alphas.
    Alphas and betas are in `arch_parameters()` and in `state_dict()`, and follow `.to()`. Nothing is moved to
    a GPU by itself. `load_state_dict` takes the state of a published supernet: if it has no gamma and beta at
    all they become 1 and 0, if it has no alphas at all they stay.

    DistributedDataParallel averages the gradients of the weights; alphas are no part of it, as they are no
    part of `parameters()`: average their gradients before the alpha step.
    """

    stem_type: ClassVar[Literal["cifar", "imagenet"]] = "cifar"
    edge_norm: ClassVar[bool] = False
    cell: ClassVar[type[PublishedCell]] = PublishedCell

    def __init__(
        self,
        C: int,
        num_classes: int,
        layers: int,
        criterion: Callable[[Tensor, Tensor], Tensor],
        steps: int = 4,
        multiplier: int = 4,
        stem_multiplier: int = 3,
        *,
        random_features: bool = True,
        K: int | None = None,
        conv_init: ConvInit = "kaiming_normal",
        gamma_init: GammaInit = "ones",
        train_classifier: bool = False,
    ) -> None:
        sizes = {"C": C, "num_classes": num_classes, "layers": layers, "steps": steps}
        for name, value in {**sizes, "stem_multiplier": stem_multiplier}.items():
            if value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value}")
        if not 1 <= multiplier <= steps:
            raise ValueError(f"multiplier: expected 1 to {steps} (steps), got {multiplier}")
        super().__init__(
            uniform_space("darts", DARTS_PRIMITIVES, steps),
            C,
            num_classes,
            layers,
            self.stem_type,
            self.cell.mixed_op.default_K if K is None else K,
            self.edge_norm,
            affine=random_features,
            stem_multiplier=stem_multiplier,
            multiplier=multiplier,
        )
        self._C = C
        self._num_classes = num_classes
        self._layers = layers
        self._criterion = criterion
        self._steps = steps
        self._multiplier = multiplier
        self._stem_multiplier = stem_multiplier
        self._options: dict[str, Any] = {
            "random_features": random_features,
            "K": K,
            "conv_init": conv_init,
            "gamma_init": gamma_init,
            "train_classifier": train_classifier,
        }
        if random_features:
            freeze_random_features(self, conv_init, gamma_init, train_classifier)
            keep_momentum(self)

    def make_cell(self, space: Space, cell_type: str, *args: Any) -> PublishedCell:
        c_prev_prev, c_prev, c, reduction_prev, K, affine, _track, multiplier = args
        reduction = cell_type == "reduce"
        return self.cell(
            space.nodes, multiplier, c_prev_prev, c_prev, c, reduction, reduction_prev, K=K, affine=affine
        )

    @property
    def _arch_parameters(self) -> list[nn.Parameter]:
        return self.arch_parameters()

    @torch.no_grad()
    def _initialize_alphas(self) -> None:
        """Draws alphas and betas anew, in place, so that an optimiser made before still updates them."""
        for parameter in self.arch_parameters():
            parameter.copy_(ARCH_INIT_STD * torch.randn_like(parameter))

    def _loss(self, input: Tensor, target: Tensor) -> Tensor:
        loss = self._criterion(self(input), target)
        return loss_of_frozen(loss) if self._options["random_features"] else loss

    def new(self) -> PublishedNetwork:
        """Another network with the same alphas and betas and the same frozen features, other weights fresh.

        The gradients of its frozen parameters are zeros that take no memory, as the published Architect
        reads them.
        """
        arguments = self._C, self._num_classes, self._layers, self._criterion
        shape = self._steps, self._multiplier, self._stem_multiplier
        # frozen features are copied below, so they need not be drawn twice
        other = type(self)(*arguments, *shape, **{**self._options, "conv_init": None})
        other._options = dict(self._options)
        other.to(self.classifier.weight)
        with torch.no_grad():
            for mine, its in zip(self.arch_parameters(), other.arch_parameters(), strict=True):
                its.copy_(mine)
            for mine, its in zip(self.parameters(), other.parameters(), strict=True):
                if not mine.requires_grad:
                    its.copy_(mine)
                    its.requires_grad_(False)
        return forget_gradients(other)

    def genotype(self) -> Genotype:  # type: ignore[override]
        """The published namedtuple: lists of (primitive, input) pairs, and ranges of concatenated states."""
        derived: Any = super().genotype()
        concat = range(2 + self._steps - self._multiplier, self._steps + 2)
        return Genotype(list(derived.normal), concat, list(derived.reduce), concat)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        arch = {prefix + name: p.detach() for name, p in self.named_arch_parameters().items()}
        affine = {
            f"{prefix}cells.{name}.{parameter}": fill(module.weight.detach())
            for name, module in self.cells.named_modules()
            if isinstance(module, nn.BatchNorm2d) and module.affine
            for parameter, fill in (("weight", torch.ones_like), ("bias", torch.zeros_like))
        }
        # a state that has some of them is damaged rather than published, so what is missing stays an error
        for published_without in (arch, affine):
            if not any(name in state_dict for name in published_without):
                state_dict.update(published_without)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _replicate_for_data_parallel(self) -> Any:
        raise RuntimeError(
            "DataParallel: expected DistributedDataParallel, got DataParallel, which cannot copy the alphas "
            "to several GPUs as they are no part of parameters()"
        )
