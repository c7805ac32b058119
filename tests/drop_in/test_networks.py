"""The drop-in networks against independent ports of the published ones."""

import pytest
import torch
from torch import nn

from rfdarts_fast.drop_in import darts, pc_darts, pc_darts_imagenet
from rfdarts_fast.nn import SearchNetwork, freeze_random_features
from rfdarts_fast.spaces import DARTS_PRIMITIVES, parse, uniform_space

from . import forks
from .common import (
    MODULES,
    assert_as_accurate,
    assert_equal_in_double,
    batch,
    copy_arch,
    drop_in_network,
    foreign_network,
    freeze_convolutions,
    gradients,
    in_double,
    pair,
    turn_affine,
)

F32, F64 = torch.float32, torch.float64
SLOW = pytest.mark.slow

# name, C, layers, K, dtype; K and widths as published come first
CASES = [
    ("darts", 4, 3, None, F64),
    ("darts", 12, 3, None, F64),
    ("darts", 16, 3, None, F32),
    ("darts", 4, 8, None, F64),
    ("pc_darts", 4, 3, 4, F64),
    ("pc_darts", 12, 3, 4, F64),
    ("pc_darts", 12, 3, 2, F64),
    ("pc_darts", 16, 3, None, F64),
    ("pc_darts", 16, 3, 2, F32),
    ("pc_darts_imagenet", 4, 3, 2, F64),
    ("pc_darts_imagenet", 4, 3, 4, F64),
    ("pc_darts_imagenet", 16, 3, None, F32),
]
EVERY = [
    (name, C, layers, K, dtype)
    for name, Ks in (("darts", [None]), ("pc_darts", [2, 4]), ("pc_darts_imagenet", [2, 4]))
    for C in (4, 12, 16)
    for layers in (3, 8)
    for K in Ks
    for dtype in (F32, F64)
]
ALL_CASES = CASES + [pytest.param(*case, marks=SLOW) for case in EVERY if case not in CASES]


@pytest.mark.parametrize("name, C, layers, K, dtype", ALL_CASES)
def test_equals_published_network(name, C, layers, K, dtype):
    theirs, ours = pair(name, C, layers, K, dtype, affine=True)
    freeze_convolutions(theirs)
    for training in (True, False):
        theirs.train(training)
        ours.train(training)
        truth = in_double(theirs)
        draws = []
        # statistics over very few pixels would be mostly rounding in float32
        for n in [2] if dtype is F64 else [8] * 5:
            x, y = batch(name, dtype, n)
            logits, arch, weights = gradients(theirs, x, y)
            our_logits, our_arch, our_weights = gradients(ours, x, y)
            assert our_weights.keys() == weights.keys()
            expected, actual = [*arch, *weights.values()], [*our_arch, *our_weights.values()]
            if dtype is F64:
                assert_equal_in_double([our_logits, *actual], [logits, *expected])
            else:
                true_logits, true_arch, true_weights = gradients(truth, x.double(), y)
                assert_as_accurate([([our_logits], [logits], [true_logits])])
                draws.append((actual, expected, [*true_arch, *true_weights.values()]))
        if draws:
            assert_as_accurate(draws)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("random_features", [True, False])
def test_loads_published_state_without_gamma_and_beta(name, random_features):
    theirs, ours = pair(name, 4, 3, nodes=2, random_features=random_features)
    x, y = batch(name)
    for training in (True, False):
        theirs.train(training)
        ours.train(training)
        logits, arch, weights = gradients(theirs, x, y)
        our_logits, our_arch, our_weights = gradients(ours, x, y)
        assert_equal_in_double(our_logits, logits)
        assert_equal_in_double(our_arch, arch)
        if not random_features:
            # all that trains there trains here, convolutions included
            assert_equal_in_double(our_weights, weights)


def test_state_with_some_gammas_missing_is_an_error():
    ours = drop_in_network("darts", 4, 3)
    state = ours.state_dict()
    gone = next(name for name in state if name.startswith("cells.1.") and name.endswith("bn.weight"))
    del state[gone]
    with pytest.raises(RuntimeError, match=gone):
        ours.load_state_dict(state)
    state = {name: value for name, value in ours.state_dict().items() if name != "alphas_reduce"}
    with pytest.raises(RuntimeError, match="alphas_reduce"):
        ours.load_state_dict(state)


