"""The NAS-Bench-201 macro skeleton, around the supernet's cells and around a derived cell.

Source: D-X-Y/AutoDL-Projects xautodl/models/cell_searchs/generic_model.py and cell_infers/tiny_network.py.
"""

from __future__ import annotations

from torch import Tensor, nn

from rfdarts_fast import ops
from rfdarts_fast.nn.primitives import ReLUConvBN, make_primitive
from rfdarts_fast.nn.supernet import MixedOp, Supernet
from rfdarts_fast.spaces import CellGenotype, Space


class ResidualBlock(nn.Module):
    """ResNet basic block of stride 2 between two stages; its BatchNorms are always affine."""

    def __init__(self, c_in: int, c_out: int, track: bool = True) -> None:
        super().__init__()
        self.conv_a = ReLUConvBN(c_in, c_out, 3, 2, 1, True, track)
        self.conv_b = ReLUConvBN(c_out, c_out, 3, 1, 1, True, track)
        self.downsample = nn.Sequential(nn.AvgPool2d(2, 2), nn.Conv2d(c_in, c_out, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(x) + self.conv_b(self.conv_a(x))


class NasBench201SearchCell(nn.Module):
    """Four states, six mixed ops; the output is the last state."""

    def __init__(self, space: Space, c: int, affine: bool, track: bool) -> None:
        super().__init__()
        edges = space.cells["cell"]
        self._ops = nn.ModuleList(
            MixedOp(names, c, 1, affine=affine, track=track, batch_norm=False) for names in edges
        )

    def forward(self, x: Tensor, op_weights: Tensor) -> Tensor:
        return ops.mixed_cell([*self._ops], [x], op_weights)[-1]  # type: ignore[list-item]


class NasBench201Cell(nn.Module):
    """A derived cell: one primitive on each of six edges; the output is the last state."""

    def __init__(self, genotype: CellGenotype, c: int) -> None:
        super().__init__()
        self._ops = nn.ModuleList(make_primitive(name, c, 1) for name in genotype.edges)

    def forward(self, x: Tensor) -> Tensor:
        states, edges = [x], iter(self._ops)
        for _ in range(3):
            terms = [op(state) for state, op in zip(states, edges, strict=False)]
            states.append(sum(terms[1:], terms[0]))
        return states[-1]


def _skeleton(make_cell, C: int, N: int, track: bool) -> tuple[nn.Sequential, nn.ModuleList, nn.Sequential]:
    stem = nn.Sequential(
        nn.Conv2d(3, C, 3, padding=1, bias=False), nn.BatchNorm2d(C, track_running_stats=track)
    )
    cells = nn.ModuleList()
    for stage, c in enumerate((C, 2 * C, 4 * C)):
        if stage:
            cells.append(ResidualBlock(c // 2, c, track))
        cells.extend(make_cell(c) for _ in range(N))
    lastact = nn.Sequential(nn.BatchNorm2d(4 * C, track_running_stats=track), nn.ReLU())
    return stem, cells, lastact


class NasBench201SearchNetwork(Supernet):
    """The NAS-Bench-201 supernet: one table of alphas [6, 5] shared by all cells.

    Args:
        C: channels of the first stage; doubled twice.
        N: cells in each of the three stages.
        affine: gamma and beta in the cells' BatchNorms; elsewhere they always exist.
    """

    def __init__(
        self,
        space: Space,
        C: int = 16,
        num_classes: int = 10,
        N: int = 5,
        affine: bool = True,
        track_running_stats: bool = False,
    ) -> None:
        super().__init__(space)
        if space.inputs != 1:
            raise ValueError(f"space: expected one of the NAS-Bench-201 family, got {space.name!r}")
        self.stem, self.cells, self.lastact = _skeleton(
            lambda c: NasBench201SearchCell(space, c, affine, track_running_stats), C, N, track_running_stats
        )
        self.global_pooling = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(4 * C, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 3, H, W] -> logits [N, num_classes]."""
        op_weights, _ = self.cell_weights("cell")
        x = self.stem(x)
        for cell in self.cells:
            x = cell(x, op_weights) if isinstance(cell, NasBench201SearchCell) else cell(x)
        return self.classifier(self.global_pooling(self.lastact(x)).flatten(1))


class NasBench201Network(nn.Module):
    """The network that the benchmark trains for a genotype."""

    def __init__(self, genotype: CellGenotype, C: int = 16, num_classes: int = 10, N: int = 5) -> None:
        super().__init__()
        self.stem, self.cells, self.lastact = _skeleton(lambda c: NasBench201Cell(genotype, c), C, N, True)
        self.global_pooling = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(4 * C, num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Images [N, 3, H, W] -> logits [N, num_classes], and None in place of auxiliary logits."""
        x = self.stem(x)
        for cell in self.cells:
            x = cell(x)
        return self.classifier(self.global_pooling(self.lastact(x)).flatten(1)), None
