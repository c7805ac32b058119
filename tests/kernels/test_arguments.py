"""The wall around the ops: every argument is checked, by name, before a pointer is taken.

The table of arguments is in csrc/README.md; schemas, fakes and the C++ checks have to agree with it.
"""

import re
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rfdarts_fast.nn import MixedOp
from rfdarts_fast.ops import backends
from rfdarts_fast.ops.compiled.fakes import FAKES
from rfdarts_fast.ops.compiled.packing import cell_weights, layer_weights
from rfdarts_fast.ops.contract import ReLUConvBNLayer
from rfdarts_fast.ops.dispatch import cell_call
from rfdarts_fast.spaces import DARTS_PRIMITIVES, get_space
from tests.kernels.views import channels_last

README = Path(__file__).resolve().parents[2] / "csrc" / "README.md"

if not backends()["cpu"].status()["built"]:
    pytest.skip("the kernels were not built", allow_module_level=True)


def noisy_plan(space="s4"):
    """The plan of a cell with noise, partial channels and two nodes."""
    names = DARTS_PRIMITIVES if space == "darts" else next(iter(get_space(space).cells.values()))[0]
    batch_norm = space != "nasbench201"
    edges = [MixedOp(names, 8, 1, K=2, batch_norm=batch_norm).requires_grad_(False) for _ in range(5)]
    return cell_call(edges, [torch.randn(2, 8, 6, 6)] * 2, torch.rand(5, len(names)), torch.rand(5)).plan


def cell_arguments(space="s4"):
    """Arguments of cell_forward, and the plan."""
    plan = noisy_plan(space)
    arguments = dict(
        inputs=[channels_last(torch.randn(2, 8, 6, 6)) for _ in range(2)],
        noise=[channels_last(torch.randn(2, 4, 6, 6)) for _ in range(plan.noises)],
        conv_weights=cell_weights(plan, torch.float32),
        gamma=torch.rand(len(plan.norms), 4),
        beta=torch.rand(len(plan.norms), 4),
        op_weights=torch.rand(5, plan.primitives),
        edge_weights=torch.rand(5),
        moments=torch.rand(2, len(plan.norms), 4, dtype=torch.float64),
        cell=plan.encoded,
        eps=1e-5,
        bfloat16=False,
        bfloat16_products=False,
        concat=False,
    )
    return arguments


def layer_arguments():
    convs = [torch.nn.Conv2d(8, 4, 1, bias=False) for _ in range(2)]
    layers = [ReLUConvBNLayer((conv,), torch.nn.BatchNorm2d(4)) for conv in convs]
    with torch.no_grad():
        return dict(
            x=channels_last(torch.randn(2, 8, 6, 6)),
            conv_weights=[layer_weights(layer) for layer in layers],
            gammas=[torch.rand(4) for _ in layers],
            betas=[torch.rand(4) for _ in layers],
            moments=[torch.rand(2, 4, dtype=torch.float64) for _ in layers],
            eps=1e-5,
            reduce=False,
            bfloat16_products=False,
        )


def norm_arguments():
    return dict(
        x=channels_last(torch.randn(2, 4, 6, 6)),
        gamma=torch.rand(4),
        beta=torch.rand(4),
        moments=torch.rand(2, 4, dtype=torch.float64),
        eps=1e-5,
        relu=True,
    )


def arguments_of(name, space="s4"):
    """Arguments that an op takes; those of a cell in a space."""
    ops = torch.ops.rfdarts
    torch.manual_seed(0)
    if name.startswith("cell"):
        forward = cell_arguments(space)
        if name == "cell_forward":
            return forward
        nodes, _, branch_outputs, moments = ops.cell_forward(**forward)
        shared = {
            k: forward[k] for k in ("inputs", "conv_weights", "gamma", "beta", "op_weights", "cell", "eps")
        }
        shared |= dict(nodes=nodes, moments=moments, bfloat16=False, bfloat16_products=False)
        if name == "cell_branch_outputs":
            return shared
        return shared | dict(
            grads=[torch.randn_like(node) for node in nodes],
            grad_nodes=[0, 1],
            noise=forward["noise"],
            edge_weights=forward["edge_weights"],
            branch_outputs=branch_outputs,
            training=False,
            needs_input_grad=[0, 1],
        )
    if name == "update_running_stats":
        return dict(
            running_means=[torch.zeros(4) for _ in range(3)],
            running_vars=[torch.ones(4) for _ in range(3)],
            num_batches_tracked=[torch.tensor(0) for _ in range(3)],
            moments=torch.rand(2, 3, 4, dtype=torch.float64),
            momentum=0.1,
            count=8,
        )
    if name.startswith("batch_norm"):
        forward = norm_arguments()
        if name == "batch_norm_forward":
            return forward
        output, moments = ops.batch_norm_forward(**forward)
        changed = dict(grad=torch.randn_like(output), moments=moments, training=False, needs_input_grad=True)
        return forward | changed
    forward = layer_arguments()
    if name == "relu_conv_bn_forward":
        return forward
    _, conv_outputs, moments = ops.relu_conv_bn_forward(**forward)
    grads = [torch.randn_like(output) for output in conv_outputs]
    changed = dict(
        moments=moments, conv_outputs=conv_outputs, grads=grads, training=False, needs_input_grad=True
    )
    return forward | changed


