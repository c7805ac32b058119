"""A process of two that share each batch: `python -m tests.kernels.processes`, with what torchrun sets.

Each runs every case and compares what both have computed with what one would have; the first prints, case by
case, the error that there was, or nothing.
"""

import functools
import json
import os
import traceback
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from rfdarts_fast.ops import backends
from rfdarts_fast.ops.synchronised import synchronise_batch_norms
from tests.kernels import emulation
from tests.kernels.oracles import CPUKernels, Kernels, Oracle
from tests.kernels.problems import FEW, NASBENCH201, CellProblem, LayerProblem
from tests.kernels.tolerances import TRUTH, assert_as_good_as_torch, errors

# before anything else can load triton without its interpreter
from tests.kernels.triton import device as triton_device


class _Summed(torch.autograd.Function):
    """A tensor that all processes have; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return _Gathered.sum(grad)


class _Gathered(torch.autograd.Function):
    """The images of all processes, from those of each."""

    @staticmethod
    def forward(ctx, part, first, images):
        ctx.place = slice(first, first + len(part))
        whole = part.new_zeros(images, *part.shape[1:])
        whole[ctx.place] = part
        return _Gathered.sum(whole).contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx, grad):
        return grad[ctx.place], None, None

    @staticmethod
    def sum(x: Tensor) -> Tensor:
        total = x.contiguous().clone()
        dist.all_reduce(total)
        return total


class Shared:
    """Kernels, or plain PyTorch, of which each process computes a part, the second the larger."""

    def shared(self, modules, inputs, weights, compute):
        for module in modules:
            synchronise_batch_norms(module)
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.register_hook(_Gathered.sum)
        images = len(inputs[0])
        cut = images // 3
        first, last = ((0, cut), (cut, images))[dist.get_rank()]
        # one leaf, however often it is an input
        parts = {id(x): _Summed.apply(x)[first:last] for x in inputs}
        outputs = compute([parts[id(x)] for x in inputs], *map(_Summed.apply, weights))
        return [_Gathered.apply(output, first, images) for output in outputs]

    def cell(self, edges, inputs, *weights, **options):
        cell = partial(super().cell, edges, **options)
        return self.shared(edges, inputs, weights, cell)

    def layers(self, x, layers, **options):
        compute = super().layers
        modules = [module for layer in layers for module in (*layer.convs, layer.norm)]
        # what `synchronise_batch_norms` leaves of a norm is the same object
        return self.shared(
            [torch.nn.ModuleList(modules)], [x], [], lambda xs: compute(xs[0], layers, **options)
        )


class SharedOracle(Shared, Oracle):
    pass


class SharedTriton(Shared, Kernels):
    pass


class SharedKernels(Shared, CPUKernels):
    pass


class SharedEmulated(Shared, emulation.EmulatedKernels):
    pass


# where there is one, the emulated CUDA kernels
LIBRARY = "RFDARTS_TEST_EMULATED"
# how an error begins that is none
MISSING = "missing: "

DEEP = dict(shape=(5, 6, 6), nodes=4)
CELLS = {
    "float64": DEEP,
    "float32": dict(dtype=torch.float32, **DEEP),
    "reduction": dict(stride=2, shape=(4, 8, 6)),
    "partial channels": dict(K=4, channels=16, dtype=torch.float32, shape=(4, 5, 7)),
    "without affine": dict(affine=False, shape=(3, 5, 5)),
    "without running statistics": dict(track=False, shape=(3, 5, 5)),
    "evaluation": dict(train=False, shape=(3, 5, 5)),
    "NAS-Bench-201": dict(**NASBENCH201, shape=(4, 6, 6)),
}
OPTIONS = {
    "recompute": (CELLS["float64"], dict(memory="recompute")),
    "concatenated": (CELLS["float64"], dict(concat=True)),
}
LAYERS = {
    "layers": dict(shape=(5, 6, 4), channels=(6, 4, 8)),
    "layers in float32": dict(shape=(5, 6, 4), channels=(6, 4, 8), dtype=torch.float32),
    "layers that halve": dict(shape=(5, 6, 4), channels=(6, 4), reduce=True),
    "layers without affine": dict(shape=(5, 6, 4), channels=(6, 4), affine=False),
}
TRITON = {
    "Triton, float64": dict(primitives=FEW, shape=(3, 4, 4)),
    "Triton, float32": dict(primitives=FEW, shape=(3, 4, 4), dtype=torch.float32, K=2),
    "Triton, reduction": dict(primitives=FEW, shape=(3, 4, 4), stride=2),
    "Triton, NAS-Bench-201": dict(**NASBENCH201, shape=(3, 4, 4)),
}


class Missing(Exception):
    """The reason why a case cannot run here."""


def of_triton(problem):
    if triton_device.MISSING is not None:
        raise Missing(triton_device.MISSING)
    os.environ[triton_device.SWITCH] = "1"
    assert_as_good_as_torch(SharedTriton(backends()["triton"]), problem)


EMULATED = {
    "emulated, float64": dict(primitives=FEW, shape=(3, 6, 6), nodes=3),
    "emulated, bfloat16": dict(primitives=FEW, shape=(3, 8, 8), dtype=torch.bfloat16, channels=16),
    "emulated, reduction": dict(primitives=FEW, shape=(3, 8, 4), stride=2, K=2, channels=8),
    "emulated, NAS-Bench-201": dict(**NASBENCH201, shape=(3, 5, 4), dtype=torch.float32),
}
EMULATED_LAYERS = {
    "emulated layers": dict(shape=(5, 6, 4), channels=(6, 4, 8)),
    "emulated layers that halve": dict(shape=(3, 6, 4), channels=(6, 4), reduce=True, dtype=torch.float32),
}


@functools.cache
def emulated():
    return SharedEmulated(Path(os.environ[LIBRARY]))


def of_emulated(problem):
    if LIBRARY not in os.environ:
        raise Missing(f"needs the emulated kernels in {LIBRARY}")
    assert_as_good_as_torch(emulated(), problem)


def of_kernels(problem, **options):
    assert_as_good_as_torch(SharedKernels(backends()["cpu"]), problem, **options)


def of_plain_pytorch(problem):
    found, truth = problem.run(SharedOracle(), poison=False), problem.run(TRUTH)
    for name, error in errors(found, truth).items():
        assert error.max() < 1e-10, name


def cases():
    for name, options in CELLS.items():
        yield name, lambda options=options: of_kernels(CellProblem(**options))
    for name, (cell, options) in OPTIONS.items():
        yield name, lambda cell=cell, options=options: of_kernels(CellProblem(**cell), **options)
    for name, options in TRITON.items():
        yield name, lambda options=options: of_triton(CellProblem(**options))
    for problem, rows in ((CellProblem, EMULATED), (LayerProblem, EMULATED_LAYERS)):
        for name, options in rows.items():
            yield name, lambda problem=problem, options=options: of_emulated(problem(**options))
    for name, options in LAYERS.items():
        yield name, lambda options=options: of_kernels(LayerProblem(**options))
    yield "plain PyTorch", lambda: of_plain_pytorch(CellProblem(**DEEP))
    yield "a node that was changed in place", changed_in_place
    yield "second derivatives", second_derivatives
    yield "messages", messages


def gradients(backend, problem, change=lambda: None):
    module, inputs, weights = problem.leaves(backend)
    outputs = problem.compute(backend, module, inputs, *weights)
    loss = sum((y * g).sum() for y, g in zip(outputs, problem.grads, strict=True))
    change()
    return torch.autograd.grad(loss, [*inputs, *weights])


def changed_in_place():
    """It is made again, with the statistics that it had."""
    problem = CellProblem(**DEEP)
    kernels = SharedKernels(backends()["cpu"])
    made = []
    shared = kernels.shared

    def keep(modules, inputs, weights, compute):
        def kept(*arguments):
            made.extend(compute(*arguments))
            return [y.clone() for y in made]

        return shared(modules, inputs, weights, kept)

    kernels.shared = keep

    @torch.no_grad()
    def change():
        made[0].add_(1)

    for a, b in zip(gradients(kernels, problem, change), gradients(Oracle(), problem), strict=True):
        torch.testing.assert_close(a, b)


def second_derivatives():
    """Those of plain PyTorch with the same processes; each differentiates its own part."""
    problem = CellProblem(primitives=("skip_connect", "sep_conv_3x3", "max_pool_3x3"), shape=(4, 5, 5))

    def second(backend):
        module, inputs, weights = problem.leaves(backend)
        synchronise_batch_norms(module)
        first = 2 * dist.get_rank()
        outputs = backend.cell(module, [x[first : first + 2] for x in inputs], *weights)
        loss = sum((y * g[first : first + 2]).sum() for y, g in zip(outputs, problem.grads, strict=True))
        made = torch.autograd.grad(loss, [*inputs, *weights], create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in made), [*inputs, *weights])

    for a, b in zip(second(CPUKernels(backends()["cpu"])), second(Oracle()), strict=True):
        torch.testing.assert_close(a, b)


def messages():
    """One of the inputs' statistics and one of each inner node's, for each half of separable convolutions;
    one with the number of images; as many of sums backward."""
    problem, sizes = CellProblem(**DEEP), []
    module, inputs, weights = problem.leaves(TRUTH)
    synchronise_batch_norms(module)
    all_reduce = dist.all_reduce
    dist.all_reduce = lambda x: (sizes.append(x.numel()), all_reduce(x))
    try:
        backend = SharedKernels(backends()["cpu"])
        nodes = CPUKernels.cell(backend, list(module), inputs, *weights)
        forward = len(sizes)
        torch.autograd.grad(sum(node.sum() for node in nodes), inputs)
    finally:
        dist.all_reduce = all_reduce
    assert forward == 1 + 2 * (1 + 3), sizes
    assert len(sizes) - forward == 2 * 4, sizes


def main():
    torch.set_num_threads(1)
    # see tests/conftest.py
    torch.backends.mkldnn.enabled = torch.backends.cpu.get_cpu_capability() == "AVX512"
    dist.init_process_group("gloo")
    for name, case in cases():
        torch.manual_seed(0)
        try:
            case()
            error = ""
        except Missing as reason:
            error = f"{MISSING}{reason}"
        except Exception:
            error = traceback.format_exc()
        mine, failed = [None, None], error
        dist.all_gather_object(mine, failed)
        if not dist.get_rank():
            print(json.dumps([name, *mine]), flush=True)
    dist.barrier()
    # without torch's threads being taken down, which now and then aborts
    os._exit(0)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
