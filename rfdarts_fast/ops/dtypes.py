"""The dtypes that a backend computes in, autocast considered."""

import torch
from torch import Tensor


def storage_dtype(x: Tensor) -> torch.dtype:
    """The dtype of states and branch outputs on a GPU: that of `x`, or autocast's for float32."""
    device = x.device.type
    if x.dtype == torch.float32 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def parameter_dtype(storage: torch.dtype) -> torch.dtype:
    """The dtype of parameters, statistics and their gradients: float64 beside float64, else float32."""
    return torch.float64 if storage == torch.float64 else torch.float32
