"""Whole steps on a GPU, recorded in a CUDA graph; its limits and errors."""

import copy
import itertools
import subprocess
import sys

import pytest
import torch

from rfdarts_fast.nn import SearchNetwork, freeze_random_features
from rfdarts_fast.ops import backends, use_backend
from rfdarts_fast.ops.compiled import cuda
from rfdarts_fast.runs.graph import GraphedStep, Recorder
from rfdarts_fast.search import search
from rfdarts_fast.search.architect import descend, gradients
from rfdarts_fast.spaces import get_space
from tests.kernels.oracles import GPUKernels
from tests.kernels.problems import CellProblem, LayerProblem
from tests.kernels.tolerances import assert_as_good_as_torch

MISSING = backends()["cuda"].status().get("reason")
pytestmark = pytest.mark.skipif(MISSING is not None, reason=f"needs a GPU: {MISSING}")
GPU = torch.device("cuda")
two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture
def kernels():
    return GPUKernels(backends()["cuda"], "cuda")


@pytest.mark.parametrize("amp", [False, True])
def test_replayed_steps_equal_eager_steps(amp):
    torch.manual_seed(0)
    network = SearchNetwork(get_space("darts"), C=16, layers=3, K=4, edge_norm=True).cuda()
    freeze_random_features(network)
    network.to(memory_format=torch.channels_last)
    batches = [(torch.randn(8, 3, 32, 32).cuda(), torch.randint(10, (8,)).cuda()) for _ in range(8)]

    def train(graphed):
        model = copy.deepcopy(network)
        parameters = [*model.arch_parameters(), *(p for p in model.parameters() if p.requires_grad)]
        optimizer = torch.optim.SGD(parameters, lr=torch.tensor(0.1).cuda(), momentum=0.9, fused=True)

        def step(kind, images, labels):
            with torch.autocast("cuda", torch.bfloat16, enabled=amp, cache_enabled=False):
                logits = model(images).float()
            loss = torch.nn.functional.cross_entropy(logits, labels)
            descend(optimizer, parameters, gradients(loss, parameters), 5.0)

        run = GraphedStep(step, Recorder(GPU), required=True) if graphed else step
        for images, labels in batches:
            run("step", images, labels)
        return [p.detach() for p in parameters]

    with use_backend("cuda"):
        for a, b in zip(train(False), train(True), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"K": 2}, {"amp": "bf16"}], ids=str)
def test_a_recorded_search_is_the_same_search(tiny_search, tmp_path, changes):
    options = {"space": "darts", "channels": 4, "epochs": 3, "arch_warmup_epochs": 1, **changes}
    if "K" in options:
        options |= {"method": "rf-pcdarts", "partial_channels": options.pop("K"), "edge_norm": True}
    alphas = []
    for graph in ("off", "on"):
        out = tmp_path / graph
        search(tiny_search(out=out, device="cuda", backend="cuda", cuda_graph=graph, **options))
        alphas.append(torch.load(out / "checkpoint.pt", weights_only=False)["network"]["alphas_normal"])
    torch.testing.assert_close(*alphas, rtol=1e-3, atol=1e-5)


def test_every_device_runs_the_kernels_or_says_why():
    for device in range(torch.cuda.device_count()):
        reason = cuda.unavailable_reason(device)
        major, minor = torch.cuda.get_device_capability(device)
        assert reason is None or f"has {major}.{minor}" in reason
    count = torch.cuda.device_count()
    assert torch.ops.rfdarts.cuda_missing(count) == f"there is no CUDA device {count}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("channels", [64, 256])
def test_wide_cells_and_layers_have_room(kernels, dtype, channels):
    """Or a reason: launches never fail for want of shared memory."""
    torch.manual_seed(0)
    for stride in (1, 2):
        problem = CellProblem((1, 16, 16), dtype, channels=channels, stride=stride, nodes=1)
        edges, inputs, weights = problem.leaves(kernels)
        if kernels.backend.unsupported_cell(kernels.call(list(edges), inputs, *weights)) is None:
            assert_as_good_as_torch(kernels, problem)
    for columns in (16, 64):
        assert_as_good_as_torch(kernels, LayerProblem((1, 8, 8), dtype, channels=(320, columns)))


def test_lack_of_memory_keeps_its_type(kernels):
    """And what follows is as if nothing had been."""
    problem = CellProblem((64, 32, 32), torch.float32, channels=32)
    edges, inputs, weights = problem.leaves(kernels)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (64 << 20)) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
            problem.compute(kernels, edges, inputs, *weights)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    [*nodes] = problem.compute(kernels, edges, inputs, *weights)
    assert all(node.isfinite().all() for node in nodes)


def test_a_graph_without_work_is_refused():
    record = Recorder(GPU)
    with pytest.raises(RuntimeError, match="holds no work for cuda"):
        record(lambda: None)
    total = torch.zeros(1, device=GPU)
    record(lambda: total.add_(1))()
    assert total.item() == 1


FAILED_CAPTURE = """
import torch
from rfdarts_fast.runs.checkpoint import rng_state
from rfdarts_fast.runs.graph import CaptureError, Recorder

x, before = torch.arange(4.0, device="cuda"), torch.cuda.current_stream()
try:
    Recorder(x.device)(lambda: x.add_(1).sum().item())
except CaptureError as error:
    print(error)
assert torch.cuda.current_stream() == before
rng_state()
# nothing of it was computed
print(x.tolist())
"""


def test_what_a_failed_capture_leaves_can_be_saved():
    command = [sys.executable, "-c", FAILED_CAPTURE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "the step cannot be captured: " in done.stdout, done.stderr
    assert done.stdout.endswith("[0.0, 1.0, 2.0, 3.0]\n"), done.stderr


def test_image_folders_with_workers_across_a_capture(tiny_search, tmp_path):
    """The thread that pins their memory goes on while a step is recorded."""
    Image = pytest.importorskip("PIL.Image")
    for part, name, i in itertools.product(("train", "val"), ("ant", "bee"), range(12)):
        path = tmp_path / "images" / part / name / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (24, 20), (20 * i, 255 * (name == "ant"), 0)).save(path)
    options = dict(
        dataset="imagefolder", data_root=tmp_path / "images", image_size=16, workers=2, batch_size=4
    )
    search(
        tiny_search(
            out=tmp_path / "run", device="cuda", backend="cuda", cuda_graph="on", space="darts", channels=4,
            epochs=2, arch_warmup_epochs=0, **options,
        )
    )  # fmt: skip
    assert (tmp_path / "run/genotype.json").is_file()


@two_devices
def test_a_recorded_search_on_the_second_device(tiny_search, tmp_path):
    alphas = []
    for graph in ("off", "on"):
        out = tmp_path / graph
        options = {"space": "darts", "channels": 4, "epochs": 3, "arch_warmup_epochs": 1, "cuda_graph": graph}
        search(tiny_search(out=out, device="cuda:1", backend="cuda", **options))
        alphas.append(torch.load(out / "checkpoint.pt", weights_only=False)["network"]["alphas_normal"])
    assert all(x.device == torch.device("cuda:1") for x in alphas)
    torch.testing.assert_close(*alphas, rtol=1e-3, atol=1e-5)
