"""Random features: every convolution frozen at its random initialisation.

What RF-DARTS (arXiv 2208.08835) verifiably says is that only BatchNorm is trained besides the architecture
weights. How the convolutions are drawn and that the classifier is frozen too are our choices, each an option.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import nn

ConvInit = Literal["kaiming_normal", "kaiming_uniform", "xavier_normal", "orthogonal", "default"]
"""Distributions of frozen convolutions: see `freeze_random_features`."""
GammaInit = Literal["ones", "uniform"]
"""Initial gammas: see `freeze_random_features`."""


def init_convolution(conv: nn.Conv2d, init: ConvInit) -> None:
    """Draws a convolution's weight anew, fan-in mode with ReLU gain where the scheme has them.

    The gain hardly matters, as a BatchNorm follows every convolution of a supernet; the shape of the
    distribution may. "default" is PyTorch's own initialisation.
    """
    match init:
        case "kaiming_normal":
            nn.init.kaiming_normal_(conv.weight, mode="fan_in", nonlinearity="relu")
        case "kaiming_uniform":
            nn.init.kaiming_uniform_(conv.weight, mode="fan_in", nonlinearity="relu")
        case "xavier_normal":
            nn.init.xavier_normal_(conv.weight)
        case "orthogonal":
            nn.init.orthogonal_(conv.weight)
        case "default":
            conv.reset_parameters()
        case _:
            raise ValueError(f"conv_init: expected one of {', '.join(get_args(ConvInit))}, got {init!r}")


def freeze_random_features(
    network: nn.Module,
    conv_init: ConvInit | None = "kaiming_normal",
    gamma_init: GammaInit = "ones",
    train_classifier: bool = False,
) -> None:
    """Draws all convolutions and freezes them; BatchNorm's gamma and beta stay trainable.

    Args:
        network: a supernet whose BatchNorms are affine.
        conv_init: how convolutions are drawn (our choice: kaiming_normal, after RLNAS and open_lth);
            None keeps the values they have.
        gamma_init: 1, or U[0, 1] as open_lth's `uniform` (our choice: 1).
        train_classifier: leave the linear classifier trainable (our choice: frozen, "only BatchNorm" read
            literally). A frozen one is drawn kaiming_normal with zero bias: PyTorch's default spread is
            smaller, but either is far from the N(0, 0.01) that starts almost flat.

    Raises:
        ValueError: if no BatchNorm has trainable parameters, or a scheme's name is unknown.
    """
    if not any(m.affine for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
        raise ValueError("affine: random features train BatchNorm only, but no BatchNorm here is affine")
    if gamma_init not in get_args(GammaInit):
        raise ValueError(f"gamma_init: expected one of {', '.join(get_args(GammaInit))}, got {gamma_init!r}")
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            if conv_init is not None:
                init_convolution(module, conv_init)
            module.requires_grad_(False)
        elif isinstance(module, nn.Linear) and not train_classifier:
            if conv_init is not None:
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)
            module.requires_grad_(False)
        elif isinstance(module, nn.BatchNorm2d) and module.affine and gamma_init == "uniform":
            nn.init.uniform_(module.weight)
