"""What a half step of a search on CUDA costs the host: launches, operators, microseconds. No GPU is used.

    python -m benchmarks.host_cost [--json FILE]

The supernet runs on the emulated CUDA kernels, whose launches are written down and not run; torch's own
operators run on the CPU, on one image, and are counted as they are dispatched. Clipping and SGD run on
tensors without data ("meta"), as many and as large as the supernet's, in the multi-tensor form that CUDA
takes: once for the parameters, once for a single one of the same size. Their launches on CUDA follow from how
many tensors one of them takes (torch's MultiTensorApply.cuh); they are not timed, as tensors without data
take another way through torch.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rfdarts_fast.nn import SearchNetwork, freeze_random_features
from rfdarts_fast.ops import use_backend
from rfdarts_fast.ops.contract import register_backend
from rfdarts_fast.runs.files import write_json
from rfdarts_fast.runs.watch import Watch
from rfdarts_fast.search.architect import descend, gradients
from rfdarts_fast.search.flat_sgd import FlatSGD
from rfdarts_fast.spaces import get_space
from tests.kernels import emulation

# name -> K
NETWORKS = {"RF-DARTS": 1, "RF-PCDARTS": 4}
# tensors that a launch of a multi-tensor operator takes, by its number of lists
TENSORS = (0, 110, 64, 48, 36, 30)
# tensors that a launch of cat takes (torch's Shape.cu)
CAT = 128
# lists of the operators of clipping and SGD with momentum and weight decay, by name
LISTS = {"_foreach_norm": 1, "_foreach_mul_": 1, "_foreach_add": 3, "_foreach_add_": 2}


class Calls(TorchDispatchMode):
    """Operators that are dispatched, by name, and how many launches they are on CUDA."""

    def __init__(self) -> None:
        super().__init__()
        self.count: dict[str, int] = {}
        self.launches = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        self.count[name] = self.count.get(name, 0) + 1
        if name in LISTS:
            self.launches += -(-len(args[0]) // TENSORS[LISTS[name]])
        elif name in ("cat", "stack"):
            self.launches += -(-len(args[0]) // CAT)
        elif name not in ("detach", "alias", "_unsafe_view", "view", "unbind", "split", "split_with_sizes"):
            self.launches += 1
        return function(*args, **(kwargs or {}))


def microseconds(work: Callable[[], object], repeats: int = 7) -> float:
    """The least of some calls."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return round(min(times) * 1e6)


def half_step(kernels: emulation.EmulatedKernels, K: int) -> tuple[dict[str, Any], list[torch.Size]]:
    """Of forward and backward with respect to the weights; and the weights' shapes."""
    network = SearchNetwork(get_space("darts"), K=K, edge_norm=K > 1)
    freeze_random_features(network)
    weights = [p for p in network.parameters() if p.requires_grad]
    image, label = torch.randn(1, 3, 32, 32), torch.tensor([0])

    def work() -> None:
        with use_backend(kernels.backend.name):
            loss = torch.nn.functional.cross_entropy(network(image), label)
            gradients(loss, weights)

    kernels.ops.record(True)
    work()
    launched = len(kernels.ops.recorded().splitlines())
    with Calls() as calls:
        work()
    found = {
        "launches of our kernels": launched,
        "calls of torch operators": sum(calls.count.values()),
        "microseconds": microseconds(work),
    }
    kernels.ops.record(False)
    return found, [weight.shape for weight in weights]


def clip_and_descend(shapes: list[torch.Size], kind: type[torch.optim.SGD]) -> dict[str, Any]:
    weights = [torch.empty(shape, device="meta").requires_grad_() for shape in shapes]
    optimizer = kind(weights, lr=0.1, momentum=0.9, weight_decay=3e-4, foreach=True)
    stepped = optimizer.stepped if isinstance(optimizer, FlatSGD) else weights
    grads, clipped = ([torch.empty_like(tensor) for tensor in of] for of in (weights, stepped))

    def work() -> None:
        # meta tensors have no multi-tensor norm that clipping would choose
        norms = torch._foreach_norm(clipped)
        scale = 5.0 / (torch.linalg.vector_norm(torch.stack(norms)) + 1e-6)
        torch._foreach_mul_(clipped, scale.clamp(max=1.0))
        descend(optimizer, weights, grads, 0)

    work()
    return {"tensors": len(shapes), **counted(work)}


def watched(shapes: list[torch.Size]) -> dict[str, Any]:
    watch = Watch(torch.device("meta"), ["loss", *map(str, shapes)])
    loss, *grads = (torch.empty(shape, device="meta") for shape in [torch.Size([]), *shapes])
    return counted(lambda: watch.see(0, loss, grads))


def counted(work: Callable[[], object]) -> dict[str, int]:
    with Calls() as calls:
        work()
    return {"launches on CUDA": calls.launches, "calls of torch operators": sum(calls.count.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description="what a half step costs the host")
    parser.add_argument("--json", type=Path, help="where the figures go")
    path = parser.parse_args().json
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        kernels = emulation.EmulatedKernels(emulation.build(Path(folder)))
    register_backend(kernels.backend)
    machine = platform.processor() or platform.machine()
    found: dict[str, Any] = {"machine": machine, "threads": 1, "torch": torch.__version__}
    for name, K in NETWORKS.items():
        of_network, shapes = half_step(kernels, K)
        found[name] = {
            "forward and backward": of_network,
            "looking for NaN": watched(shapes),
            "clipping and torch.optim.SGD": clip_and_descend(shapes, torch.optim.SGD),
            "clipping and FlatSGD": clip_and_descend(shapes, FlatSGD),
        }
    print(json.dumps(found, indent=2))
    if path is not None:
        write_json(path, found)


if __name__ == "__main__":
    main()
