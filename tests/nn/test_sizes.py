"""Parameters, BatchNorm scalars and multiply-adds against the sizes of the published networks.

Starred counts are printed in logs of the published code (darts#18, PC-DARTS#15 and #16); the others were
calculated from the published definitions. Multiply-adds count convolutions and linear layers.
"""

import pytest
import torch
from torch import nn

from rfdarts_fast.nn import NasBench201SearchNetwork, Network, SearchNetwork
from rfdarts_fast.spaces import PUBLISHED, get_space

PC_IMAGENET = {"stem": "imagenet", "num_classes": 1000, "K": 2, "edge_norm": True}
PC_CIFAR = {"K": 4, "edge_norm": True}

# space, options, affine, parameters, affine scalars, BatchNorms, multiply-adds in millions (which gamma and
# beta do not change)
SUPERNETS = {
    "darts-plain": ("darts", {}, False, 1_930_618, 96, 929, 300.3),
    "darts-affine": ("darts", {}, True, 2_005_114, 74_592, 929, None),
    "pc-darts-plain": ("darts", PC_CIFAR, False, 299_578, 96, 929, 56.6),
    "pc-darts-affine": ("darts", PC_CIFAR, True, 319_162, 19_680, 929, None),
    "pc-darts-imagenet-plain*": ("darts", PC_IMAGENET, False, 956_512, 240, 931, 144.4),
    "pc-darts-imagenet-affine": ("darts", PC_IMAGENET, True, 994_400, 38_128, 931, None),
    "s1": ("s1", {}, True, 419_802, 14_752, None, 68.4),
    "s2": ("s2", {}, True, 686_202, 20_832, None, 100.9),
    "s3": ("s3", {}, True, 686_202, 20_832, None, 100.9),
    "s4": ("s4", {}, True, 643_706, 19_296, None, 96.7),
    "nasbench201-plain": ("nasbench201", {}, False, 1_686_106, 544, 186, 243.7),
    "nasbench201-affine": ("nasbench201", {}, True, 1_699_546, 13_984, 186, None),
}

CIFAR_NET = {"C": 36, "layers": 20}
IMAGENET_NET = {"C": 48, "layers": 14, "num_classes": 1000, "stem": "imagenet"}

# genotype, options, parameters, affine scalars, multiply-adds in millions
DERIVED = {
    "DARTS_V1-cifar*": ("DARTS_V1", CIFAR_NET, 3_169_414, 37_368, 501.0),
    "DARTS_V2-cifar": ("DARTS_V2", CIFAR_NET, 3_349_342, None, 528.4),
    "DARTS_V2-imagenet": ("DARTS_V2", IMAGENET_NET, 4_718_752, None, 529.9),
    "PC_DARTS_cifar-cifar*": ("PC_DARTS_cifar", CIFAR_NET, 3_634_678, None, 556.7),
    "PC_DARTS_image-imagenet": ("PC_DARTS_image", IMAGENET_NET, 5_342_464, None, 581.6),
    "PC_DARTS_cifar-imagenet": ("PC_DARTS_cifar", IMAGENET_NET, 5_270_560, None, 571.1),
}


def count(network):
    return sum(p.numel() for p in network.parameters())


def batch_norms(network):
    return [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]


def affine_scalars(network):
    return sum(p.numel() for m in batch_norms(network) for p in m.parameters())


def image_size(options):
    return 224 if options.get("stem") == "imagenet" else 32


def multiply_adds(network, size):
    """Multiply-adds of convolutions and linear layers for one image, on the meta device, in millions."""
    total = 0

    def add(module, inputs, output):
        nonlocal total
        per_output = module.weight[0].numel()
        total += output[0].numel() * per_output

    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(add)
    with torch.no_grad(), torch.device("meta"):
        network(torch.empty(2, 3, size, size))
    return total / 1e6


@pytest.mark.parametrize(
    ("space", "options", "affine", "parameters", "scalars", "norms", "madds"),
    SUPERNETS.values(),
    ids=SUPERNETS.keys(),
)
def test_supernet_has_the_published_size(space, options, affine, parameters, scalars, norms, madds):
    supernet = NasBench201SearchNetwork if space == "nasbench201" else SearchNetwork
    with torch.device("meta"):
        network = supernet(get_space(space), affine=affine, **options)
    assert count(network) == parameters
    assert affine_scalars(network) == scalars
    assert norms is None or len(batch_norms(network)) == norms
    if madds is not None:
        assert round(multiply_adds(network, image_size(options)), 1) == madds


@pytest.mark.parametrize(
    ("name", "options", "parameters", "scalars", "madds"), DERIVED.values(), ids=DERIVED.keys()
)
def test_derived_network_has_the_published_size(name, options, parameters, scalars, madds):
    with torch.device("meta"):
        network = Network(PUBLISHED[name], **options)
    assert count(network) == parameters
    assert scalars is None or affine_scalars(network) == scalars
    assert round(multiply_adds(network, image_size(options)), 1) == madds


def test_parameters_exclude_the_architecture():
    with torch.device("meta"):
        network = SearchNetwork(get_space("darts"), C=4, layers=1, K=2, edge_norm=True)
    arch = network.named_arch_parameters()
    assert {name: tuple(p.shape) for name, p in arch.items()} == {
        "alphas_normal": (14, 8), "alphas_reduce": (14, 8), "betas_normal": (14,), "betas_reduce": (14,)
    }  # fmt: skip
    assert not {id(p) for p in network.parameters()} & {id(p) for p in arch.values()}
    assert arch.keys() <= network.state_dict().keys()


@pytest.mark.parametrize(("stem", "size"), [("cifar", 32), ("imagenet", 224)])
def test_auxiliary_head_adds_logits_in_training_only(stem, size):
    options = {"C": 4, "layers": 3, "num_classes": 10, "stem": stem}
    with torch.device("meta"):
        plain = Network(PUBLISHED["DARTS_V2"], **options)
        network = Network(PUBLISHED["DARTS_V2"], **options, auxiliary=True)
        images = torch.empty(2, 3, size, size)
        logits, auxiliary = network(images)
        assert (logits.shape, auxiliary.shape) == ((2, 10), (2, 10))
        assert network.eval()(images)[1] is None
    # the published heads: 1x1 to 128, 2x2 to 768, a second BatchNorm for CIFAR only, and a linear layer
    channels = 4 * 16
    head = 128 * channels + 2 * 128 + 768 * 128 * 4 + (2 * 768 if stem == "cifar" else 0) + 10 * 768 + 10
    assert count(network) - count(plain) == head