CHANGES = {
    "rank": lambda x: x.unsqueeze(0),
    "size": lambda x: torch.cat([x, x], dim=-1) if x.dim() else torch.stack([x, x]),
    "empty": lambda x: x.new_empty(0),
    "dtype": lambda x: x.to(torch.int32) if x.dtype == torch.int64 else x.to(torch.int64),
    "half": lambda x: x.to(torch.float16),
    "layout": lambda x: torch.stack([x, x], dim=-1)[..., 0],
}
SHAPES = "rank", "size", "empty"
COUNTS = {"one less": lambda x: x[:-1], "one more": lambda x: [*x, x[-1]]}


def is_list(value):
    return isinstance(value, list) and all(map(torch.is_tensor, value))


def change_last(value, change):
    return [*value[:-1], change(value[-1])] if is_list(value) else change(value)


TENSORS = [
    (op, name)
    for op in FAKES
    for name, value in arguments_of(op).items()
    if is_list(value) or torch.is_tensor(value)
]
LISTS = [(op, name) for op, name in TENSORS if is_list(arguments_of(op)[name])]


# what has no size of its own is measured against others, which then may be said to be at fault
SAID = {"gammas": "(gammas|betas)", "moments": "(moments|running_means)"}


def refused(op, arguments, name, error=ValueError):
    with pytest.raises(error, match=rf"\b{name}\b"):
        getattr(torch.ops.rfdarts, op)(**arguments)


def refused_of_fakes(op, arguments, name):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:

        def fake(value):
            return [mode.from_tensor(x) for x in value] if is_list(value) else mode.from_tensor(value)

        arguments = {k: fake(v) if is_list(v) or torch.is_tensor(v) else v for k, v in arguments.items()}
        refused(op, arguments, name, Exception)


@pytest.mark.parametrize("space", ["s4", "nasbench201"])
@pytest.mark.parametrize("op", FAKES)
def test_good_arguments_are_taken(op, space):
    getattr(torch.ops.rfdarts, op)(**arguments_of(op, space))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_every_tensor_is_checked(op, name, change):
    arguments = arguments_of(op)
    before = arguments[name][-1] if is_list(arguments[name]) else arguments[name]
    if change == "layout" and before.dim() == 0:
        pytest.skip("one number has no layout")
    if (name, change) == ("x", "size"):
        pytest.skip("another image size is as good")
    refused(op, arguments | {name: change_last(arguments[name], CHANGES[change])}, SAID.get(name, name))


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(("op", "name"), LISTS)
def test_lists_are_counted(op, name, count):
    arguments = arguments_of(op)
    # of lists that belong together, either may be said to be at fault
    lists = "|".join(other for o, other in LISTS if o == op)
    refused(op, arguments | {name: COUNTS[count](arguments[name])}, f"({lists})")


@pytest.mark.parametrize("change", SHAPES)
@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_fakes_check_shapes(op, name, change):
    if name in ("x", "inputs", "gammas") or (op, name) == ("update_running_stats", "num_batches_tracked"):
        pytest.skip("other arguments are measured against it")
    arguments = arguments_of(op)
    arguments[name] = change_last(arguments[name], CHANGES[change])
    refused_of_fakes(op, arguments, SAID.get(name, name))


@pytest.mark.parametrize("op", ["cell_forward", "cell_branch_outputs", "cell_backward"])
@pytest.mark.parametrize("change", [lambda inputs: [], lambda inputs: [x[0] for x in inputs]])
def test_fakes_check_the_first_input(op, change):
    arguments = arguments_of(op)
    refused_of_fakes(op, arguments | {"inputs": change(arguments["inputs"])}, "inputs")


