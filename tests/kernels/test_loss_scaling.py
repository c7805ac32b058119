"""float16 training needs a scaled loss; torch's GradScaler works with the kernels."""

import torch

from tests.kernels.oracles import on
from tests.kernels.problems import FEW, CellProblem
from tests.kernels.tolerances import TRUTH

F16, F32 = torch.float16, torch.float32
# makes of gradients of about 1 what float16 has no numbers for
SMALL = 1e-9


def train(backend, problem, init_scale):
    """Gradients of gamma in one step, without a scale if it is None; whether gamma moved; the scale then."""
    edges, inputs, weights = problem.leaves(backend, F32)
    gammas = [p for name, p in problem.trained(edges) if name.endswith("weight")]
    before = [gamma.detach().clone() for gamma in gammas]
    optimizer = torch.optim.SGD(gammas, lr=1e6)
    scaler = torch.amp.GradScaler(backend.device, init_scale=init_scale, enabled=init_scale is not None)
    with torch.autocast(backend.device, F16):
        nodes = problem.compute(backend, edges, inputs, *weights)
    assert all(node.dtype == F16 for node in nodes)
    grads = [SMALL * grad.to(backend.device, F32) for grad in problem.grads]
    loss = sum((node * grad).sum() for node, grad in zip(nodes, grads, strict=True))
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    grads = torch.cat([gamma.grad for gamma in gammas]).cpu()
    scaler.step(optimizer)
    scaler.update()
    moved = any(not torch.equal(gamma, old) for gamma, old in zip(gammas, before, strict=True))
    return grads, moved, scaler.get_scale()


@on("emulated", "triton", "gpu")
def test_gradients_of_float16_states(backend):
    torch.manual_seed(0)
    problem = CellProblem((2, 4, 4), F32, primitives=FEW, channels=8, nodes=1)
    exact = SMALL * torch.cat(problem.run(TRUTH, torch.float64)["gradient of weight"])
    scaled, moved, _ = train(backend, problem, 2.0**24)
    assert moved and (scaled - exact).norm() < 0.02 * exact.norm()
    # all gradients of states are below float16's least number
    unscaled, moved, _ = train(backend, problem, None)
    assert not moved and unscaled.count_nonzero() == 0
    # what overflows is seen, the step left out, and the scale halved
    _, moved, scale = train(backend, problem, 2.0**60)
    assert not moved and scale == 2.0**59
