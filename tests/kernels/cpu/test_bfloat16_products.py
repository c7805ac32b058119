"""Products of bfloat16 under autocast, where the processor has them: by PyTorch's own errors under autocast.

AMX's are emulated on every processor. test_kernels.py has the arithmetic of single kernels, AVX512_BF16's
emulated where the processor lacks it.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import library, nn

from rfdarts_fast.ops import backends
from rfdarts_fast.ops.compiled.packing import pairs
from tests.kernels.oracles import CPUKernels, Kernels, Oracle, RecordedOps
from tests.kernels.problems import NASBENCH201, CellProblem, LayerProblem
from tests.kernels.tolerances import TRUTH, assert_same_bits, errors, size_of
from tests.kernels.views import ALIGNED

F32 = torch.float32

isa = str(backends()["cpu"].status().get("isa"))


def under_autocast(kind):
    class UnderAutocast(kind):
        def cell(self, *arguments, **options):
            with torch.autocast("cpu", torch.bfloat16):
                return [y.float() for y in super().cell(*arguments, **options)]

        def layers(self, *arguments, **options):
            with torch.autocast("cpu", torch.bfloat16):
                return [y.float() for y in super().layers(*arguments, **options)]

    return UnderAutocast


PLAIN = under_autocast(Oracle)()


@pytest.fixture(params=["cpu", "emulated AMX"])
def backend(request):
    """Kernels with products of bfloat16: this processor's best, and those with emulated tiles."""
    if request.param == "emulated AMX":
        return under_autocast(CPUKernels)(request.getfixturevalue("emulated_amx"))
    if not isa.endswith("_bf16"):
        pytest.skip(f"needs AVX512_BF16, the kernels run on {isa}")
    return under_autocast(CPUKernels)(backends()["cpu"])


# without autocast the products are of float32, and those are not emulated
here = pytest.mark.parametrize("backend", ["cpu"], indirect=True)


CELLS = {
    "DARTS": dict(channels=16, nodes=2),
    "DARTS, 64 channels": dict(channels=64, nodes=1),
    "DARTS, stride 2": dict(channels=32, nodes=2, stride=2),
    "48 channels, odd": dict(channels=48, nodes=1, shape=(3, 7, 9)),
    "4 channels": dict(channels=4, nodes=2),
    "8 channels": dict(channels=8, nodes=2, shape=(3, 7, 9)),
    "12 channels, stride 2": dict(channels=12, nodes=1, stride=2),
    "K=4": dict(channels=64, K=4, nodes=1),
    "K=4, 8 channels": dict(channels=32, K=4, nodes=2),
    "K=4, stride 2": dict(channels=64, K=4, nodes=1, stride=2),
    "evaluated": dict(channels=16, nodes=2, train=False),
    "NAS-Bench-201": NASBENCH201 | dict(channels=16),
    "NAS-Bench-201, 32 channels": NASBENCH201 | dict(channels=32, shape=(2, 6, 20)),
    "NAS-Bench-201, 64 channels, odd": NASBENCH201 | dict(channels=64, shape=(3, 5, 7)),
    "NAS-Bench-201, 112 channels, odd": NASBENCH201 | dict(channels=112, nodes=1, shape=(3, 7, 3)),
    "NAS-Bench-201, 20 channels": NASBENCH201 | dict(channels=20, shape=(3, 5, 7)),
    "NAS-Bench-201, evaluated": NASBENCH201 | dict(channels=16, train=False),
}
LAYERS = {
    "layers": dict(channels=(48, 16, 32)),
    "FactorizedReduce": dict(channels=(32, 16, 64), reduce=True),
    "few": dict(channels=(12, 4, 8)),
    "evaluated": dict(channels=(64, 64), train=False),
    "tiles in parts": dict(channels=(100, 80, 48), shape=(2, 5, 7)),
    "parts too small for tiles": dict(channels=(76, 32, 12), shape=(2, 5, 7)),
    "fewer pixels than a tile's rows": dict(channels=(64, 32, 16), shape=(6, 3, 1)),
}


