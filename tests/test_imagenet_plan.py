"""The plan of the ImageNet search: its parts, and messages of the size that processes send."""

import pytest

from benchmarks import imagenet_plan as plan
from benchmarks.cuda_predicted import cell_needs


@pytest.mark.parametrize(("K", "scalars"), [(2, 38_128), (4, 19_824)])
def test_messages_hold_every_trainable_scalar(K, scalars):
    """Gammas and betas, as tests/nn/test_sizes.py counts them; 14 edges of 8 ops and 14 betas, twice."""
    assert plan.message_bytes(K) == (4 * (scalars + 8), 4 * (2 * 14 * 9 + 8))


def test_parts_of_a_step():
    parts = plan.step_parts(2, 64)
    assert parts["cells"].launches == 8 * sum(map(len, cell_needs(2, 16, 28, 1, 64).values()))
    for name, twice in plan.step_parts(2, 128).items():
        assert twice.size == pytest.approx(2 * parts[name].size), name
        assert twice.seconds == pytest.approx(2 * parts[name].seconds), name
    assert plan.step_parts(4, 64)["cells"].size < parts["cells"].size


def test_the_table(capsys):
    plan.print_runs(4)
    one, eight, *_ = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "1024" in line]
    assert float(one[3]) == pytest.approx(8 * float(eight[3]), rel=0.01)
    # 126 steps in each of 50 epochs, and the architecture's in 15
    assert one[9] == eight[9] == f"{126 * 65:,}"
