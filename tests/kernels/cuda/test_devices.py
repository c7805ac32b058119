"""CUDA devices of other sorts, emulated: what their limits do to kernels, and their errors to callers."""

import itertools

import pytest
import torch

from rfdarts_fast.ops import BackendError, contract, use_backend
from rfdarts_fast.ops.dispatch import mixed_cell, relu_conv_bns
from tests.kernels.problems import NASBENCH201, CellProblem, LayerProblem
from tests.kernels.tolerances import assert_as_good_as_torch

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
# capability, KiB of shared memory of a multiprocessor and of a block
# 12.0 has as much as 8.9
CARDS = {"A100": (80, 164, 163), "RTX 40": (89, 100, 99), "H100": (90, 228, 227)}


def card(name, image=True, allocation=-1):
    """A device as the emulation takes it; `allocation`: bytes of the largest one, -1 for any."""
    capability, multiprocessor, block = CARDS[name]
    return [capability, multiprocessor << 10, block << 10, int(image), allocation]


@pytest.fixture
def kernels(emulated_kernels):
    """Emulated kernels whose `ops.emulate` sets the devices of one test."""
    forget = emulated_kernels.backend._misfits.clear
    forget()
    yield emulated_kernels
    emulated_kernels.ops.emulate(card("H100"))
    emulated_kernels.ops.record(False)
    forget()


def launches(kernels, problem):
    """Parameters, blocks, bytes of shared memory of each launch of a forward and backward; none is run."""
    kernels.ops.record(True)
    problem.run(kernels, poison=False)
    lines = [line.split(" | ") for line in kernels.ops.recorded().splitlines()]
    kernels.ops.record(False)
    return [(line[0].split("<")[0].split("::")[-1], int(line[1]), int(line[2])) for line in lines]


def recorded(kernels, problem):
    """Bytes of shared memory of each launch."""
    return [shared for _, _, shared in launches(kernels, problem)]


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        # of RF-DARTS on CIFAR-10, the cells that a limit of 163 KiB gives 101,632 bytes and more
        (F32, {"channels": 64}),
        (F32, {"channels": 64, "stride": 2}),
        # fewer channels at a time, for want of room
        (F64, {"channels": 96, "stride": 2}),
        (BF16, {"channels": 64, "stride": 2}),
        (F64, {"channels": 64, **NASBENCH201}),
        (BF16, {"channels": 64, **NASBENCH201}),
    ],
    ids=str,
)
def test_cells_on_a_card_with_99_kib(kernels, dtype, options):
    kernels.ops.emulate(card("RTX 40"))
    torch.manual_seed(0)
    problem = CellProblem((1, 6, 10), dtype, **options | dict(nodes=1, inputs=1))
    assert_as_good_as_torch(kernels, problem)


# few columns leave most room to the pixels; many inputs to the weights
@pytest.mark.parametrize("channels", [(320, 16), (80, 96)])
@pytest.mark.parametrize("dtype", [F64, F32])
def test_layers_on_a_card_with_99_kib(kernels, dtype, channels):
    kernels.ops.emulate(card("RTX 40"))
    torch.manual_seed(0)
    assert_as_good_as_torch(kernels, LayerProblem((1, 10, 18), dtype, channels=channels))


@pytest.mark.parametrize("name", CARDS)
def test_every_cell_fits_or_has_a_reason(kernels, name):
    """Where there is no reason, every launch is within the limit: the emulation would refuse it."""
    kernels.ops.emulate(card(name))
    limit, reasons = CARDS[name][2] << 10, []
    widths = (64, 256)
    for dtype, channels, stride in itertools.product((BF16, F32, F64), widths, (1, 2)):
        problem = CellProblem((1, 8, 8), dtype, channels=channels, stride=stride, nodes=4)
        edges, inputs, weights = problem.leaves(kernels)
        call = kernels.call(list(edges), inputs, *weights)
        reason = kernels.backend.misfit(call, 0)
        if reason is None:
            assert max(recorded(kernels, problem)) <= limit
            continue
        reasons.append((dtype, channels))
        assert f"the device has {limit}" in reason
        with pytest.raises(ValueError, match="shared memory"):
            kernels.backend.mixed_cell(call)
    # the last node's coefficients alone, in double
    wide = {(F64, 256)} if limit < 163 << 10 else set()
    assert set(reasons) == wide


@pytest.mark.parametrize("name", CARDS)
def test_every_cell_of_nas_bench_201_fits_or_has_a_reason(kernels, name):
    kernels.ops.emulate(card(name))
    limit, reasons = CARDS[name][2] << 10, set()
    for dtype, channels in itertools.product((BF16, F32, F64), (64, 68, 256)):
        problem = CellProblem((1, 8, 8), dtype, channels=channels, **NASBENCH201)
        edges, inputs, weights = problem.leaves(kernels)
        reason = kernels.backend.misfit(kernels.call(list(edges), inputs, *weights), 0)
        if reason is None:
            assert max(recorded(kernels, problem)) <= limit
        else:
            assert f"the device has {limit}" in reason
            reasons.add((dtype, channels))
    # a tile of the least pixels, of all channels, in double
    assert reasons == ({(F64, 256)} if limit < 163 << 10 else set())


