"""The modules of a foreign supernet that can be fused; nothing is changed until they are applied."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from rfdarts_fast import nn as rfnn
from rfdarts_fast.drop_in.edges import RULES, Call, Edge
from rfdarts_fast.drop_in.fused import Fused, UnderstoodCell, UnderstoodFront, UnderstoodMixedOp, fuse
from rfdarts_fast.drop_in.probe import disagreement, output_channels, random, rule_of, state, weights_of
from rfdarts_fast.drop_in.recognise import Unrecognised, preprocessing, recognise, settings

_PARTS = (1, 2, 4, 8)
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


@dataclass(frozen=True)
class MixedOpForm:
    """A mixed op: the name of its list of operations, "" for a list without a module, and how they are
    summed up."""

    name: str
    primitives: tuple[str, ...]
    K: int = 1
    shuffle: bool = True
    rule: str = "all"

    def fuse(self, module: nn.Module) -> None:
        edge = Edge(getattr(module, self.name))
        edge.K, edge.shuffle, edge.channels = self.K, self.shuffle, self.K * edge.channels
        fuse(module, UnderstoodMixedOp(module, [edge], Call(module, 2), self.rule))


@dataclass(frozen=True)
class FrontForm:
    """ReLU, convolution, BatchNorm in front of a cell."""

    def fuse(self, module: nn.Module) -> None:
        layer = preprocessing(module)
        assert layer is not None
        fuse(module, UnderstoodFront(module, layer))


@dataclass(frozen=True)
class CellForm:
    """A cell: its mixed ops by path, the paths of what is in front; see `UnderstoodCell` for the others."""

    mixed_ops: dict[str, MixedOpForm]
    front: tuple[str, ...]
    channels: int | None
    nodes: int
    outputs: int = 1
    rule: str = "all"
    neutral: dict[str, Any] = field(default_factory=dict)
    edge_weights: str | None = None

    def fuse(self, module: nn.Module) -> None:
        edges = []
        for path, form in self.mixed_ops.items():
            mixed_op: Any = module.get_submodule(path)
            if form.name and not isinstance(mixed_op, Fused):
                form.fuse(mixed_op)
            edges.append(mixed_op.rfdarts.edges[0] if form.name else self._edge(mixed_op))
        front = [module.get_submodule(path) for path in self.front]
        call = Call(module, 1 + (len(front) or 1), self.neutral)
        shape = self.channels, self.nodes, self.outputs
        fuse(module, UnderstoodCell(module, edges, call, self.rule, front, *shape, self.edge_weights))

    def _edge(self, candidates: nn.ModuleList) -> Edge:
        edge = Edge(candidates)
        edge.channels = self.channels or edge.channels
        edge.K = edge.channels // (edge.width or edge.channels or 1)
        return edge


Form = MixedOpForm | FrontForm | CellForm


class Replacements:
    """Everything in `model` that can be replaced.

    Attributes:
        modules: path -> module.
        forms: path of a module -> what it is to become; mixed ops first, cells last.
        left: path -> reason why a module need not be replaced.
        problems: path -> reason why a mixed op cannot be replaced.
        doubts: path -> reason why a module with a list of modules is none.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self.forms: dict[str, Form] = {}
        self.left: dict[str, str] = {}
        self.problems: dict[str, str] = {}
        self.doubts: dict[str, str] = {}
        self._tried: dict[Any, Any] = {}
        for path, module in self.modules.items():
            if isinstance(module, (rfnn.MixedOp, Fused)):
                self.left[path] = "fused already"
            elif not isinstance(module, _CONTAINERS):
                self._examine_mixed_op(path, module)
        for path, module in self.modules.items():
            if path not in self.left and not isinstance(module, _CONTAINERS) and path not in self.forms:
                self._examine_cell(path, module)

    def apply(self) -> dict[str, str]:
        """Fuses everything; returns path -> description."""
        for path, form in self.forms.items():
            form.fuse(self.modules[path])
        return {path: str(self.modules[path].rfdarts) for path in self.forms}

    def _examine_mixed_op(self, path: str, module: nn.Module) -> None:
        lists: list[tuple[str, Any]] = [(n, child) for n, child in module.named_children() if _is_list(child)]
        if not lists:
            return
        call = Call(module, 2)
        required = [name for name in call.names if name not in call.neutral or name in call.missing]
        described = f"its forward({', '.join(call.names)})"
        try:
            edges = [Edge(child) for _, child in lists]
        except Unrecognised as error:
            names = [_primitive(op) for _, child in lists for op in child.children()]
            partly = any(names) and len({*names} - {None}) == len(names) - names.count(None)
            reasons = self.problems if partly and len(call.names) != 1 and len(required) < 3 else self.doubts
            reasons[path] = str(error)
            return
        if any(len({*edge.primitives}) < len(edge.primitives) for edge in edges):
            self.doubts[path] = "it has an operation twice"
        elif len(call.names) < 2:
            takes = f"expected {type(module).__name__} to have a forward(x, weights)"
            (self.doubts if call.names else self.problems)[path] = takes
        elif len(lists) > 1:
            self.doubts[path] = f"it has several lists of operations ({', '.join(name for name, _ in lists)})"
        elif call.missing:
            self.problems[path] = f"{described} needs more than x and weights"
        else:
            try:
                self.forms[path] = self._mixed_op_form(module, *lists[0], edges[0])
            except Unrecognised as error:
                self.problems[path] = str(error)

    def _mixed_op_form(
        self, module: nn.Module, name: str, candidates: nn.ModuleList, edge: Edge
    ) -> MixedOpForm:
        outside = _state_names(module) - {f"{name}.{inner}" for inner in _state_names(candidates)}
        if outside:
            raise Unrecognised(f"it has tensors outside its operations ({', '.join(sorted(outside))})")
        if "forward" in vars(module):
            raise Unrecognised("its forward is an attribute of the instance")
        key = (type(module), name, edge.primitives, edge.stride, repr(settings(module)))
        if key not in self._tried:
            self._tried[key] = _prove_mixed_op(module, name, edge)
        proved = self._tried[key]
        if isinstance(proved, str):
            raise Unrecognised(proved)
        return proved

    def _examine_cell(self, path: str, module: nn.Module) -> None:
        mixed_ops = dict(self._mixed_ops(path, module))
        inside = f"{path}." if path else ""
        refused = any(other != path and other.startswith(inside) for other in self.problems)
        if len(mixed_ops) < 2 or refused or len(Call(module, 1).names) == 1:
            return
        try:
            form = self._cell_form(path, module, mixed_ops)
        except Unrecognised as error:
            if not all(form.name for form in mixed_ops.values()):
                self.problems[path] = str(error)
            else:
                self.left[path] = f"{error}; its mixed ops are fused one by one"
            return
        self.problems.pop(path, None)
        self.doubts.pop(path, None)
        self.forms[path] = form

    def _cell_form(self, path: str, cell: nn.Module, mixed_ops: dict[str, MixedOpForm]) -> CellForm:
        around = {each.partition(".")[0] for each in mixed_ops}
        front = [name for name, child in cell.named_children() if name not in around and _state_names(child)]
        own = {*dict(cell.named_parameters(recurse=False)), *dict(cell.named_buffers(recurse=False))}
        if own:
            raise Unrecognised(f"it has tensors of its own ({', '.join(sorted(own))})")
        inputs = len(front) or 1
        if inputs not in (1, 2) or len(front) == 1:
            raise Unrecognised(f"it has {len(front)} modules beside its mixed ops ({', '.join(front)})")
        for name in front:
            self._examine_front(f"{path}.{name}".lstrip("."), getattr(cell, name))
        nodes = next((n for n in range(1, 20) if sum(range(inputs, inputs + n)) >= len(mixed_ops)), 0)
        if sum(range(inputs, inputs + nodes)) != len(mixed_ops):
            raise Unrecognised(
                f"its {len(mixed_ops)} mixed ops are none from each earlier state to each node"
            )
        first = cell.get_submodule(front[1]) if front else None
        widths = [m.num_features for m in first.modules() if isinstance(m, nn.BatchNorm2d)] if first else []
        if front and not widths:
            raise Unrecognised(f"the channels of its states are unknown ({front[1]} has no BatchNorm)")
        ours = [form for form in mixed_ops.values() if form.name]
        rules = {form.rule for form in ours}
        if len(rules) > 1 or not all(form.shuffle for form in ours):
            raise Unrecognised("its mixed ops skip operations by different rules, or do not shuffle channels")
        if len({len(form.primitives) for form in mixed_ops.values()}) > 1:
            raise Unrecognised("its mixed ops have different numbers of operations")
        form = CellForm(mixed_ops, tuple(front), None, nodes)
        key = (type(cell), repr(form), repr(settings(cell)))
        form = replace(form, channels=widths[-1] if widths else None)
        if key not in self._tried:
            self._tried[key] = _prove_cell(cell, form, [*rules] or [*RULES])
        proved = self._tried[key]
        if isinstance(proved, str):
            raise Unrecognised(proved)
        return replace(proved, channels=form.channels)

    def _mixed_ops(self, path: str, module: nn.Module, inner: str = "") -> Iterator[tuple[str, MixedOpForm]]:
        """Mixed ops, and lists of operations, that a module has in its lists and dictionaries, by path."""
        for name, child in module.named_children():
            where = f"{inner}.{name}".lstrip(".")
            form = self.forms.get(f"{path}.{where}".lstrip("."))
            if isinstance(form, MixedOpForm):
                yield where, form
            elif (edge := _edge(child)) is not None:
                yield where, MixedOpForm("", edge.primitives)
            elif isinstance(child, (nn.ModuleList, nn.ModuleDict)):
                yield from self._mixed_ops(path, child, where)

    def _examine_front(self, path: str, module: nn.Module) -> None:
        layer = preprocessing(module)
        if layer is None or path in self.left:
            return
        key = (type(module), len(layer.convs), repr(settings(module)))
        if key not in self._tried:
            x = state(layer.convs[0].in_channels)
            self._tried[key] = disagreement(module, FrontForm().fuse, [x], {})
        if self._tried[key] is None:
            self.forms[path] = FrontForm()


