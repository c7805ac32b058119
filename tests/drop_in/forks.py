"""Supernets as other people's forks have them, written for these tests from the published descriptions.

They share no code with the package. Class, attribute and parameter names are the published ones:
quark0/darts, PC-DARTS (K > 1, with or without the ImageNet stem), RobustDARTS (primitives per edge, drop
path) and the NAS-Bench-201 supernet of AutoDL-Projects. BatchNorms inside cells have no gamma and beta.
"""

import torch
import torch.nn.functional as F
from torch import nn

PRIMITIVES = [
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
]


class Zero(nn.Module):
    def __init__(self, stride):
        super().__init__()
        self.stride = stride

    def forward(self, x):
        return torch.zeros_like(x[..., :: self.stride, :: self.stride])


class Identity(nn.Module):
    def forward(self, x):
        return x


class NoiseOp(nn.Module):
    def __init__(self, stride, mean=0.0, std=1.0):
        super().__init__()
        self.stride, self.mean, self.std = stride, mean, std

    def forward(self, x):
        x = x[..., :: self.stride, :: self.stride]
        return torch.empty_like(x).normal_(self.mean, self.std)


class ReLUConvBN(nn.Module):
    def __init__(self, c_in, c_out, k, stride=1, padding=0, affine=False):
        super().__init__()
        conv = nn.Conv2d(c_in, c_out, k, stride=stride, padding=padding, bias=False)
        self.op = nn.Sequential(nn.ReLU(inplace=False), conv, nn.BatchNorm2d(c_out, affine=affine))

    def forward(self, x):
        return self.op(x)


