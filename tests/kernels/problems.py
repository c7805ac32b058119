"""Random cells, ReLU-conv-BN layers and BatchNorms, with all that their forward and backward take.

Every number is rounded to the dtype that a problem is for, and kept in float64: the truth and a run in that
dtype start from the same values.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from rfdarts_fast.nn import MixedOp
from rfdarts_fast.nn.primitives import FactorizedReduce, ReLUConvBN
from rfdarts_fast.spaces import DARTS_PRIMITIVES, SPACES

# one of each sort; 5x5 kernels take Triton's interpreter three times as long
FEW = ("none", "max_pool_3x3", "avg_pool_3x3", "skip_connect", "sep_conv_3x3", "dil_conv_3x3")
# options of a cell
NASBENCH201: dict = dict(
    primitives=SPACES["nasbench201"].cells["cell"][0], batch_norm=False, inputs=1, nodes=3
)

# {name: tensors}: outputs, gradients, running statistics; those of all gammas have one name
Result = dict[str, list[Tensor | None]]


class Problem:
    """Modules, inputs, and gradients of the outputs.

    Attributes:
        module: the edges of a cell, or layers that read the same input.
        weights: op weights and edge weights, by name.
        grads: gradients of the outputs; None for one that the loss does not depend on.
    """

    inputs: list[Tensor]
    grads: list[Tensor | None]

    def __init__(self, modules: Sequence[nn.Module], dtype: torch.dtype, train: bool) -> None:
        self.module, self.dtype = nn.ModuleList(modules), dtype
        self.weights: dict[str, Tensor] = {}
        for part in self.module.modules():
            if isinstance(part, nn.Conv2d):
                part.requires_grad_(False)
            elif isinstance(part, nn.BatchNorm2d):
                if part.track_running_stats:
                    part.running_mean.normal_(std=0.1 if train else 1)
                    part.running_var.uniform_(0.5, 2)
                if part.affine:
                    nn.init.uniform_(part.weight, -1.5, 1.5)
                    nn.init.normal_(part.bias, std=0.3)
        self.module.to(dtype).double().train(train)

    def rounded(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).double()

    def compute(self, backend, module, inputs, *weights, **options) -> Sequence[Tensor]:
        raise NotImplementedError

    def trained(self, module: nn.ModuleList) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that get a gradient, by name."""
        return ((name, p) for name, p in module.named_parameters() if p.requires_grad)

    def leaves(
        self, backend, dtype: torch.dtype | None = None
    ) -> tuple[nn.ModuleList, list[Tensor], list[Tensor]]:
        """Copies of modules, inputs and weights on a backend's device; the same input twice is one leaf."""
        dtype = dtype or self.dtype
        parameters = backend.parameter_dtype(dtype)

        def leaf(x: Tensor, dtype: torch.dtype) -> Tensor:
            return x.detach().to(backend.device, dtype).requires_grad_()

        distinct = {id(x): leaf(x, dtype) for x in self.inputs}
        module = copy.deepcopy(self.module).to(backend.device, parameters)
        weights = [leaf(weight, parameters) for weight in self.weights.values()]
        # what `noise` draws
        torch.manual_seed(1)
        return module, [distinct[id(x)] for x in self.inputs], weights

    def run(
        self,
        backend,
        dtype: torch.dtype | None = None,
        view: Callable[[Tensor], Tensor] = lambda x: x,
        grad_view: Callable[[Tensor], Tensor] = lambda grad: grad,
        poison: bool = True,
        **options,
    ) -> Result:
        """What a backend makes of the problem in `dtype`.

        Args:
            view: makes an input from a dense leaf, whose gradient is in the result.
            grad_view: makes the gradient of an output from a dense one.
            poison: fresh memory is full of NaNs; not for plain PyTorch.
            options: `memory` and `concat` of the backend.
        """
        dtype = dtype or self.dtype
        module, inputs, weights = self.leaves(backend, dtype)
        leaves = {f"gradient of input {i}": [x] for i, x in enumerate(inputs)}
        leaves |= {f"gradient of {name}": [x] for name, x in zip(self.weights, weights, strict=True)}
        for name, parameter in self.trained(module):
            leaves.setdefault(f"gradient of {_last(name)}", []).append(parameter)
        with backend.poison(poison):
            outputs = self.compute(backend, module, [view(x) for x in inputs], *weights, **options)
            if options.get("concat"):
                [whole] = outputs
                assert whole.is_contiguous(memory_format=torch.channels_last)
                outputs = whole.chunk(len(self.grads), dim=1)
            assert all(output.dtype == dtype for output in outputs)
            pairs = [(y, grad) for y, grad in zip(outputs, self.grads, strict=True) if grad is not None]
            grads = [grad_view(grad.to(backend.device, dtype)) for _, grad in pairs]
            flat = [x for group in leaves.values() for x in group]
            found = iter(torch.autograd.grad([y for y, _ in pairs], flat, grads, allow_unused=True))
        result: Result = {f"output {i}": [output.detach()] for i, output in enumerate(outputs)}
        result |= {name: [next(found) for _ in group] for name, group in leaves.items()}
        for name, buffer in module.named_buffers():
            result.setdefault(_last(name), []).append(buffer)
        return {name: [x if x is None else x.cpu() for x in group] for name, group in result.items()}


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


