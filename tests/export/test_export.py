"""Trained networks for other programs compute what they computed here."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from rfdarts_fast.export import export_onnx, load_weights, save_weights
from rfdarts_fast.export import onnx as onnx_module
from rfdarts_fast.nn import NasBench201Network, Network
from rfdarts_fast.retrain import TrainConfig, train
from rfdarts_fast.runs.config import ConfigError
from rfdarts_fast.spaces import PUBLISHED, parse

CELL = "|nor_conv_3x3~0|+|avg_pool_3x3~0|skip_connect~1|+|nor_conv_1x1~0|nor_conv_3x3~1|none~2|"
SHAPE = {"channels": 8, "layers": 3, "cells_per_stage": 1}


def trained(network):
    """A network as after some training: its statistics and parameters are no longer what they were."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                tensor.data.uniform_(0.5, 1.5, generator=generator)
            for tensor in (module.bias, module.running_mean):
                tensor.data.uniform_(-0.5, 0.5, generator=generator)
    return network.eval()


def networks():
    for name, genotype in PUBLISHED.items():
        yield name, trained(Network(genotype, 8, 7, 3, auxiliary=True, stem="imagenet")), 64, "imagenet"
    yield CELL, trained(NasBench201Network(parse(CELL), 8, 7, 1)), 16, "cifar"


@pytest.fixture(params=networks(), ids=lambda case: case[0][:12])
def case(request, tmp_path):
    genotype, network, size, stem = request.param
    auxiliary = genotype in PUBLISHED
    config = TrainConfig(
        out=tmp_path, genotype=genotype, stem=stem, image_size=size, auxiliary=auxiliary, **SHAPE
    )
    return network, config


