"""A trained network as ONNX, which is kept only if onnxruntime computes the same."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn

from rfdarts_fast.ops import use_backend
from rfdarts_fast.runs.config import ConfigError, require_package
from rfdarts_fast.runs.files import write_atomic

TOLERANCE = 1e-4
"""The largest error of onnxruntime's logits, as a share of the largest logit."""
_OPSET = 18


class _Logits(nn.Module):
    """The network without its auxiliary output."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)[0]


def export_onnx(network: nn.Module, image_size: int, path: Path) -> float:
    """Writes a network as ONNX: images float32 [N, 3, S, S], normalised, -> logits [N, classes]; any N.

    Returns the error of onnxruntime as of `parity_error`. Raises ConfigError without the packages onnx,
    onnxscript and onnxruntime, and if the error exceeds TOLERANCE, with nothing written; WriteError if the
    file cannot be written.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require_package("onnx", package, "export")
    logits = _Logits(deepcopy(network).cpu().float().eval())
    images = torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    # the exporter reports its progress on stdout
    quiet = contextlib.redirect_stdout(io.StringIO())
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with use_backend("reference"), torch.no_grad(), warnings.catch_warnings(), quiet:
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            logits,
            (images,),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            opset_version=_OPSET,
            dynamo=True,
        )
    assert program is not None
    model = program.model_proto.SerializeToString()
    error = parity_error(logits.network, model, image_size)
    if not error <= TOLERANCE:
        raise ConfigError(
            f"onnx: expected onnxruntime's logits within {TOLERANCE:g} of the largest one from PyTorch's, "
            f"got {error:g}; nothing was written"
        )
    write_atomic(path, model)
    return error


def parity_error(network: nn.Module, model: bytes, image_size: int) -> float:
    """The largest difference of onnxruntime's logits from PyTorch's in float64, over the largest logit.

    Args:
        network: as of `export_onnx`.
        model: the ONNX file's bytes.
        image_size: side of the images in pixels; batches of one and of three random images are tried.
    """
    runtime = require_package("onnx", "onnxruntime", "export")
    session = runtime.InferenceSession(model, providers=["CPUExecutionProvider"])
    exact, worst = _Logits(deepcopy(network).double().eval()), 0.0
    for count in (1, 3):
        images = torch.randn(count, 3, image_size, image_size, generator=torch.Generator().manual_seed(count))
        with use_backend("reference"), torch.no_grad():
            expected = exact(images.double())
        got = torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0]).double()
        worst = max(worst, float((got - expected).abs().max() / expected.abs().max()))
    return worst