def _prove_mixed_op(module: nn.Module, name: str, edge: Edge) -> MixedOpForm | str:
    """The form that agrees with the module, or the reason why there is none."""
    width, reasons = edge.width, []
    # an attribute may tell
    told = [value for value in settings(module).values() if type(value) is int and value in _PARTS]
    for K in dict.fromkeys([*told, *_PARTS]):
        x = state(8 if width is None else width * K)
        try:
            rule = rule_of(module, lambda copied: getattr(copied, name), x, edge.primitives)
        except Unrecognised as error:
            reasons.append((K, str(error)))
            continue
        for shuffle in (True, False) if K > 1 else (True,):
            form = MixedOpForm(name, edge.primitives, K, shuffle, rule)
            reason = disagreement(module, form.fuse, [x, weights_of(len(edge.primitives))], {})
            if reason is None:
                return form
            reasons.append((K, reason))
    return (
        f"its forward is not the weighted sum of its operations: with K={min(reasons)[0]} {min(reasons)[1]}"
    )


def _prove_cell(cell: nn.Module, form: CellForm, rules: Sequence[str]) -> CellForm | str:
    """The form that agrees with the cell, or the reason why there is none."""
    count = len(form.mixed_ops), len(next(iter(form.mixed_ops.values())).primitives)
    convs = [_first(nn.Conv2d, cell.get_submodule(name)) for name in form.front]
    # a FactorizedReduce in front halves what comes from before the reduction
    tensors = [state(conv.in_channels, conv.stride[0]) for conv in convs if conv]
    if not tensors:
        norm = _first(nn.BatchNorm2d, cell)
        tensors = [state(norm.num_features if norm else 8)]
    channels = form.channels or tensors[0].shape[1]
    tensors.append(weights_of(*count))
    call = Call(cell, len(tensors))
    if len(call.names) < len(tensors) or None in convs:
        return f"its forward({', '.join(call.names)}) takes fewer than {len(tensors)} arguments"
    # other required arguments may be a drop probability, of 0
    form = replace(form, neutral=dict.fromkeys(call.missing, 0.0))
    accepted: list[CellForm] = []
    reasons: list[str] = []
    for name in [None, *call.optional]:
        named: dict[str, Any] = {k: v for k, v in form.neutral.items() if k != name}
        if name is not None:
            named[name] = random(count[0]).abs()
        try:
            outputs = output_channels(cell, tensors, named) // channels
        except Unrecognised as error:
            reasons.append(str(error))
            continue
        for rule in rules:
            tried = replace(form, rule=rule, outputs=outputs, edge_weights=name)
            reason = disagreement(cell, tried.fuse, tensors, named)
            if reason is None:
                accepted.append(tried)
                break
            reasons.append(reason)
    if not accepted:
        return f"its forward is not the published one: {reasons[0]}"
    proved = accepted[-1]
    if proved.edge_weights is not None and accepted[0] is proved:
        # without them it computes something else
        proved = replace(proved, neutral=proved.neutral | {proved.edge_weights: object()})
    return proved


def _first(layer: Any, module: nn.Module) -> Any:
    return next((m for m in module.modules() if isinstance(m, layer)), None)


def _is_list(module: nn.Module) -> bool:
    """True for a list of modules none of which is a list itself."""
    inner = [*module.children()] if isinstance(module, nn.ModuleList) else []
    return len(inner) > 1 and not any(isinstance(each, (nn.ModuleList, nn.ModuleDict)) for each in inner)


def _primitive(op: nn.Module) -> str | None:
    try:
        return recognise(op).name
    except Unrecognised:
        return None


def _edge(candidates: nn.Module) -> Edge | None:
    """The edge that a list of operations is, or None."""
    try:
        edge = Edge(candidates) if isinstance(candidates, nn.ModuleList) and _is_list(candidates) else None
    except Unrecognised:
        return None
    # the cell of a derived network has a list of operations too
    return edge if edge and len({*edge.primitives}) == len(edge.primitives) else None


def _state_names(module: nn.Module) -> set[str]:
    return {*dict(module.named_parameters()), *dict(module.named_buffers())}