def test_onnx_computes_the_same(case, tmp_path):
    """In a session of its own, for any number of images."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    network, config = case
    error = export_onnx(network, config.image_size, tmp_path / "network.onnx")
    assert 0 < error < onnx_module.TOLERANCE
    session = runtime.InferenceSession(tmp_path / "network.onnx", providers=["CPUExecutionProvider"])
    images = torch.randn(5, 3, config.image_size, config.image_size)
    with torch.no_grad():
        expected = network(images)[0]
    torch.testing.assert_close(
        torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0]),
        expected,
        rtol=1e-4,
        atol=1e-4,
    )


def test_onnx_that_computes_something_else_is_not_kept(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    network = trained(Network(PUBLISHED["DARTS_V2"], 4, 7, 1))
    parity_error = onnx_module.parity_error

    def of_another(network, *rest):
        network.classifier.bias.data[0] += 1
        return parity_error(network, *rest)

    monkeypatch.setattr(onnx_module, "parity_error", of_another)
    with pytest.raises(ConfigError, match=r"onnx: expected onnxruntime's logits within 0\.0001 of"):
        export_onnx(network, 8, tmp_path / "network.onnx")
    assert not list(tmp_path.iterdir())


def test_weights_round_trip(case, tmp_path):
    pytest.importorskip("safetensors")
    network, config = case
    save_weights(network, config, tmp_path / "w.safetensors")
    loaded = load_weights(tmp_path / "w.safetensors")
    images = torch.randn(2, 3, config.image_size, config.image_size)
    with torch.no_grad():
        assert torch.equal(loaded(images)[0], network(images)[0])
    kept = {name for name in network.state_dict() if not name.startswith("auxiliary_head")}
    assert loaded.state_dict().keys() == kept


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"\x02\0\0\0\0\0\0\0{}"])
def test_other_files_are_no_weights(content, tmp_path):
    pytest.importorskip("safetensors")
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(
        ConfigError, match=r"^weights: .*w\.safetensors (cannot be read|is of another kind): "
    ):
        load_weights(tmp_path / "w.safetensors")
    with pytest.raises(ConfigError, match="expected a safetensors file, got nothing there"):
        load_weights(tmp_path / "absent")


def test_weights_of_another_shape(tmp_path):
    pytest.importorskip("safetensors")
    network = Network(PUBLISHED["DARTS_V2"], 8, 7, 3)
    save_weights(network, TrainConfig(out=tmp_path, **{**SHAPE, "channels": 4}), tmp_path / "w")
    with pytest.raises(ConfigError, match=r"is of another kind: .*size mismatch"):
        load_weights(tmp_path / "w")


def test_timm_model(tmp_path):
    timm = pytest.importorskip("timm")
    pytest.importorskip("safetensors")
    import rfdarts_fast.export.timm

    assert "rfdarts_imagenet" in timm.list_models("rfdarts*")
    network = trained(Network(PUBLISHED["PC_DARTS_image"], 8, 7, 3, auxiliary=True, stem="imagenet"))
    config = TrainConfig(out=tmp_path, genotype="PC_DARTS_image", stem="imagenet", image_size=64, **SHAPE)
    save_weights(network, config, tmp_path / "w.safetensors")
    shape = {"genotype": "PC_DARTS_image", "channels": 8, "layers": 3, "num_classes": 7}
    model = timm.create_model(
        "rfdarts_imagenet", checkpoint_path=str(tmp_path / "w.safetensors"), **shape
    ).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = network(images)[0]
        assert torch.equal(model(images), expected)
        features = model.forward_features(images)
        pooled = model.forward_head(features, pre_logits=True)
        assert torch.equal(model.get_classifier()(pooled), expected)
        assert features.shape[1] == pooled.shape[1] == model.num_features
        model.reset_classifier(3)
        assert model(images).shape == (2, 3)
        model.reset_classifier(0)
        assert torch.equal(model(images), pooled)
    assert timm.data.resolve_data_config({}, model=model)["input_size"] == (3, 224, 224)
    whole = timm.create_model("rfdarts_imagenet", genotype=PUBLISHED["PC_DARTS_image"])
    # method.md's count of the published network
    assert sum(p.numel() for p in whole.parameters()) == 5_342_464
    for options, message in {
        (): "genotype: expected one, as in",
        (("genotype", CELL),): "genotype: expected one of the DARTS family",
        (("genotype", "DARTS_V2"), ("in_chans", 1)): "in_chans: expected 3, got 1",
        (("genotype", "DARTS_V2"), ("pretrained", True)): "pretrained: expected False",
    }.items():
        with pytest.raises(ValueError, match=message):
            timm.create_model("rfdarts_imagenet", **dict(options))
    del rfdarts_fast.export.timm


# quark0/darts cnn/model.py: modules of NetworkImageNet that have weights, of PC_DARTS_image
PUBLISHED_NAMES = {
    "stem0.0",
    "stem0.1",
    "stem0.3",
    "stem0.4",
    "stem1.1",
    "stem1.2",
    "auxiliary_head.features.2",
    "auxiliary_head.features.3",
    "auxiliary_head.features.5",
    "auxiliary_head.classifier",
    "classifier",
    "cells.0.preprocess0.conv_1",
    "cells.0.preprocess0.conv_2",
    "cells.0.preprocess0.bn",
    "cells.0.preprocess1.op.1",
    "cells.0.preprocess1.op.2",
    "cells.1.preprocess0.op.1",
    "cells.1.preprocess0.op.2",
    "cells.0._ops.1.op.1",
    "cells.0._ops.1.op.2",
    "cells.0._ops.1.op.3",
    "cells.0._ops.1.op.5",
    "cells.0._ops.1.op.6",
    "cells.0._ops.1.op.7",
}


def test_names_are_the_published_ones():
    """So that `load_state_dict` takes what the published training scripts saved."""
    names = Network(PUBLISHED["PC_DARTS_image"], 48, 1000, 14, True, "imagenet").state_dict()
    modules = {name.rpartition(".")[0] for name in names}
    outside = ("stem", "aux", "class", "cells.0.pre", "cells.1.preprocess0", "cells.0._ops.1.")
    assert {name for name in modules if name.startswith(outside)} == PUBLISHED_NAMES


def test_export_of_a_run(rfdarts, tiny_train, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    pytest.importorskip("safetensors")
    config = tiny_train(epochs=1)
    train(config)
    files = tmp_path / "n.onnx", tmp_path / "n.safetensors"
    code, out, err = rfdarts("export", config.out, "--onnx", files[0], "--safetensors", files[1])
    assert code == 0, err
    assert out.count("wrote ") == 2
    state = torch.load(config.out / "best.pt", weights_only=True)["network"]
    loaded = load_weights(files[1]).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in loaded.items())
    code, _, err = rfdarts("export", config.out)
    assert (code, "onnx: expected this or --safetensors, or both" in err) == (2, True)
    code, _, err = rfdarts("export", tmp_path / "absent", "--onnx", files[0])
    assert (code, "without config.json" in err) == (2, True)


WITHOUT = """
import sys
for name in ("onnx", "onnxruntime", "onnxscript", "safetensors", "timm"):
    sys.modules[name] = None
sys.argv = ["rfdarts", *sys.argv[1:]]
from rfdarts_fast.cli import main
main()
"""


def test_without_the_packages(tiny_train, tmp_path):
    config = tiny_train(epochs=1)
    train(config)
    for option, package in (("--onnx", "onnx"), ("--safetensors", "safetensors")):
        words = [sys.executable, "-c", WITHOUT, "export", config.out, option, tmp_path / "file"]
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == 2
        assert f"expected the package {package}, which is not installed" in done.stderr
        assert "rfdarts_fast[export]" in done.stderr
        assert done.stderr.count("\n") == 1
