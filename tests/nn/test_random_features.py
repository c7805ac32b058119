"""Frozen random features: what trains, how the rest is drawn, and that its gain is irrelevant."""

import copy
import math

import pytest
import torch
from torch import nn

from rfdarts_fast.nn import NasBench201SearchNetwork, SearchNetwork, freeze_random_features
from rfdarts_fast.spaces import get_space


def supernet(space="s2", **options):
    if space == "nasbench201":
        return NasBench201SearchNetwork(get_space(space), C=4, N=1, **options)
    return SearchNetwork(get_space(space), C=4, layers=3, **options)


@pytest.mark.parametrize("train_classifier", [False, True])
@pytest.mark.parametrize("space", ["s1", "nasbench201"])
def test_only_batch_norm_and_architecture_train(space, train_classifier):
    network = supernet(space)
    freeze_random_features(network, train_classifier=train_classifier)
    trained = {id(p) for p in network.parameters() if p.requires_grad}
    norms = {id(p) for m in network.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    classifier = {id(p) for p in network.classifier.parameters()}
    assert trained == norms | (classifier if train_classifier else set())
    assert all(p.requires_grad for p in network.arch_parameters())


def kaiming_bound(fan_in):
    return math.sqrt(6 / fan_in)


# scheme -> (standard deviation, largest value or None) of a weight [out, in, k, k] by its definition
SCHEMES = {
    "kaiming_normal": lambda fan_in, fan_out: (math.sqrt(2 / fan_in), None),
    "kaiming_uniform": lambda fan_in, fan_out: (math.sqrt(2 / fan_in), kaiming_bound(fan_in)),
    "xavier_normal": lambda fan_in, fan_out: (math.sqrt(2 / (fan_in + fan_out)), None),
    "default": lambda fan_in, fan_out: (math.sqrt(1 / (3 * fan_in)), math.sqrt(1 / fan_in)),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_distribution_of_frozen_convolutions(scheme):
    network = nn.Sequential(nn.Conv2d(32, 64, 3, bias=False), nn.BatchNorm2d(64))
    before = network[0].weight.clone()
    freeze_random_features(network, conv_init=scheme)
    weight = network[0].weight
    deviation, bound = SCHEMES[scheme](fan_in=32 * 9, fan_out=64 * 9)
    assert not torch.equal(weight, before)
    # 18,432 values: the deviation of a sample's deviation is 0.5%
    assert weight.std().item() == pytest.approx(deviation, rel=0.03)
    peak = weight.abs().max().item()
    assert peak <= bound if bound else peak > 3 * deviation


def test_orthogonal_convolutions():
    network = nn.Sequential(nn.Conv2d(32, 64, 3, bias=False), nn.BatchNorm2d(64))
    freeze_random_features(network, conv_init="orthogonal")
    rows = network[0].weight.flatten(1)
    torch.testing.assert_close(rows @ rows.T, torch.eye(64), atol=1e-5, rtol=0)


def test_without_a_scheme_the_weights_stay():
    network = supernet()
    before = copy.deepcopy(network.state_dict())
    freeze_random_features(network, conv_init=None)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(m.weight.requires_grad for m in network.modules() if isinstance(m, nn.Conv2d))


def test_frozen_classifier_is_drawn_wide_and_without_bias():
    network = nn.Sequential(nn.BatchNorm2d(1), nn.Linear(256, 100))
    freeze_random_features(network)
    assert network[1].weight.std().item() == pytest.approx(math.sqrt(2 / 256), rel=0.03)
    assert not network[1].bias.any()


@pytest.mark.parametrize("scheme", ["ones", "uniform"])
def test_gamma(scheme):
    network = supernet()
    freeze_random_features(network, gamma_init=scheme)
    gammas = torch.cat([m.weight for m in network.modules() if isinstance(m, nn.BatchNorm2d)])
    if scheme == "ones":
        assert (gammas == 1).all()
    else:
        assert 0 <= gammas.min() < 0.05
        assert 0.95 < gammas.max() <= 1
        assert gammas.mean().item() == pytest.approx(0.5, abs=0.05)
    assert not any(m.bias.any() for m in network.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conv_init": "zeros"}, "conv_init: expected one of kaiming_normal"),
        ({"gamma_init": "zeros"}, "gamma_init: expected one of ones, uniform"),
    ],
    ids=["conv_init", "gamma_init"],
)
def test_unknown_scheme(options, message):
    with pytest.raises(ValueError, match=message):
        freeze_random_features(supernet(), **options)


def test_nothing_left_to_train_is_refused():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False))
    with pytest.raises(ValueError, match="no BatchNorm here is affine"):
        freeze_random_features(network)


@pytest.mark.parametrize("gain", [0.5, 2.0])
@pytest.mark.parametrize("space", ["s1", "nasbench201"])
def test_gain_of_frozen_convolutions_is_irrelevant(space, gain):
    """Scaling the convolutions in front of a BatchNorm by G in all only divides its eps by G^2.

    BatchNorm(G x; eps) = (x - m) / sqrt(v + eps / G^2), so its output changes by the relative amount
    |sqrt((v + eps) / (v + eps / G^2)) - 1| <= eps |1 - 1 / G^2| / (2 v), to first order in eps. A depthwise
    and pointwise pair scaled by 0.5 each makes G = 1/4: 7.5 eps / v. The test lowers eps to 1e-12 in float64
    and asserts v > 1e-3 for every channel: below 1e-8 for each BatchNorm, 20 of them on the longest path.
    """
    network = supernet(space).double()
    freeze_random_features(network)
    smallest = []
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-12
            module.register_forward_hook(lambda m, inputs, _: smallest.append(variance(inputs[0])))
    x = torch.randn(8, 3, 16, 16, dtype=torch.float64)
    before = network(x)
    assert min(smallest) > 1e-3
    scaled = normalised_convolutions(network)
    assert len(scaled) > 20
    for conv in scaled:
        conv.weight.data *= gain
    torch.testing.assert_close(network(x), before, rtol=0, atol=2e-7)


def test_gain_matters_only_by_eps():
    """With the real eps of 1e-5 the change shrinks as the gain grows: eps is all there is."""
    network = supernet("s1").double()
    freeze_random_features(network)
    x = torch.randn(8, 3, 16, 16, dtype=torch.float64)
    change = []
    for gain in (1.0, 2.0, 2.0, 2.0):
        before = network(x)
        for conv in normalised_convolutions(network):
            conv.weight.data *= gain
        change.append((network(x) - before).abs().max().item())
    assert change[0] == 0
    assert 1e-2 > change[1] > 3 * change[2] > 9 * change[3] > 0


def variance(x):
    return x.var(dim=(0, 2, 3), correction=0).min().item()


def normalised_convolutions(network):
    """All convolutions but the ones of the residual shortcuts, which nothing normalises before the sum."""
    shortcuts = {
        id(conv)
        for name, module in network.named_modules()
        if name.endswith("downsample")
        for conv in module.modules()
    }
    convs = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    return [conv for conv in convs if id(conv) not in shortcuts]
