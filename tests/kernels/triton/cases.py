"""Random cells for the Triton backend, with any primitives."""

import torch

from rfdarts_fast.nn import MixedOp
from rfdarts_fast.ops.dtypes import parameter_dtype
from rfdarts_fast.spaces import DARTS_PRIMITIVES
from tests.kernels.cuda.emulated import Case, errors
from tests.kernels.triton.call import mixed_cell
from tests.kernels.triton.device import DEVICE

# one of each kind; 5x5 kernels take the interpreter three times as long
FEW = ("none", "max_pool_3x3", "avg_pool_3x3", "skip_connect", "sep_conv_3x3", "dil_conv_3x3")
ALL = DARTS_PRIMITIVES


class Cell(Case):
    """A cell of one or more nodes, in float64, rounded so that `dtype` holds every value exactly."""

    def __init__(
        self, shape=(2, 4, 6), dtype=torch.float64, primitives=FEW, channels=4, stride=1, K=1, inputs=1,
        nodes=1,
        train=True, affine=True, track=True,
    ):  # fmt: skip
        self.edges = torch.nn.ModuleList()
        for node in range(nodes):
            for j in range(inputs + node):
                names = primitives if isinstance(primitives[0], str) else primitives[len(self.edges)]
                self.edges.append(MixedOp(names, channels, stride if j < inputs else 1, K, affine, track))
        for module in self.edges.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.requires_grad_(False)
            elif isinstance(module, torch.nn.BatchNorm2d):
                if module.track_running_stats:
                    module.running_mean.normal_()
                    module.running_var.uniform_(0.5, 2)
                if module.affine:
                    torch.nn.init.uniform_(module.weight, -1.5, 1.5)
                    torch.nn.init.normal_(module.bias, 0, 0.3)
        self.edges = self.edges.to(dtype).double().train(train)
        n, h, w = shape
        count = len(self.edges)
        self.inputs = [torch.randn(n, channels, h, w).to(dtype).double() for _ in range(inputs)]
        self.weights = torch.randn(count, len(self.edges[0].primitives)).softmax(-1).to(dtype).double()
        self.edge_weights = torch.rand(count).to(dtype).double() if K > 1 else None
        self.dtype = dtype

    def ours(self, dtype=None, engine=mixed_cell, **options):
        dtype = dtype or self.dtype
        # the interpreter writes no attributes that tests read, so that a cell can run twice
        torch.manual_seed(1)
        return self.run(engine, dtype, parameter_dtype(dtype), device=DEVICE, **options)

    def reference(self, dtype=torch.float64):
        torch.manual_seed(1)
        return super().reference(dtype)


def assert_exact(cell, limit=1e-10, **options):
    found = errors(cell.ours(**options), cell.reference())
    assert all(error < limit for error in found.values()), found


def assert_equal(found, expected):
    """Bit for bit."""
    for name, group in expected.items():
        for a, b in zip(found[name], group, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, msg=name)