def separable(c, k, stride, dilation):
    padding = dilation * (k // 2)
    return [
        nn.ReLU(inplace=False),
        nn.Conv2d(c, c, k, stride=stride, padding=padding, dilation=dilation, groups=c, bias=False),
        nn.Conv2d(c, c, kernel_size=1, bias=False),
        nn.BatchNorm2d(c, affine=False),
    ]


class DilConv(nn.Module):
    def __init__(self, c, k, stride):
        super().__init__()
        self.op = nn.Sequential(*separable(c, k, stride, 2))

    def forward(self, x):
        return self.op(x)


class SepConv(nn.Module):
    def __init__(self, c, k, stride):
        super().__init__()
        self.op = nn.Sequential(*separable(c, k, stride, 1), *separable(c, k, 1, 1))

    def forward(self, x):
        return self.op(x)


class FactorizedReduce(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.relu = nn.ReLU(inplace=False)
        self.conv_1 = nn.Conv2d(c_in, c_out // 2, 1, stride=2, bias=False)
        self.conv_2 = nn.Conv2d(c_in, c_out // 2, 1, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(c_out, affine=False)

    def forward(self, x):
        x = F.relu(x)
        shifted = x[:, :, 1:, 1:]
        return self.bn(torch.cat((self.conv_1(x), self.conv_2(shifted)), 1))


OPS = {
    "none": lambda c, s: Zero(s),
    "noise": lambda c, s: NoiseOp(s),
    "max_pool_3x3": lambda c, s: nn.MaxPool2d(3, stride=s, padding=1),
    "avg_pool_3x3": lambda c, s: nn.AvgPool2d(3, stride=s, padding=1, count_include_pad=False),
    "skip_connect": lambda c, s: Identity() if s == 1 else FactorizedReduce(c, c),
    "sep_conv_3x3": lambda c, s: SepConv(c, 3, s),
    "sep_conv_5x5": lambda c, s: SepConv(c, 5, s),
    "dil_conv_3x3": lambda c, s: DilConv(c, 3, s),
    "dil_conv_5x5": lambda c, s: DilConv(c, 5, s),
}


class MixedOp(nn.Module):
    def __init__(self, C, stride, primitives=PRIMITIVES, k=1):
        super().__init__()
        self._ops = nn.ModuleList()
        if k > 1:
            self.mp = nn.MaxPool2d(2, 2)
            self.k = k
        for name in primitives:
            op = OPS[name](C // k, stride)
            if "pool" in name:
                op = nn.Sequential(op, nn.BatchNorm2d(C // k, affine=False))
            self._ops.append(op)

    def forward(self, x, weights):
        k = getattr(self, "k", 1)
        head, tail = x.split([x.shape[1] // k, x.shape[1] - x.shape[1] // k], dim=1)
        out = sum(w * op(head) for w, op in zip(weights, self._ops, strict=True))
        if k == 1:
            return out
        out = torch.cat([out, tail if out.shape[2] == x.shape[2] else self.mp(tail)], dim=1)
        groups = out.unflatten(1, (k, -1))
        return groups.transpose(1, 2).flatten(1, 2)


class Cell(nn.Module):
    def __init__(self, steps, multiplier, cpp, cp, c, reduction, reduction_prev, primitives=None, k=1):
        super().__init__()
        self.reduction = reduction
        self.preprocess0 = FactorizedReduce(cpp, c) if reduction_prev else ReLUConvBN(cpp, c, 1)
        self.preprocess1 = ReLUConvBN(cp, c, 1)
        self._steps = steps
        self._multiplier = multiplier
        self._ops = nn.ModuleList()
        self._bns = nn.ModuleList()
        for i in range(steps):
            for j in range(2 + i):
                names = PRIMITIVES if primitives is None else primitives[len(self._ops)]
                self._ops.append(MixedOp(c, 2 if reduction and j < 2 else 1, names, k))

    def forward(self, s0, s1, weights, weights2=None):
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        edge = 0
        for _ in range(self._steps):
            node = 0
            for h in states:
                out = self._ops[edge](h, weights[edge])
                node = node + (out if weights2 is None else weights2[edge] * out)
                edge += 1
            states.append(node)
        return torch.cat(states[-self._multiplier :], dim=1)


class RobustCell(Cell):
    """RobustDARTS: drop path over whole edges."""

    def forward(self, s0, s1, weights, drop_prob=0.0):
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        edge = 0
        for _ in range(self._steps):
            node = 0
            for h in states:
                out = self._ops[edge](h, weights[edge])
                if drop_prob > 0.0 and self.training:
                    keep = 1.0 - drop_prob
                    out = out / keep * torch.empty(len(out), 1, 1, 1).bernoulli_(keep).to(out)
                node = node + out
                edge += 1
            states.append(node)
        return torch.cat(states[-self._multiplier :], dim=1)


class Network(nn.Module):
    cell = Cell

    def __init__(
        self,
        C,
        num_classes,
        layers,
        criterion,
        steps=4,
        multiplier=4,
        stem_multiplier=3,
        k=1,
        imagenet=False,
        primitives=None,
    ):
        super().__init__()
        self._C, self._num_classes, self._layers, self._criterion = C, num_classes, layers, criterion
        self._steps, self._multiplier, self._k = steps, multiplier, k
        self._primitives = primitives
        c = stem_multiplier * C
        if imagenet:
            self.stem0 = nn.Sequential(
                nn.Conv2d(3, c // 2, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(c // 2),
                nn.ReLU(inplace=True),
                nn.Conv2d(c // 2, c, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(c),
            )
            self.stem1 = nn.Sequential(
                nn.ReLU(inplace=True),
                nn.Conv2d(c, c, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(c),
            )
        else:
            self.stem = nn.Sequential(nn.Conv2d(3, c, 3, padding=1, bias=False), nn.BatchNorm2d(c))
        cpp, cp, c = c, c, C
        self.cells = nn.ModuleList()
        reduction_prev = imagenet
        for i in range(layers):
            reduction = i in (layers // 3, 2 * layers // 3)
            if reduction:
                c *= 2
            names = primitives and primitives["reduce" if reduction else "normal"]
            self.cells.append(self.cell(steps, multiplier, cpp, cp, c, reduction, reduction_prev, names, k))
            reduction_prev = reduction
            cpp, cp = cp, multiplier * c
        self.global_pooling = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(cp, num_classes)
        self._initialize_alphas()

    def _initialize_alphas(self):
        edges = sum(2 + i for i in range(self._steps))
        n = len(self._primitives["normal"][0]) if self._primitives else len(PRIMITIVES)
        # leaves that are no parameters, as published
        self.alphas_normal = (1e-3 * torch.randn(edges, n)).requires_grad_()
        self.alphas_reduce = (1e-3 * torch.randn(edges, n)).requires_grad_()
        self._arch_parameters = [self.alphas_normal, self.alphas_reduce]
        if self._k > 1:
            self.betas_normal = (1e-3 * torch.randn(edges)).requires_grad_()
            self.betas_reduce = (1e-3 * torch.randn(edges)).requires_grad_()
            self._arch_parameters += [self.betas_normal, self.betas_reduce]

    def arch_parameters(self):
        return self._arch_parameters

    def _edge_weights(self, betas):
        sizes = [2 + i for i in range(self._steps)]
        return torch.cat([part.softmax(0) for part in betas.split(sizes)])

    def forward(self, input):
        if hasattr(self, "stem"):
            s0 = s1 = self.stem(input)
        else:
            s0 = self.stem0(input)
            s1 = self.stem1(s0)
        for cell in self.cells:
            cell_type = "reduce" if cell.reduction else "normal"
            args = [getattr(self, f"alphas_{cell_type}").softmax(-1)]
            if self._k > 1:
                args.append(self._edge_weights(getattr(self, f"betas_{cell_type}")))
            s0, s1 = s1, cell(s0, s1, *args)
        return self.classifier(self.global_pooling(s1).flatten(1))

    def _loss(self, input, target):
        return self._criterion(self(input), target)

    def new(self):
        shape = self._C, self._num_classes, self._layers, self._criterion, self._steps, self._multiplier
        other = type(self)(*shape, k=self._k)
        other = other.to(self.classifier.weight)
        for mine, its in zip(self.arch_parameters(), other.arch_parameters(), strict=True):
            its.data = mine.data.clone()
        return other


class RobustNetwork(Network):
    cell = RobustCell
    drop_path_prob = 0.0

    def forward(self, input):
        s0 = s1 = self.stem(input)
        for cell in self.cells:
            alphas = self.alphas_reduce if cell.reduction else self.alphas_normal
            s0, s1 = s1, cell(s0, s1, alphas.softmax(-1), self.drop_path_prob)
        return self.classifier(self.global_pooling(s1).flatten(1))


class BiasedReLUConvBN(nn.Module):
    """AutoDL-Projects: the convolution has a bias where the BatchNorm has no gamma and beta."""

    def __init__(self, c, k, affine, track):
        super().__init__()
        conv = nn.Conv2d(
            c, c, (k, k), stride=(1, 1), padding=(k // 2, k // 2), dilation=(1, 1), bias=not affine
        )
        self.op = nn.Sequential(
            nn.ReLU(inplace=False), conv, nn.BatchNorm2d(c, affine=affine, track_running_stats=track)
        )

    def forward(self, x):
        return self.op(x)


class POOLING(nn.Module):
    def __init__(self):
        super().__init__()
        self.preprocess = None
        self.op = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)

    def forward(self, x):
        return self.op(x)


class NAS201SearchCell(nn.Module):
    def __init__(self, c, max_nodes=4, affine=False, track=True):
        super().__init__()
        self.op_names = ["none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3"]
        self.edges = nn.ModuleDict()
        self.max_nodes, self.in_dim, self.out_dim = max_nodes, c, c
        for i in range(1, max_nodes):
            for j in range(i):
                self.edges[f"{i}<-{j}"] = nn.ModuleList(
                    [
                        Zero(1),
                        Identity(),
                        BiasedReLUConvBN(c, 1, affine, track),
                        BiasedReLUConvBN(c, 3, affine, track),
                        POOLING(),
                    ]
                )
        self.edge_keys = sorted(self.edges.keys())
        self.edge2index = {key: i for i, key in enumerate(self.edge_keys)}
        self.num_edges = len(self.edges)

    def forward(self, inputs, weightss):
        nodes = [inputs]
        for i in range(1, self.max_nodes):
            terms = []
            for j in range(i):
                key = f"{i}<-{j}"
                weights = weightss[self.edge2index[key]]
                terms.append(sum(w * op(nodes[j]) for w, op in zip(weights, self.edges[key], strict=True)))
            nodes.append(sum(terms))
        return nodes[-1]

    def forward_joint(self, inputs, weightss):
        return NAS201SearchCell.forward(self, inputs, weightss)


class TinyNetwork(nn.Module):
    """Two NAS-Bench-201 cells around a residual block; knows its search cells by their class."""

    def __init__(self, C=4, num_classes=10, track=True):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, C, 3, padding=1, bias=False), nn.BatchNorm2d(C))
        down = nn.Sequential(nn.ReLU(), nn.Conv2d(C, 2 * C, 3, 2, 1, bias=False), nn.BatchNorm2d(2 * C))
        self.cells = nn.ModuleList(
            [NAS201SearchCell(C, track=track), down, NAS201SearchCell(2 * C, track=track)]
        )
        self.classifier = nn.Linear(2 * C, num_classes)
        self.arch_parameters = nn.Parameter(1e-3 * torch.randn(6, 5))

    def forward(self, x):
        x = self.stem(x)
        for cell in self.cells:
            x = cell(x, self.arch_parameters.softmax(-1)) if isinstance(cell, NAS201SearchCell) else cell(x)
        return self.classifier(x.mean((2, 3)))