BRANCH = 6
BAD_CELLS = {
    "nothing": lambda cell: [],
    "cut": lambda cell: cell[:-1],
    "longer": lambda cell: [*cell, 0],
    "no input": lambda cell: [0, *cell[1:]],
    "no node": lambda cell: [cell[0], 0, *cell[2:]],
    "K of 0": lambda cell: [*cell[:4], 0, *cell[5:]],
    "K that does not divide": lambda cell: [*cell[:4], 3, *cell[5:]],
    "stride of 0": lambda cell: [*cell[:5], 0, *cell[6:]],
    "stride of 3": lambda cell: [*cell[:5], 3, *cell[6:]],
    "huge": lambda cell: [2**40, *cell[1:]],
}
FIELDS = "op", "kernel", "dilation", "weight", "norm", "inner_norm", "noise"
for offset, field in enumerate(FIELDS):
    for value in (-2, 1000, 2**40):
        # the second branch of the first edge is a separable convolution
        BAD_CELLS[f"{field} of {value}"] = lambda cell, at=BRANCH + 7 + offset, value=value: [
            *cell[:at],
            value,
            *cell[at + 1 :],
        ]
del BAD_CELLS["noise of -2"], BAD_CELLS["noise of 1000"], BAD_CELLS[f"noise of {2**40}"]
BAD_CELLS["noise of 1000"] = lambda cell: [*cell[: BRANCH + 6], 1000, *cell[BRANCH + 7 :]]


@pytest.mark.parametrize("bad", BAD_CELLS)
@pytest.mark.parametrize("op", ["cell_forward", "cell_branch_outputs", "cell_backward"])
def test_bad_descriptions_are_refused(op, bad):
    if op == "cell_branch_outputs" and bad.startswith("noise"):
        pytest.skip("takes no noise")
    arguments = arguments_of(op)
    refused(
        op, arguments | {"cell": BAD_CELLS[bad](arguments["cell"])}, "(cell|inputs|noise|gamma|conv_weights)"
    )


@pytest.mark.parametrize("indices", [[0, 2], [-1, 0], [0, 0], [0, 2**40]])
@pytest.mark.parametrize("name", ["grad_nodes", "needs_input_grad"])
def test_indices_are_in_range_and_differ(name, indices):
    refused("cell_backward", arguments_of("cell_backward") | {name: indices}, name)


@pytest.mark.parametrize("op", [op for op in FAKES if "bfloat16_products" in arguments_of(op)])
def test_products_of_bfloat16_are_refused_where_there_are_none(op):
    arguments = arguments_of(op)
    # float64 has none
    double = {
        name: [x.double() for x in value] if is_list(value) else value.double()
        for name, value in arguments.items()
        if is_list(value) or torch.is_tensor(value)
    }
    refused(op, arguments | double | {"bfloat16_products": True}, "bfloat16_products")


def described(plan):
    """The text that C++ makes of an encoded cell, made of the plan."""
    sizes = f"inputs={plan.inputs} nodes={plan.nodes} primitives={plan.primitives}"
    lines = [f"{sizes} norms={len(plan.norms)} K={plan.K}"]
    weight = 0
    for e, edge in enumerate(plan.edges):
        lines.append(f"edge {e}: source={edge.source} node={edge.node} stride={edge.stride}")
        for b in edge.branches:
            lines.append(
                f"  op={int(b.op)} kernel={b.kernel} dilation={b.dilation} weight={weight if b.convs else 0}"
                f" norm={b.norm} inner_norm={b.inner_norm} noise={b.noise}"
            )
            weight += b.packed_size(plan.mixed_channels)
    return lines


@pytest.mark.parametrize("space", ["darts", "s4"])
def test_encoder_and_decoder_agree(space):
    plan = noisy_plan(space)
    assert torch.ops.rfdarts.cell_text(plan.encoded).splitlines() == described(plan)
    assert cell_weights(plan, torch.float32).numel() == sum(b.packed_size(4) for b in plan.branches())


def documented():
    """{op: [(argument, type)]} of the tables in csrc/README.md."""
    tables, op = {}, None
    for line in README.read_text().splitlines():
        if heading := re.match(r"#+ .*`(\w+)`", line):
            op = heading[1]
        elif line.startswith("|") and op in FAKES:
            cells = [cell.strip().strip("`") for cell in line.strip("|").split("|")]
            if cells[0] != "argument" and not set(cells[0]) <= set("-: "):
                tables.setdefault(op, []).append((cells[0], cells[1]))
    return tables


@pytest.mark.parametrize("op", FAKES)
def test_the_table_of_arguments_is_true(op):
    schema = getattr(torch.ops.rfdarts, op).default._schema
    of = {"List[Tensor]": "Tensor[]", "List[int]": "int[]", "Optional[Tensor]": "Tensor?"}
    expected = [(a.name, of.get(str(a.type), str(a.type))) for a in schema.arguments]
    assert [(name, re.sub(r"\(.!\)", "", kind)) for name, kind in documented()[op]][
        : len(expected)
    ] == expected
