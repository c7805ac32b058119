"""Trained networks for other programs: ONNX, safetensors, timm (`rfdarts_fast.export.timm`)."""

from rfdarts_fast.export.onnx import export_onnx, parity_error
from rfdarts_fast.export.weights import load_weights, save_weights

__all__ = ["export_onnx", "load_weights", "parity_error", "save_weights"]