def test_loading_resets_gamma_and_beta_and_keeps_alphas():
    ours = drop_in_network("darts", 4, 3, gamma_init="uniform")
    before = [alpha.detach().clone() for alpha in ours.arch_parameters()]
    ours.load_state_dict(foreign_network("darts", 4, 3).state_dict())
    for alpha, kept in zip(ours.arch_parameters(), before, strict=True):
        assert torch.equal(alpha, kept)
    affine = [m for m in ours.cells.modules() if isinstance(m, nn.BatchNorm2d)]
    assert affine and all((m.weight == 1).all() and (m.bias == 0).all() for m in affine)


@pytest.mark.parametrize("name", MODULES)
def test_running_statistics_after_five_steps(name):
    theirs, ours = pair(name, 4, 3, affine=True, nodes=2)
    freeze_convolutions(theirs)
    frozen = {n: p.detach().clone() for n, p in ours.named_parameters() if not p.requires_grad}
    for network in (theirs, ours):
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9, weight_decay=3e-4)
        for _ in range(5):
            x, y = batch(name)
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x), y).backward()
            nn.utils.clip_grad_norm_(network.parameters(), 5.0)
            optimizer.step()
    state = ours.state_dict()
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(state[key], value, rtol=1e-7, atol=1e-9, msg=key)
    parameters = dict(ours.named_parameters())
    assert all(torch.equal(parameters[n], p) and parameters[n].grad is None for n, p in frozen.items())