class CellProblem(Problem):
    """A cell with op weights and, for K > 1 unless told otherwise, edge weights.

    Args:
        shape: N, H and W of the inputs.
        primitives: names, of every edge or edge by edge.
        batch_norm: pools have a BatchNorm behind them; of every edge or edge by edge.
        place: changes an input in place.
    """

    def __init__(
        self,
        shape: tuple[int, int, int] = (2, 8, 8),
        dtype: torch.dtype = torch.float64,
        *,
        primitives: Sequence[str] | Sequence[Sequence[str]] = DARTS_PRIMITIVES,
        channels: int = 4,
        stride: int = 1,
        K: int = 1,
        inputs: int = 2,
        nodes: int = 2,
        train: bool = True,
        affine: bool = True,
        track: bool = True,
        edge_weights: bool | None = None,
        batch_norm: bool | Sequence[bool] = True,
        place: Callable[[Tensor], object] | None = None,
    ) -> None:
        sources = [j for node in range(nodes) for j in range(inputs + node)]
        same = isinstance(primitives[0], str)
        names = [primitives] * len(sources) if same else primitives
        strides = [stride if source < inputs else 1 for source in sources]
        norms = [batch_norm] * len(sources) if isinstance(batch_norm, bool) else batch_norm
        edges = [
            MixedOp(names[edge], channels, strides[edge], K, affine, track, norms[edge])
            for edge in range(len(sources))
        ]
        super().__init__(edges, dtype, train)
        n, h, w = shape
        self.inputs = [torch.randn(n, channels, h, w) for _ in range(inputs)]
        for x in self.inputs if place else ():
            place(x)
        self.inputs = [*map(self.rounded, self.inputs)]
        op_weights = torch.randn(len(edges), len(edges[0].primitives)).softmax(-1)
        self.weights["op_weights"] = self.rounded(op_weights)
        if edge_weights if edge_weights is not None else K > 1:
            self.weights["edge_weights"] = self.rounded(torch.rand(len(edges)))
        size = n, channels, h // stride, w // stride
        self.grads = [self.rounded(torch.randn(size)) for _ in range(nodes)]

    def compute(self, backend, module, inputs, *weights, **options):
        return backend.cell(list(module), inputs, *weights, **options)


class LayerProblem(Problem):
    """ReLU-conv-BN layers that read one input: 1x1 convolutions, or with `reduce` FactorizedReduces.

    Args:
        channels: of the input, and of each layer's output.
        unused: the loss does not depend on the last output.
    """

    def __init__(
        self,
        shape: tuple[int, int, int] = (2, 6, 10),
        dtype: torch.dtype = torch.float64,
        *,
        channels: tuple[int, ...] = (6, 4),
        reduce: bool = False,
        train: bool = True,
        affine: bool = True,
        unused: bool = False,
        place: Callable[[Tensor], object] | None = None,
    ) -> None:
        c_in, *widths = channels
        layers = [
            FactorizedReduce(c_in, c, affine) if reduce else ReLUConvBN(c_in, c, 1, affine=affine)
            for c in widths
        ]
        super().__init__(layers, dtype, train)
        n, h, w = shape
        x = torch.randn(n, c_in, h, w)
        if place is not None:
            place(x)
        self.inputs = [self.rounded(x)]
        stride = 2 if reduce else 1
        self.grads = [self.rounded(torch.randn(n, c, h // stride, w // stride)) for c in widths]
        if unused:
            self.grads[-1] = None

    def compute(self, backend, module, inputs, **options):
        [x] = inputs
        return backend.layers(x, [part.layer() for part in module], **options)

    def trained(self, module):
        used = nn.ModuleList(part for part, grad in zip(module, self.grads, strict=True) if grad is not None)
        return super().trained(used)


class NormProblem(Problem):
    """A BatchNorm by itself, or with the ReLU behind it."""

    def __init__(
        self,
        shape: tuple[int, int, int, int] = (3, 6, 5, 7),
        dtype: torch.dtype = torch.float64,
        *,
        relu: bool = False,
        train: bool = True,
        affine: bool = True,
        track: bool = True,
        place: Callable[[Tensor], object] | None = None,
    ) -> None:
        norm = nn.BatchNorm2d(shape[1], affine=affine, track_running_stats=track)
        super().__init__([norm], dtype, train)
        self.relu = relu
        x = torch.randn(shape)
        if place is not None:
            place(x)
        self.inputs = [self.rounded(x)]
        self.grads = [self.rounded(torch.randn(shape))]

    def compute(self, backend, module, inputs, **options):
        return [backend.batch_norm(inputs[0], module[0], self.relu, **options)]
