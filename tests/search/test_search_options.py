"""Every option of `rfdarts search` has an effect on what it names: a field without a check here fails."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import run_options
import torch
from torch import nn

from rfdarts_fast.cli import parse_config
from rfdarts_fast.nn import MixedOp
from rfdarts_fast.ops import use_backend
from rfdarts_fast.runs.config import ConfigError
from rfdarts_fast.search import PRESETS, SearchConfig, search
from rfdarts_fast.search import run as search_module
from rfdarts_fast.search.config import preset_values
from rfdarts_fast.search.run import SearchRun

CELL_SPACE = {"space": "s2", "layers": 3}
PARTIAL = {**CELL_SPACE, "method": "rf-pcdarts"}


@pytest.fixture
def lab(start, tiny_search, tmp_path, monkeypatch):
    counter = iter(range(1000))

    def elsewhere(changes):
        return {"out": tmp_path / str(next(counter)), **changes}

    def finish(**changes):
        wanted = tiny_search(**elsewhere(changes))
        search(wanted)
        return wanted.out

    def parse(*args):
        return parse_config(SearchConfig, preset_values, [*args, "--out", "x"], "rfdarts search")

    return SimpleNamespace(
        start=lambda **changes: start(**elsewhere(changes)),
        finish=finish,
        parse=parse,
        tmp_path=tmp_path,
        monkeypatch=monkeypatch,
    )


def rates(lab, **changes):
    """The learning rate of each weight step."""
    run, seen = lab.start(**changes), []
    run.weight_optimizer.register_step_pre_hook(lambda o, *_: seen.append(o.param_groups[0]["lr"]))
    run.run()
    return seen


def weight_option(lab, name, value):
    return {group[name] for group in lab.start(**{name: value}).weight_optimizer.param_groups}


def sizes(lab, **changes):
    run = lab.start(**changes)
    return len(run.batches.indices), len(run.val_batches.indices)


def cell_norms(run):
    return [m for edge in run.network.modules() if isinstance(edge, MixedOp) for m in norms(edge)]


def norms(module):
    return [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]


def check_preset(lab):
    assert lab.parse("--preset", "quick").epochs == PRESETS["quick"]["epochs"]
    assert lab.parse("--preset", "rf-pcdarts-imagenet").stem == "imagenet"


def check_method(lab):
    for method, trains in (("darts", True), ("rf-darts", False)):
        stem = lab.start(method=method).network.stem[0]
        assert stem.weight.requires_grad == trains


def check_space(lab):
    assert [lab.start(space=s).network.space.name for s in ("s4", "nasbench201")] == ["s4", "nasbench201"]


def check_channels(lab):
    assert [lab.start(channels=c).network.stem[0].out_channels for c in (4, 8)] == [4, 8]


def check_layers(lab):
    assert [len(lab.start(space="s2", layers=n).network.cells) for n in (1, 2)] == [1, 2]


def check_cells_per_stage(lab):
    # and a residual block between two stages
    assert [len(lab.start(cells_per_stage=n).network.cells) for n in (1, 2)] == [5, 8]


def check_stem(lab):
    networks = [lab.start(space="s2", image_size=32, stem=stem).network for stem in ("cifar", "imagenet")]
    assert [hasattr(network, "stem1") for network in networks] == [False, True]


def check_partial_channels(lab):
    for K in (1, 2):
        network = lab.start(**PARTIAL, partial_channels=K).network
        assert {m.K for m in network.modules() if isinstance(m, MixedOp)} == {K}


def check_edge_norm(lab):
    parameters = [lab.start(**PARTIAL, edge_norm=on).network.named_arch_parameters() for on in (False, True)]
    assert ["betas_normal" in names for names in parameters] == [False, True]


def check_affine(lab):
    for affine in (False, True):
        assert {m.affine for m in cell_norms(lab.start(method="darts", affine=affine))} == {affine}


def check_track_running_stats(lab):
    for track in (False, True):
        run = lab.start(track_running_stats=track)
        assert {m.track_running_stats for m in cell_norms(run)} == {track}


def check_conv_init(lab):
    weight = lab.start(conv_init="orthogonal").network.stem[0].weight.flatten(1)
    torch.testing.assert_close(weight @ weight.T, torch.eye(4), atol=1e-5, rtol=0)
    weight = lab.start(conv_init="kaiming_normal").network.stem[0].weight.flatten(1)
    assert not torch.allclose(weight @ weight.T, torch.eye(4), atol=1e-1)


def check_gamma_init(lab):
    for scheme, ones in (("ones", True), ("uniform", False)):
        network = lab.start(gamma_init=scheme).network
        assert all((m.weight == 1).all() for m in norms(network)) == ones


def check_train_classifier(lab):
    for train in (False, True):
        assert lab.start(train_classifier=train).network.classifier.weight.requires_grad == train


def check_batch_size(lab):
    run = lab.start(batch_size=6)
    assert len(run.batches) == 2
    assert len(next(run._val_stream)[0]) == 6


def check_learning_rate(lab):
    assert rates(lab, learning_rate=0.2, epochs=1) == pytest.approx([0.2] * 3)


def check_learning_rate_min(lab):
    assert rates(lab, learning_rate=0.2, learning_rate_min=0.1) == pytest.approx([0.2] * 3 + [0.15] * 3)


def check_learning_rate_warmup_epochs(lab):
    changes = {"learning_rate": 0.2, "learning_rate_warmup_epochs": 2}
    assert rates(lab, **changes) == pytest.approx([0.1] * 3 + [0.2] * 3)


def check_learning_rate_scaling(lab):
    # batches of 4 images
    changes = {"learning_rate": 0.2, "learning_rate_min": 0.1, "base_batch_size": 16}
    for scaling, factor in (("none", 1), ("linear", 1 / 4), ("sqrt", 1 / 2)):
        expected = [0.2 * factor] * 3 + [0.15 * factor] * 3
        assert rates(lab, **changes, learning_rate_scaling=scaling) == pytest.approx(expected)
    changes["learning_rate_warmup_epochs"] = 2
    warm = rates(lab, **changes, learning_rate_scaling="linear")
    assert warm == pytest.approx([0.025] * 3 + [0.05] * 3)


def check_arch_learning_rate_scaling(lab):
    changes = {"arch_learning_rate": 0.8, "base_batch_size": 1, "learning_rate_scaling": "linear"}
    for scaling, expected in (("none", 0.8), ("linear", 3.2), ("sqrt", 1.6)):
        run = lab.start(**changes, arch_learning_rate_scaling=scaling)
        assert run.arch_optimizer.param_groups[0]["lr"] == expected


def check_base_batch_size(lab):
    changes = {"learning_rate": 0.2, "epochs": 1, "learning_rate_scaling": "linear"}
    for base, expected in ((2, 0.4), (8, 0.1)):
        assert rates(lab, **changes, base_batch_size=base) == pytest.approx([expected] * 3)
    for name, values in PRESETS.items():
        assert lab.parse("--preset", name).base_batch_size == values.get("batch_size", 64)
    config = lab.parse("--preset", "rf-pcdarts-imagenet", "--batch-size", "64")
    assert (config.batch_size, config.base_batch_size) == (64, 1024)


def check_schedule_per_step(lab):
    changes = {"learning_rate": 0.2, "learning_rate_min": 0.0, "epochs": 1}
    assert rates(lab, **changes, schedule_per_step=True) == pytest.approx([0.2, 0.15, 0.05])


def check_momentum(lab):
    assert weight_option(lab, "momentum", 0.7) == {0.7}


def check_nesterov(lab):
    assert [weight_option(lab, "nesterov", on) for on in (False, True)] == [{False}, {True}]


def check_weight_decay(lab):
    assert weight_option(lab, "weight_decay", 0.3) == {0.3}


def check_bn_weight_decay(lab):
    for decay, expected in ((True, {0.3}), (False, {0.0})):
        groups = lab.start(weight_decay=0.3, bn_weight_decay=decay).weight_optimizer.param_groups
        assert {group["weight_decay"] for group in groups} == expected


def clips(lab, **changes):
    """What the two optimisers clip to: weights, architecture."""
    run, seen = lab.start(**changes), {}
    lab.monkeypatch.setattr(search_module, "descend", lambda o, p, g, clip: seen.setdefault(id(o), clip))
    run.train_step(*next(run.batches.epoch(0)))
    return seen[id(run.weight_optimizer)], seen[id(run.arch_optimizer)]


def check_grad_clip(lab):
    assert clips(lab, grad_clip=2.5) == (2.5, 0.0)


def check_arch_grad_clip(lab):
    assert clips(lab, arch_grad_clip=2.5) == (5.0, 2.5)


def check_arch_learning_rate(lab):
    assert lab.start(arch_learning_rate=0.7).arch_optimizer.param_groups[0]["lr"] == 0.7


def check_arch_weight_decay(lab):
    assert lab.start(arch_weight_decay=0.7).arch_optimizer.param_groups[0]["weight_decay"] == 0.7


def check_arch_warmup_epochs(lab):
    for warm_up in (0, 1):
        run = lab.start(arch_warmup_epochs=warm_up)
        run.run()
        assert run.val_position == 3 * (2 - warm_up)


def passes(lab, **changes):
    """The number of forward passes in a step."""
    run, seen = lab.start(**changes), []
    run.network.register_forward_hook(lambda *_: seen.append(1))
    run.train_step(*next(run.batches.epoch(0)))
    return len(seen)


def check_order(lab):
    assert [passes(lab, order=order) for order in ("first", "second")] == [2, 5]


def check_step_order(lab):
    for step_order, first in (("arch-first", "arch"), ("weights-first", "weights")):
        run, seen = lab.start(step_order=step_order), []
        run.arch_optimizer.register_step_pre_hook(lambda *_, seen=seen: seen.append("arch"))
        run.weight_optimizer.register_step_pre_hook(lambda *_, seen=seen: seen.append("weights"))
        run.train_step(*next(run.batches.epoch(0)))
        assert seen[0] == first


def check_levels(lab):
    assert [passes(lab, levels=levels) for levels in (1, 2)] == [1, 2]


def check_split(lab):
    halves = {}
    for split in ("half", "stratified", "per-class"):
        run = lab.start(split=split, train_fraction=0.5, val_fraction=0.34)
        halves[split] = run.batches.indices.tolist(), run.val_batches.indices.tolist()
        assert not set(halves[split][0]) & set(halves[split][1])
    assert halves["half"] == (list(range(12)), list(range(12, 24)))
    assert [label % 4 for label in sorted(halves["stratified"][0], key=lambda i: i % 4)] == sorted(
        [0, 1, 2, 3] * 3
    )
    assert halves["stratified"] != halves["half"]
    assert [len(part) for part in halves["per-class"]] == [12, 8]


def check_train_portion(lab):
    assert sizes(lab, train_portion=0.75) == (18, 6)


def check_train_fraction(lab):
    assert sizes(lab, split="per-class", train_fraction=0.5, val_fraction=0.34) == (12, 8)


def check_val_fraction(lab):
    assert sizes(lab, split="per-class", train_fraction=0.34, val_fraction=0.5) == (8, 12)


def check_split_file(lab):
    file = lab.tmp_path / "split.txt"
    file.write_text(json.dumps({"train": ["int", ["5", "7", "9"]], "valid": ["int", ["0", "23"]]}))
    run = lab.start(split="nasbench201", split_file=file)
    assert run.batches.indices.tolist() == [5, 7, 9]
    assert run.val_batches.indices.tolist() == [0, 23]


def check_cutout(lab):
    run = lab.start(cutout=3)
    assert [b.augment.cutout for b in (run.batches, run.val_batches, run.held_out)] == [3, 3, 0]


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def check_validate_every(lab):
    for every, expected in ((0, [False] * 3), (1, [True] * 3), (2, [False, True, False])):
        folder = lab.finish(validate_every=every, epochs=3)
        assert ["val" in record for record in records(folder)] == expected


def check_genotype_rule(lab):
    step = SearchRun.train_step

    def step_and_set_alphas(run, *batch):
        step(run, *batch)
        # none wins everywhere, skip_connect comes second
        with torch.no_grad():
            run.network.alphas.copy_(torch.tensor([4.0, 3, 2, 1, 0]).expand(6, 5))

    lab.monkeypatch.setattr(SearchRun, "train_step", step_and_set_alphas)
    for rule, op in (("published", "none"), ("without-none", "skip_connect")):
        folder = lab.finish(genotype_rule=rule, epochs=1)
        result = json.loads((folder / "genotype.json").read_text())
        assert (set(result["edges"]), result["rule"]) == ({op}, rule)
        assert (records(folder)[0]["genotype"], records(folder)[0]["genotype_rule"]) == (result["text"], rule)


def check_table(lab):
    file = lab.tmp_path / "table.csv"
    file.write_text("arch,cifar10_test\n|none~0|+|none~0|none~1|+|none~0|none~1|none~2|,10\n")
    printed = []
    lab.monkeypatch.setattr("rfdarts_fast.runs.progress.say", printed.append)
    folder = lab.finish(table=file, epochs=1)
    cell = records(folder)[0]["genotype"]
    assert records(folder)[0]["table"] is None and printed[-1].endswith("  table: no such cell")
    file.write_text(file.read_text() + f"{cell},90.5\n")
    assert records(lab.finish(table=file, epochs=1))[0]["table"] == {"cifar10": {"test": 90.5, "rank": 1}}
    assert printed[-1].endswith("  table: cifar10 90.50% rank 1")
    # it may come later, and go
    without = lab.finish(epochs=1)
    assert "table" not in records(without)[0]
    lab.finish(out=without, epochs=1, table=file)


def check_diagnose_every(lab):
    for every, expected in ((0, [False] * 3), (2, [False, True, False])):
        folder = lab.finish(diagnose_every=every, epochs=3)
        assert ["diagnostics" in record for record in records(folder)] == expected


def check_diagnose_images(lab):
    assert [len(lab.start(diagnose_images=n).diagnosed.indices) for n in (5, 1024)] == [5, 12]


def check_diagnose_cells(lab):
    asked = []
    lab.monkeypatch.setattr(search_module, "kendall_tau", lambda *args: asked.append(args[-1]))
    file = lab.tmp_path / "table.csv"
    file.write_text("arch,cifar10_test\n|none~0|+|none~0|none~1|+|none~0|none~1|none~2|,10\n")
    lab.finish(table=file, diagnose_every=1, epochs=1, diagnose_cells=7)
    assert asked == [7]


def backends(lab, **changes):
    """The backend, its memory mode and the budget, if there is one, in each step."""
    seen, step = set(), SearchRun.train_step

    def note(self, *batch):
        limit = [] if use_backend.budget is None else [use_backend.budget.limit]
        seen.add((use_backend.name, use_backend.memory, *limit))
        step(self, *batch)

    lab.monkeypatch.setattr(SearchRun, "train_step", note)
    lab.finish(epochs=1, **changes)
    return seen


def check_backend(lab):
    assert backends(lab, backend="reference") == {("reference", "fast")}


def check_amp(lab):
    seen = []
    run = lab.start(amp="bf16")
    run.network.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    run.architect.loss(next(run.batches.epoch(0)))
    assert seen == [True]


def check_cuda_graph(lab):
    cuda = torch.device("cuda")
    for name in ("auto", "on", "off"):
        assert search_module.uses_graph(lab.start(cuda_graph=name).config, cuda) == (name != "off")
    with pytest.raises(ConfigError, match="cuda_graph: expected off or auto on device cpu, got 'on'"):
        lab.finish(cuda_graph="on", device="cpu")


def check_memory(lab):
    assert backends(lab, backend="reference", memory="recompute") == {("reference", "recompute")}


def check_memory_budget(lab):
    assert backends(lab, memory_budget=1.5) == {("auto", "fast", 1_500_000)}


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(SearchConfig)])
def test_option_reaches_what_it_names(field, lab):
    check = globals().get(f"check_{field}") or getattr(run_options, f"check_{field}", None)
    assert check is not None, f"no check of --{field}: add check_{field} here"
    check(lab)