@pytest.mark.parametrize("module, K", [(darts, 1), (pc_darts, 4), (pc_darts_imagenet, 2)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("C", [4, 12, 16])
def test_mixed_op(module, K, stride, C):
    C = 2 * C if stride == 2 else C
    theirs, ours = forks.MixedOp(C, stride, k=K).double(), module.MixedOp(C, stride).double()
    ours.load_state_dict(theirs.state_dict())
    results = []
    for op in (theirs, ours):
        torch.manual_seed(2)
        x = torch.randn(2, C, 8, 8, dtype=F64, requires_grad=True)
        weights = torch.rand(8, dtype=F64, requires_grad=True)
        out = op(x, weights)
        grads = torch.autograd.grad((out * torch.randn_like(out)).sum(), [x, weights])
        results.append((out, *grads, *op.buffers()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("module, K", [(darts, 1), (pc_darts, 4), (pc_darts_imagenet, 2)])
@pytest.mark.parametrize("reduction, reduction_prev", [(False, False), (True, False), (False, True)])
def test_cell(module, K, reduction, reduction_prev):
    arguments = 4, 3, 6, 10, 8, reduction, reduction_prev
    theirs, ours = forks.Cell(*arguments, k=K).double(), module.Cell(*arguments).double()
    ours.load_state_dict(theirs.state_dict())
    s0 = torch.randn(2, 6, 16 if reduction_prev else 8, 16 if reduction_prev else 8, dtype=F64)
    s1 = torch.randn(2, 10, 8, 8, dtype=F64)
    args = [torch.rand(14, 8, dtype=F64)] + ([torch.rand(14, dtype=F64)] if K > 1 else [])
    torch.testing.assert_close(ours(s0, s1, *args), theirs(s0, s1, *args), rtol=1e-10, atol=1e-10)
    assert ours(s0, s1, *args).shape[1] == 3 * 8


def published_genotype(network):
    """The published rule, written out again."""
    cells = []
    for cell_type in ("normal", "reduce"):
        weights = getattr(network, f"alphas_{cell_type}").softmax(-1)
        if hasattr(network, "betas_normal"):
            weights = weights * network._edge_weights(getattr(network, f"betas_{cell_type}"))[:, None]
        genes, start = [], 0
        for i in range(network._steps):
            rows = weights[start : start + 2 + i].tolist()
            for j in sorted(range(2 + i), key=lambda j: -max(rows[j][1:]))[:2]:
                best = max(range(1, 8), key=lambda k: rows[j][k])
                genes.append((forks.PRIMITIVES[best], j))
            start += 2 + i
        cells.append(genes)
    return cells


@pytest.mark.parametrize("name", MODULES)
def test_genotype(name):
    theirs, ours = pair(name, 4, 3)
    for _ in range(10):
        copy_arch(theirs, ours)
        genotype = ours.genotype()
        assert [genotype.normal, genotype.reduce] == published_genotype(theirs)
    assert genotype._fields == ("normal", "normal_concat", "reduce", "reduce_concat")
    assert genotype.normal_concat == genotype.reduce_concat == range(2, 6)
    assert isinstance(genotype.normal, list) and isinstance(genotype.normal[0], tuple)
    # what it prints is what `--genotype` reads
    assert parse(str(genotype)).normal == tuple(genotype.normal)


def test_other_steps_and_multiplier():
    criterion = nn.CrossEntropyLoss()
    theirs = forks.Network(4, 10, 3, criterion, 3, 2, 2)
    ours = darts.Network(4, 10, 3, criterion, 3, 2, 2)
    ours.load_state_dict(theirs.state_dict())
    copy_arch(theirs, ours)
    x, _ = batch("darts")
    assert_equal_in_double(ours.double()(x), in_double(theirs)(x))
    genotype = ours.genotype()
    assert len(genotype.normal) == 6 and genotype.normal_concat == range(3, 5)


@pytest.mark.parametrize("name", MODULES)
def test_published_attributes(name):
    criterion = nn.CrossEntropyLoss()
    module = MODULES[name]
    network = module.Network(4, 10, 3, criterion)
    names = ["alphas_normal", "alphas_reduce"]
    if name != "darts":
        names += ["betas_normal", "betas_reduce"]
    assert [id(p) for p in network.arch_parameters()] == [id(getattr(network, n)) for n in names]
    assert isinstance(network.arch_parameters(), list)
    assert [id(p) for p in network._arch_parameters] == [id(p) for p in network.arch_parameters()]
    assert network.alphas_normal.shape == (14, 8)
    ids = {id(p) for p in network.parameters()}
    assert not ids & {id(p) for p in network.arch_parameters()}
    assert set(names) <= set(network.state_dict())
    frozen = [p for p in network.parameters() if not p.requires_grad]
    assert frozen and all(p.grad is None for p in frozen)
    assert {id(p) for p in frozen} == {
        id(p) for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear)) for p in m.parameters()
    }
    assert isinstance(network.cells[0], module.Cell) and isinstance(network.cells[0]._ops[0], module.MixedOp)
    assert (network._C, network._num_classes, network._layers, network._criterion) == (4, 10, 3, criterion)
    assert (network._steps, network._multiplier) == (4, 4)
    x, y = batch(name, F32)
    torch.testing.assert_close(network._loss(x, y) + 0, criterion(network(x), y))
    kept = network.alphas_normal
    before = kept.detach().clone()
    network._initialize_alphas()
    assert network.alphas_normal is kept and not torch.equal(kept, before) and kept.abs().max() < 1e-2


@pytest.mark.parametrize("name, ours, published", [("darts", 2005114, 1930618), ("pc_darts", 319162, 299578)])
def test_parameter_counts(name, ours, published):
    def count(**options):
        network = MODULES[name].Network(16, 10, 8, None, **options)
        return sum(p.numel() for p in network.parameters())

    assert (count(), count(random_features=False)) == (ours, published)


@pytest.mark.parametrize("name", MODULES)
def test_checkpoints_to_and_from_the_native_network(name, tmp_path):
    ours = drop_in_network(name, 4, 3, steps=2, multiplier=2)
    imagenet, K = name.endswith("imagenet"), {"darts": 1, "pc_darts": 4, "pc_darts_imagenet": 2}[name]
    stem = "imagenet" if imagenet else "cifar"
    space = uniform_space("darts", DARTS_PRIMITIVES, nodes=2)
    saved = SearchNetwork(space, 4, 10, 3, stem, K=K, edge_norm=K > 1)
    freeze_random_features(saved)
    turn_affine(saved)
    x, _ = batch(name, F32)
    torch.save(saved.state_dict(), tmp_path / "saved.pt")
    ours.load_state_dict(torch.load(tmp_path / "saved.pt"), strict=True)
    assert torch.equal(ours(x), saved(x))
    ours._initialize_alphas()
    torch.save(ours.state_dict(), tmp_path / "ours.pt")
    saved.load_state_dict(torch.load(tmp_path / "ours.pt"), strict=True)
    assert torch.equal(ours.eval()(x), saved.eval()(x))


@pytest.mark.parametrize(
    "options, match",
    [
        ({"C": 0}, "C: expected a positive integer, got 0"),
        ({"layers": 0}, "layers: expected"),
        ({"steps": 0}, "steps: expected"),
        ({"multiplier": 5}, r"multiplier: expected 1 to 4 \(steps\), got 5"),
        ({"K": 3}, "K: expected a divisor of the edge's 4 channels, got 3"),
        ({"conv_init": "zeros"}, "conv_init: expected one of"),
        ({"gamma_init": "zeros"}, "gamma_init: expected one of"),
    ],
)
def test_bad_arguments(options, match):
    arguments = {"C": 4, "num_classes": 10, "layers": 3, "criterion": None} | options
    with pytest.raises(ValueError, match=match):
        pc_darts.Network(**arguments)
