"""The compiled CPU backend: csrc/cpu for AMX, AVX-512, AVX2 or any processor, chosen at run time."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from rfdarts_fast.ops.compiled import fakes
from rfdarts_fast.ops.compiled.autograd import BatchNormFunction, BatchNormOptions, channels_last
from rfdarts_fast.ops.compiled.base import (
    CompiledBackend,
    gamma_beta,
    running_moments,
    unsupported_layer,
    unsupported_norm,
)
from rfdarts_fast.ops.contract import CellCall, Memory, ReLUConvBNLayer, uses_batch_statistics
from rfdarts_fast.ops.synchronised import synchronised

_HALF = torch.bfloat16, torch.float16

_unavailable: str | None = None
try:
    importlib.import_module("rfdarts_fast.ops._C")
    fakes.register()
except ImportError as error:
    _unavailable = f"the compiled kernels were not built or do not load ({error})"
except (AttributeError, RuntimeError) as error:
    _unavailable = f"the compiled kernels are another version's: build them again ({error})"


def unavailable_reason() -> str | None:
    """The reason why the library of csrc cannot be used, or None."""
    return _unavailable


class CPUBackend(CompiledBackend):
    """float32 and float64. Under autocast, states are float32, branch outputs are kept in bfloat16, and a
    processor with AVX512_BF16, or AMX too, multiplies in bfloat16 what has channels in fours."""

    name = "cpu"
    priority = 20
    devices = frozenset({"cpu"})

    def storage_dtype(self, x: Tensor) -> torch.dtype:
        return torch.float32 if x.dtype in _HALF and torch.is_autocast_enabled("cpu") else x.dtype

    def memory_of(self, memory: Memory, inputs: Sequence[Tensor]) -> Memory:
        return "bfloat16" if memory == "fast" and torch.is_autocast_enabled("cpu") else memory

    def products_of(self, storage: torch.dtype, channels: Iterable[int]) -> bool:
        if storage != torch.float32 or not torch.is_autocast_enabled("cpu"):
            return False
        return self._ops.isa().endswith("_bf16") and all(c % 4 == 0 for c in channels)

    def unsupported_cell(self, call: CellCall) -> str | None:
        storage = self.storage_dtype(call.inputs[0])
        for x in call.inputs:
            reason = self._unsupported_input(x)
            if reason is not None:
                return reason
            if self.storage_dtype(x) != storage:
                return "inputs of different dtypes"
        return call.plan.unsupported_reason(call.inputs, storage)

    def unsupported_layer(self, x: Tensor, layer: ReLUConvBNLayer) -> str | None:
        return self._unsupported_input(x) or unsupported_layer(x, layer, self.storage_dtype(x))

    def unsupported_batch_norm(self, x: Tensor, norm: nn.BatchNorm2d) -> str | None:
        """See `BatchNormBackend.unsupported_batch_norm`."""
        reason = self._unsupported_input(x)
        if reason is not None:
            return reason
        if x.dtype in _HALF:
            return "PyTorch's own keeps half the bytes"
        if x.dim() != 4 or x.numel() == 0 or x.shape[1] != norm.num_features:
            return f"an input of shape {[*x.shape]}"
        if synchronised([norm]):
            return "statistics of several processes"
        if uses_batch_statistics(norm) and x.numel() == x.shape[1]:
            return "a single value per channel"
        return unsupported_norm(norm, x.dtype)

    def batch_norm(self, x: Tensor, norm: nn.BatchNorm2d, relu: bool) -> Tensor:
        """See `BatchNormBackend.batch_norm`."""
        training = uses_batch_statistics(norm)
        x = channels_last(x)
        gamma, beta = gamma_beta(norm, x)
        options = BatchNormOptions(self._ops, None if training else running_moments(norm), norm.eps, relu)
        output, moments = BatchNormFunction.apply(options, x, gamma, beta)
        if training:
            self._track(norm, moments, x.numel() // x.shape[1])
        return output

    def _unsupported_input(self, x: Tensor) -> str | None:
        if _unavailable is not None:
            return _unavailable
        if x.device.type != "cpu":
            return f"no kernels for device {x.device.type}"
        if self.storage_dtype(x) not in (torch.float32, torch.float64):
            return f"no kernels for dtype {x.dtype}"
        return None

    def status(self) -> dict[str, str | bool]:
        """`built`; `reason` where not; `isa`, the instruction set that runs; `isa_best`, the best that can;
        `amx`: available, or the reason why AMX cannot run; `harness`: the compiler, where the kernels are
        also built one by one, or the reason why not."""
        if _unavailable is not None:
            return {"built": False, "reason": _unavailable}
        try:
            harness = importlib.import_module("rfdarts_fast.ops._kernels").build()["compiler"]
        except ImportError as error:
            harness = f"not built or not for this Python ({error})"
        return {
            "built": True,
            "isa": self._ops.isa(),
            "isa_best": self._ops.isa_best(),
            "amx": self._ops.amx_missing() or "available",
            "harness": harness,
        }