@pytest.mark.parametrize("name", CARDS)
def test_two_blocks_share_a_multiprocessor_where_they_can(kernels, name):
    kernels.ops.emulate(card(name))
    half = (CARDS[name][1] // 2 - 1) << 10
    assert max(recorded(kernels, CellProblem((1, 32, 32), BF16, channels=16, nodes=1))) <= half


def test_sums_of_a_node_have_blocks_for_every_multiprocessor_and_none_depends_on_the_card(kernels):
    """An H100 has 132 multiprocessors, a B200 148; the sizes are those of CIFAR's cells with few images."""
    for channels, side, K in ((16, 32, 1), (32, 16, 1), (64, 8, 1), (64, 8, 2)):
        problem = CellProblem((64, side, side), BF16, channels=channels, K=K, nodes=2)
        found = []
        for name in CARDS:
            kernels.ops.emulate(card(name))
            found.append([one for one in launches(kernels, problem) if one[0].startswith("Node")])
        assert found[0] == found[1] == found[2]
        blocks = [count for name, count, _ in found[0] if name == "NodeBackward"]
        assert len(blocks) == 2 and min(blocks) >= 148
        # one block for each row of terms, and each edge's bypass
        rows = [count for name, count, _ in found[0] if name == "NodeGradients"]
        assert rows == [edges * (4 + 3 + (K > 1)) for edges in (3, 2)]


@pytest.mark.parametrize("name", CARDS)
def test_every_layer_fits(kernels, name):
    kernels.ops.emulate(card(name))
    for dtype, columns, c_in in itertools.product(
        (BF16, F32, F64), (8, 16, 20, 32, 64, 128), (16, 64, 320, 1024)
    ):
        for reduce in (False, True):
            recorded(kernels, LayerProblem((1, 4, 4), dtype, channels=(c_in, columns), reduce=reduce))


def test_a_cell_without_room_goes_to_the_reference(kernels, monkeypatch):
    kernels.ops.emulate(card("RTX 40"))
    monkeypatch.setattr(contract, "_backends", {kernels.name: kernels.backend})
    problem = CellProblem((1, 2, 2), F64, channels=256, nodes=4)
    arguments = list(problem.module), problem.inputs, *problem.weights.values()
    with use_backend("reference"):
        expected = mixed_cell(*arguments)
    with pytest.warns(RuntimeWarning, match="shared memory: .* needs 116736 bytes, the device has 101376"):
        found = mixed_cell(*arguments)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    with use_backend(kernels.name), pytest.raises(BackendError, match="shared memory"):
        mixed_cell(*arguments)


def test_a_card_without_code_for_it(kernels):
    """T4s, V100s, and an A100 beside a build for H100s."""
    missing = kernels.ops.cuda_missing
    kernels.ops.emulate([*card("H100"), *card("A100", image=False)])
    assert missing(0) == ""
    assert missing(1) == (
        "the CUDA kernels were built for compute capability 9.0, CUDA device 1 has 8.0 "
        "(no kernel image is available for execution on the device)"
    )
    assert missing(2) == "there is no CUDA device 2"
    # asking leaves the first device current, and no error behind
    assert kernels.ops.last_error() == 0
    edges, inputs, weights = CellProblem((1, 2, 2), F32, nodes=1).leaves(kernels)
    call = kernels.call(list(edges), inputs, *weights)
    kernels.backend.mixed_cell(call)
    kernels.ops.emulate(card("A100", image=False))
    with pytest.raises(RuntimeError, match="CUDA: launch: no kernel image"):
        kernels.backend.mixed_cell(call)
    assert kernels.ops.last_error() == 0


def test_a_card_without_code_goes_to_the_next_backend(kernels, monkeypatch):
    kernels.ops.emulate(card("A100", image=False))
    monkeypatch.setattr(contract, "_backends", {kernels.name: kernels.backend})
    problem = CellProblem((1, 2, 2), F64, nodes=1)
    layer = LayerProblem((1, 2, 2), F64)
    arguments = list(problem.module), problem.inputs, *problem.weights.values()
    with pytest.warns(RuntimeWarning, match=r"reference: the CUDA kernels were built for .* has 8\.0"):
        [found] = mixed_cell(*arguments)
    relu_conv_bns(*layer.inputs, [part.layer() for part in layer.module])
    with use_backend("reference"):
        [expected] = mixed_cell(*arguments)
    torch.testing.assert_close(found, expected)
    with use_backend(kernels.name), pytest.raises(BackendError, match="were built for"):
        mixed_cell(*arguments)


def test_each_device_is_asked_once(monkeypatch):
    from rfdarts_fast.ops.compiled import cuda

    asked = []

    def missing(device):
        asked.append(device)
        return "" if device else "no code for it"

    cuda.unavailable_reason.cache_clear()
    monkeypatch.setattr(cuda, "_not_loaded", None)
    monkeypatch.setattr(torch.ops, "rfdarts", type("Ops", (), {"cuda_missing": missing, "cuda_archs": str}))
    try:
        assert [cuda.unavailable_reason(i % 2) for i in range(4)] == 2 * ["no code for it", None]
        assert asked == [0, 1]
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        status = cuda.CUDABackend(None).status()
        assert "reason" not in status and status["not on device 0"] == "no code for it"
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        assert cuda.CUDABackend(None).status()["reason"] == "no code for it"
    finally:
        cuda.unavailable_reason.cache_clear()


@pytest.mark.parametrize("layers", [False, True])
def test_lack_of_memory_keeps_its_type(kernels, layers):
    problem = (
        LayerProblem(dtype=F32, channels=(16, 16)) if layers else CellProblem((2, 8, 8), F32, channels=8)
    )
    module, inputs, weights = problem.leaves(kernels)
    kernels.ops.emulate(card("H100", allocation=1000))
    with pytest.raises(torch.OutOfMemoryError, match=r"CUDA out of memory: .* 1000 of \d+ bytes are free"):
        problem.compute(kernels, module, inputs, *weights)
    # what follows is as if nothing had been
    kernels.ops.emulate(card("H100"))
    outputs = problem.compute(kernels, module, inputs, *weights)
    loss = sum(output.sum() for output in outputs)
    kernels.ops.emulate(card("H100", allocation=1000))
    with pytest.raises(torch.OutOfMemoryError):
        torch.autograd.grad(loss, inputs)