def problem_of(options, kind=CellProblem, seed=0):
    torch.manual_seed(seed)
    return kind(dtype=F32, **({"shape": (4, 12, 20)} | options))


def assert_as_good_as_autocast(backend, draws, **options):
    """The rule of `tolerances`, of the root mean square over the draws: a kink here and there is luck."""
    measured = []
    for problem in draws:
        truth = problem.run(TRUTH, torch.float64)
        runs = problem.run(backend, **options), problem.run(PLAIN, poison=False)
        measured.append([errors(run, truth) for run in runs] + [size_of(truth)])
    for name in measured[0][0]:
        ours, theirs, size = (
            torch.stack([each[i][name][-1] for each in measured]).square().mean().sqrt() for i in range(3)
        )
        times = 3 if name.startswith("gradient") else 2
        assert ours <= times * theirs + 8 * torch.finfo(F32).eps * size, (
            f"{name}: {ours:.2e}, PyTorch's {theirs:.2e}"
        )


@pytest.mark.parametrize("memory", ["fast", "recompute"])
@pytest.mark.parametrize("case", CELLS)
def test_cells_are_as_good_as_autocast(backend, case, memory):
    draws = [problem_of(CELLS[case], seed=seed) for seed in range(3)]
    assert_as_good_as_autocast(backend, draws, memory=memory)


@pytest.mark.parametrize("case", LAYERS)
def test_layers_are_as_good_as_autocast(backend, case):
    assert_as_good_as_autocast(backend, [problem_of(LAYERS[case], LayerProblem, seed) for seed in range(3)])


@pytest.mark.parametrize("kind", [CellProblem, LayerProblem])
def test_products_are_of_bfloat16(backend, kind):
    """Neither those of float32, nor without autocast."""
    problem = problem_of(LAYERS["layers"] if kind is LayerProblem else CELLS["NAS-Bench-201"], kind)
    truth = problem.run(TRUTH, torch.float64)
    options = {} if kind is LayerProblem else {"memory": "recompute"}
    error, exact = (
        errors(problem.run(kernels, **options), truth)["output 0"][-1] / size_of(truth)["output 0"][-1]
        for kernels in (backend, CPUKernels(backends()["cpu"]))
    )
    assert 1e-4 < error < 1e-2 and exact < 1e-6


@pytest.mark.parametrize("channels", [(16, 48, 32), (64, 64), (20, 28), (72, 112), (100, 16), (76, 32)])
@pytest.mark.parametrize("size", [(1, 3), (1, 16), (5, 7), (4, 8), (19, 9)], ids=str)
def test_both_operands_are_rounded_and_nothing_else(backend, channels, size):
    problem = problem_of(dict(channels=channels, shape=(2, *size)), LayerProblem)
    recorded = RecordedOps(backend.backend)
    problem.run(under_autocast(CPUKernels)(recorded.backend))
    op, arguments, options = recorded.calls["relu_conv_bn_forward"]
    with backend.poison(True):
        _, outputs, moments = op(*arguments, **options)
    x = problem.inputs[0].relu().bfloat16().double()
    for layer, y, moment in zip(problem.module, outputs, moments, strict=True):
        truth = F.conv2d(x, layer.op[1].weight.bfloat16().double())
        for found, expected in [(y, truth), (moment[0], truth.mean((0, 2, 3)))]:
            torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5 * truth.abs().max().item())


@pytest.mark.parametrize("channels", [16, 32, 64, 80])
@pytest.mark.parametrize("size", [(3, 5), (8, 8), (9, 33)], ids=str)
def test_convolutions_of_small_integers_are_exact(backend, channels, size):
    """Winograd's sums of them too, in bfloat16: what is left are errors of float32."""
    options = dict(channels=channels, nodes=1, shape=(2, *size), place=torch.Tensor.round_)
    problem = problem_of(NASBENCH201 | options)
    for part in problem.module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.normal_(part.weight).round_().clamp_(-2, 2).mul_(4)
    truth = problem.run(TRUTH, torch.float64)["output 0"][0]
    [found] = problem.run(backend, memory="recompute")["output 0"]
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=1e-5 * truth.abs().max().item())


