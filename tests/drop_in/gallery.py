"""One small supernet for each family of forks, written for these tests from the forks' published structure.

Each has what its fork does otherwise than quark0/darts, and little else. Operations are those of `forks`.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .forks import OPS, FactorizedReduce, Identity, ReLUConvBN

NAMES = ["none", "max_pool_3x3", "skip_connect", "sep_conv_3x3"]


class PoolBN(nn.Module):
    """FairDARTS: a pool and its BatchNorm in a module of their own."""

    def __init__(self, pool, c):
        super().__init__()
        self.pool, self.bn = pool, nn.BatchNorm2d(c, affine=False)

    def forward(self, x):
        return self.bn(self.pool(x))


class MaxPoolBN(nn.Module):
    """The same, in a sequence called `op`."""

    def __init__(self, pool, c):
        super().__init__()
        self.op = nn.Sequential(pool, nn.BatchNorm2d(c, affine=False))

    def forward(self, x):
        return self.op(x)


def pool_in(wrapper):
    def make(name, c, stride):
        op = OPS[name](c, stride)
        return wrapper(op, c) if "pool" in name else op

    return make


def in_sequence(pool, c):
    return nn.Sequential(pool, nn.BatchNorm2d(c, affine=False))


make_op = pool_in(in_sequence)


class MixedOp(nn.Module):
    """quark0/darts, with the list and the pools of each fork."""

    attribute, make = "_ops", staticmethod(make_op)
    K = 1

    def __init__(self, c, stride):
        super().__init__()
        made = nn.ModuleList(self.make(name, c // self.K, stride) for name in NAMES)
        setattr(self, self.attribute, made)

    @property
    def candidates(self):
        return getattr(self, self.attribute)

    def forward(self, x, weights):
        return sum(w * op(x) for w, op in zip(weights, self.candidates, strict=True))


class Wrapped(MixedOp):
    """FairDARTS and others."""

    attribute, make = "layers", staticmethod(pool_in(PoolBN))


class Extra(MixedOp):
    """A third argument with a default, which chooses one operation."""

    attribute, make = "cell_ops", staticmethod(pool_in(MaxPoolBN))

    def forward(self, x, weights, selected_idx=None):
        if selected_idx is None:
            return super().forward(x, weights)
        return self.candidates[selected_idx](x)


class Skipping(MixedOp):
    """darts-pt and DrNAS: what has been projected away is not run."""

    attribute = "m_ops"

    def forward(self, x, weights):
        return sum(w * op(x) for w, op in zip(weights, self.candidates, strict=True) if w != 0)


class Sampling(MixedOp):
    """GDAS: hard weights, of which one is positive, or two."""

    def forward(self, x, weights):
        return sum(w * op(x) for w, op in zip(weights, self.candidates, strict=True) if w > 0)


class Unshuffled(MixedOp):
    """Partial channels that stay where they are."""

    K = 2

    def forward(self, x, weights):
        mixed, bypass = x.chunk(2, dim=1)
        mixed = super().forward(mixed, weights)
        return torch.cat([mixed, bypass if mixed.shape[2] == x.shape[2] else F.max_pool2d(bypass, 2)], dim=1)


class AuxiliarySkip(MixedOp):
    """DARTS-: a skip connection beside the operations, whose weight decays to 0."""

    def __init__(self, c, stride):
        super().__init__(c, stride)
        self.skip = Identity() if stride == 1 else FactorizedReduce(c, c)
        self.beta = 0.0

    def forward(self, x, weights):
        return super().forward(x, weights) + self.beta * self.skip(x)


class Cell(nn.Module):
    """Two nodes, of which both are the output."""

    mixed_op = MixedOp

    def __init__(self, cpp, cp, c, reduction):
        super().__init__()
        self.reduction = reduction
        self.preprocess0, self.preprocess1 = ReLUConvBN(cpp, c, 1), ReLUConvBN(cp, c, 1)
        self.make_edges(c)

    def stride(self, source):
        return 2 if self.reduction and source < 2 else 1

    def make_edges(self, c):
        self._ops = nn.ModuleList(
            self.mixed_op(c, self.stride(source)) for node in range(2) for source in range(2 + node)
        )

    def edge(self, node, source, x, weights):
        i = 2 * node + source
        return self._ops[i](x, weights[i])

    def forward(self, s0, s1, weights):
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        for node in range(2):
            terms = [self.edge(node, source, x, weights) for source, x in enumerate(states)]
            states.append(sum(terms))
        return torch.cat(states[2:], dim=1)


class CellOfLists(Cell):
    """Lists of lists of lists, and no module for an edge."""

    def make_edges(self, c):
        self.nodes = nn.ModuleList(
            nn.ModuleList(
                nn.ModuleList(make_op(name, c, self.stride(source)) for name in NAMES)
                for source in range(2 + node)
            )
            for node in range(2)
        )

    def edge(self, node, source, x, weights):
        of_edge = weights[2 * node + source]
        return sum(w * op(x) for w, op in zip(of_edge, self.nodes[node][source], strict=True))


def run_edge(edge, x, weights):
    return edge(weights=weights, x=x)


class CellWithFunction(Cell):
    """Edges in lists by node, called by a function and by keyword; its output is another one."""

    mixed_op = Wrapped

    def make_edges(self, c):
        self.dag = nn.ModuleList(
            nn.ModuleList(self.mixed_op(c, self.stride(source)) for source in range(2 + node))
            for node in range(2)
        )

    def edge(self, node, source, x, weights):
        return run_edge(self.dag[node][source], x, weights[2 * node + source])

    def forward(self, s0, s1, weights):
        return 0.5 * super().forward(s0, s1, weights)


def drop_path(x, drop_prob):
    """RobustDARTS: in place."""
    if drop_prob > 0.0:
        keep = 1.0 - drop_prob
        x.div_(keep)
        x.mul_(torch.empty(len(x), 1, 1, 1, dtype=x.dtype).bernoulli_(keep))
    return x


class CellWithDropPath(Cell):
    def forward(self, s0, s1, weights, drop_prob=0.0, epoch=None):
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        for node in range(2):
            terms = [self.edge(node, source, x, weights) for source, x in enumerate(states)]
            states.append(sum(drop_path(term, drop_prob) if self.training else term for term in terms))
        return torch.cat(states[2:], dim=1)


class WrappedCell(Cell):
    mixed_op = Wrapped


class ExtraCell(Cell):
    mixed_op = Extra


class SkippingCell(Cell):
    mixed_op = Skipping


class SamplingCell(Cell):
    mixed_op = Sampling


class UnshuffledCell(Cell):
    mixed_op = Unshuffled


class AuxiliarySkipCell(Cell):
    mixed_op = AuxiliarySkip


class Network(nn.Module):
    """A normal and a reduction cell. The optimiser is built in the constructor, as in darts-pt."""

    def __init__(self, cell, c=4, optimizer=False):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6))
        self.cells = nn.ModuleList([cell(6, 6, c, False), cell(6, 2 * c, c, True)])
        self.classifier = nn.Linear(2 * c, 5)
        self.alphas = [(0.1 * torch.randn(5, len(NAMES))).requires_grad_() for _ in self.cells]
        self.kept = torch.ones(2, 5, len(NAMES))
        self.cell_arguments = {}
        if optimizer:
            self.optimizers = {"weights": [torch.optim.SGD(self.parameters(), 0.1)]}
            self.alpha_optimizer = torch.optim.Adam(self.alphas)

    def arch_parameters(self):
        return self.alphas

    def forward(self, x):
        s0 = s1 = self.stem(x)
        for cell, alphas, kept in zip(self.cells, self.alphas, self.kept, strict=True):
            weights = alphas.softmax(-1).to(x) * kept.to(x)
            s0, s1 = s1, cell(s0, s1, weights, **self.cell_arguments)
        return self.classifier(s1.mean((2, 3)))


class NetworkOfEdges(nn.Module):
    """A network that calls its edges itself; some it never calls."""

    def __init__(self, c=4):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, c, 3, padding=1, bias=False), nn.BatchNorm2d(c))
        self.edges = nn.ModuleList(Extra(c, 1) for _ in range(3))
        self.classifier = nn.Linear(c, 5)
        self.alphas = [(0.1 * torch.randn(3, len(NAMES))).requires_grad_()]

    def arch_parameters(self):
        return self.alphas

    def forward(self, x):
        x = self.stem(x)
        for edge, weights in zip(self.edges[:2], self.alphas[0].softmax(-1).to(x), strict=False):
            x = x + edge(x, weights)
        return self.classifier(x.mean((2, 3)))


GALLERY = {
    "quark0/darts": lambda c=4: Network(Cell, c),
    "wrapped pools": lambda c=4: Network(WrappedCell, c),
    "extra argument": lambda c=4: Network(ExtraCell, c),
    "zero weights": lambda c=4: Network(SkippingCell, c),
    "sampling": lambda c=4: sampled(Network(SamplingCell, c)),
    "pruned": lambda c=4: pruned(Network(SamplingCell, c), [3, 2, 3, 1, 2]),
    "unshuffled": lambda c=4: Network(UnshuffledCell, c),
    "lists of lists": lambda c=4: Network(CellOfLists, c),
    "function": lambda c=4: Network(CellWithFunction, c),
    "drop path": lambda c=4: Network(CellWithDropPath, c),
    "edges of a network": NetworkOfEdges,
    "constructor optimizer": lambda c=4: Network(Cell, c, optimizer=True),
}


def sampled(network):
    """One operation left on each edge of the first cell, and two of the second."""
    one = F.one_hot(torch.tensor([3, 1, 3, 2, 0]), len(NAMES))
    network.kept[0] = one
    network.kept[1] = one + one.roll(1, 1)
    return network


def pruned(network, chosen):
    """One operation left on each edge, and `none` beside it: a list of one is no mixed op."""
    for cell in network.cells:
        for edge, op in zip(cell._ops, chosen, strict=True):
            edge._ops = nn.ModuleList([edge._ops[NAMES.index("none")], edge._ops[op]])
    network.alphas = [torch.zeros(5, 2, requires_grad=True) for _ in network.cells]
    network.kept = torch.ones(2, 5, 2)
    return network
