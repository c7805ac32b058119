"""The Triton backend for mixed ops with frozen convolutions: for GPUs where the CUDA C++ one was not built.

Depthwise convolutions, the ordinary ones of NAS-Bench-201, pools, statistics, the weighted sum of a node's
branches and all of their gradients are Triton kernels, each for all edges that leave a state or enter a node;
pointwise convolutions are torch.bmm. States are float32, bfloat16, float16 or float64, in any layout;
arithmetic, statistics, parameters and their gradients float32 (float64 for float64). Nothing waits for the
GPU and nothing depends on data, so that a step can be captured in a CUDA graph, once its kernels are tuned by
the first eager calls.

With TRITON_INTERPRET=1 in the environment, the kernels run on the CPU, slowly: for tests.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from rfdarts_fast.ops import reference
from rfdarts_fast.ops.contract import (
    CellCall,
    CellPlan,
    Memory,
    Op,
    ReLUConvBNLayer,
    cuda_status,
    register_backend,
)
from rfdarts_fast.ops.dtypes import parameter_dtype, storage_dtype

STORAGE = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@functools.cache
def _kernels() -> ModuleType | str:
    """The module that runs the kernels, imported on first use, or the reason why there is none."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'rfdarts_fast[triton]')"
    try:
        return importlib.import_module("rfdarts_fast.ops.triton.autograd")
    except ImportError as error:
        return f"triton does not load ({error})"


def _loaded_kernels() -> ModuleType:
    """The module that runs the kernels; RuntimeError with the reason if there is none."""
    kernels = _kernels()
    if isinstance(kernels, str):
        raise RuntimeError(kernels)
    return kernels


def unavailable_reason(device: int) -> str | None:
    """The reason why the kernels cannot run on the CUDA device of this number, or None."""
    return _unavailable_reason(_interpreted(), device)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


# asked for every cell of every step
@functools.cache
def _unavailable_reason(interpreted: bool, device: int) -> str | None:
    if not interpreted and importlib.util.find_spec("triton") is not None:
        if not torch.cuda.is_available():
            return "there is no CUDA device"
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"Triton needs compute capability 8.0, CUDA device {device} has {major}.{minor}"
    kernels = _kernels()
    return kernels if isinstance(kernels, str) else None


class TritonBackend:
    """Cells in Triton kernels; ReLU-conv-BN layers are those of the reference, for there is no kernel.

    Under autocast, float32 inputs are cast to its dtype, and so are the states that come out. Nodes are
    channels_last views of one tensor, so that concatenating them costs nothing. Memory "bfloat16" is "fast"
    where the states have 16 bits anyway.
    """

    name = "triton"
    priority = 10
    devices = frozenset({"cuda"})
    synchronises = True

    def unsupported_cell(self, call: CellCall) -> str | None:
        return _unsupported_device(call.inputs) or unsupported_anywhere(call)

    def mixed_cell(self, call: CellCall) -> list[Tensor]:
        """See `Backend.mixed_cell`.

        Raises:
            RuntimeError: if Triton does not load.
            ValueError: for BatchNorms in training mode with a single value per channel, as BatchNorm2d.
        """
        return _loaded_kernels().mixed_cell(call)

    def kept_outputs(self, plan: CellPlan) -> int:
        """See `Backend.kept_outputs`: pools and 1x1 convolutions too."""
        return _loaded_kernels().layout_of(plan).slots

    def unsupported_layer(self, x: Tensor, layer: ReLUConvBNLayer) -> str | None:
        """The reason why Triton cannot run on this machine or device, or None."""
        return _unsupported_device([x])

    def relu_conv_bns(self, x: Tensor, layers: Sequence[ReLUConvBNLayer], memory: Memory) -> list[Tensor]:
        """`reference.relu_conv_bn` for each layer."""
        return [reference.relu_conv_bn(x, *layer) for layer in layers]

    def status(self) -> dict[str, str | bool]:
        """`built`: Triton is installed; see `cuda_status`."""
        return {"built": importlib.util.find_spec("triton") is not None, **cuda_status(unavailable_reason)}


def _unsupported_device(inputs: Sequence[Tensor]) -> str | None:
    device_type, device = "cpu" if _interpreted() else "cuda", inputs[0].device
    reason = unavailable_reason(device.index or 0)
    if reason is None and any(x.device.type != device_type or x.device != device for x in inputs):
        reason = f"inputs that are not all on one {device_type.upper()} device"
    return reason


def unsupported_anywhere(call: CellCall) -> str | None:
    """The reason why the kernels can take the call on no machine, or None."""
    plan, inputs = call.plan, call.inputs
    storage = storage_dtype(inputs[0])
    if storage not in STORAGE:
        return f"no kernels for dtype {storage}"
    if any(storage_dtype(x) != storage for x in inputs):
        return "inputs of different dtypes"
    if any(x.shape != inputs[0].shape for x in inputs):
        return "inputs of different sizes"
    reason = plan.unsupported_reason(inputs, parameter_dtype(storage))
    if reason is not None:
        return reason
    if plan.K not in (1, 2, 4, 8):
        return f"no kernels for K={plan.K}"
    # offsets inside one state, or inside the concatenated nodes, are 32 bits wide
    size = inputs[0].numel()
    if max(size, size // plan.stride**2 * plan.nodes) >= 2**31:
        return f"no kernels for inputs of {size} numbers"
    # and so are those in the weights of all NOR_CONVs that leave a state
    weights = _nor_conv_weights(plan)
    if weights >= 2**31:
        return f"no kernels for {weights} weights of convolutions that leave one state"
    # kernels take all edges that leave a state together
    if any(edge.stride != (plan.stride if edge.source < plan.inputs else 1) for edge in plan.edges):
        return "edges of different strides from one state"
    return None


def _nor_conv_weights(plan: CellPlan) -> int:
    """The weights of NOR_CONVs that leave the state with most of them."""
    taps = [0] * (plan.inputs + plan.nodes)
    for edge in plan.edges:
        taps[edge.source] += sum(b.kernel**2 for b in edge.branches if b.op is Op.NOR_CONV)
    return max(taps) * plan.mixed_channels**2


register_backend(TritonBackend())