@pytest.mark.parametrize("view", ALIGNED)
@pytest.mark.parametrize("case", ["DARTS, stride 2", "NAS-Bench-201, 32 channels", "layers"])
def test_other_layouts_have_the_same_bits(backend, case, view):
    problem = problem_of(LAYERS[case], LayerProblem) if case in LAYERS else problem_of(CELLS[case])
    assert_same_bits(problem.run(backend, view=view), problem.run(backend))


@pytest.mark.parametrize("case", CELLS)
def test_threads_and_what_is_made_again_are_the_same_bits(backend, case):
    problem = problem_of(CELLS[case])
    results = [problem.run(backend) for _ in backend.schedules()]
    assert_same_bits(*results)

    recorded = RecordedOps(backend.backend)
    problem.run(under_autocast(Kernels)(recorded.backend), memory="recompute")
    made = recorded.calls["cell_branch_outputs"][2]
    forward = recorded.calls["cell_forward"][2]
    assert forward["bfloat16_products"] and made["bfloat16_products"]
    ops, (n, channels, h, w) = backend.backend._ops, problem.grads[0].shape
    size = h * w * channels // CELLS[case].get("K", 1)
    # an image ends with room for a whole vector
    again, first = (
        outputs.unflatten(0, (-1, (size + 31) // 32 * 32))[:, :size]
        for outputs in (ops.cell_branch_outputs(**made), ops.cell_forward(**forward)[2])
    )
    assert len(first) >= n and torch.equal(again, first)


def test_opcheck(backend):
    recorded = RecordedOps(backend.backend)
    kernels = under_autocast(Kernels)(recorded.backend)
    problem_of(CELLS["DARTS, stride 2"]).run(kernels, memory="recompute", concat=True)
    problem_of(LAYERS["layers"], LayerProblem).run(kernels)
    for name in ("cell_forward", "cell_branch_outputs", "cell_backward"):
        op, arguments, options = recorded.calls[name]
        library.opcheck(op, arguments, options, test_utils=("test_schema", "test_faketensor"))
    assert recorded.calls["relu_conv_bn_backward"][2]["bfloat16_products"]


@here
@pytest.mark.parametrize("channels", [15, 6, 2])
def test_other_channels_are_multiplied_in_float32(backend, channels):
    problem = problem_of(dict(channels=channels, nodes=1, primitives=("sep_conv_3x3", "skip_connect")))
    plain = problem.run(CPUKernels(backend.backend), memory="recompute")
    assert_same_bits(problem.run(backend, memory="recompute"), plain)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3.4e38])
@pytest.mark.parametrize("case", ["DARTS", "NAS-Bench-201"])
def test_what_is_not_finite_stays_where_it_is(backend, case, value):
    """It reaches no further than PyTorch's under autocast; 3.4e38 is an infinity in bfloat16."""

    def place(x):
        x[0, :, 4, 11] = value

    options = CELLS[case] | dict(train=False, shape=(2, 12, 20), place=place)
    if case == "DARTS":
        options |= dict(primitives=("sep_conv_3x3", "skip_connect"))
    problem = problem_of(options)
    ours, plain = problem.run(backend), problem.run(PLAIN, poison=False)
    for i in range(len(problem.grads)):
        [a], [b] = ours[f"output {i}"], plain[f"output {i}"]
        assert (a.isfinite() | ~b.isfinite()).all()
        assert value == 3.4e38 or not a.isfinite().all()


def test_pairs_are_two_inputs_in_the_place_of_a_float():
    matrices = torch.randn(3, 6, 5)
    packed = pairs(matrices)
    assert packed.shape == matrices.shape and not packed[:, 3:].any()
    halves = packed[:, :3].contiguous().view(torch.bfloat16).unflatten(-1, (5, 2))
    assert torch.equal(halves[..., 0], matrices[:, ::2].bfloat16())
    assert torch.equal(halves[..., 1], matrices[:, 1::2].bfloat16())
