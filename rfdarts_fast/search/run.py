"""The bilevel search: from a config to genotype.json."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Hashable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rfdarts_fast.data import (
    Batches,
    DataSource,
    StoredSet,
    default_augment,
    evaluation_augment,
    read_split_file,
    split_half,
    split_per_class,
    split_stratified,
)
from rfdarts_fast.ops import backends, synchronise_batch_norms, use_backend
from rfdarts_fast.runs.agreement import refuse_different_data, refuse_different_runs
from rfdarts_fast.runs.config import require
from rfdarts_fast.runs.fingerprint import Fingerprint, fingerprint
from rfdarts_fast.runs.follower import FollowerFolder, folder_of
from rfdarts_fast.runs.graph import GraphedStep, Recorder
from rfdarts_fast.runs.meters import Meter
from rfdarts_fast.runs.micro_batches import micro_batch_size
from rfdarts_fast.runs.run import (
    Run,
    check_network,
    check_shares,
    choose_device,
    evaluate,
    load_data,
    on_device,
    place,
    seed_everything,
)
from rfdarts_fast.runs.run_folder import RunFolder
from rfdarts_fast.runs.schedule import batch_scale, scheduled_rate, set_learning_rate
from rfdarts_fast.runs.watch import Watch
from rfdarts_fast.runs.world import ALONE, World, launched
from rfdarts_fast.search.architect import Architect, Batch, Portion, descend
from rfdarts_fast.search.build import build_supernet, weight_groups
from rfdarts_fast.search.config import SearchConfig
from rfdarts_fast.search.diagnostics import (
    AlphaGradients,
    alphas,
    architecture_diagnostics,
    gamma_diagnostics,
)
from rfdarts_fast.search.flat_sgd import FlatSGD
from rfdarts_fast.search.probes import diagnose, kendall_tau
from rfdarts_fast.spaces import AnyGenotype, to_json
from rfdarts_fast.tables import Table, open_table


def uses_graph(config: SearchConfig, device: torch.device, world: World = ALONE) -> bool:
    """True if steps are recorded in a CUDA graph.

    The second order reads the learning rate on the host, and messages to other processes are not recorded.
    """
    return device.type == "cuda" and config.cuda_graph != "off" and config.order == "first" and world.alone


def split(config: SearchConfig, source: DataSource) -> tuple[Tensor, Tensor]:
    """Indices of the images that train the weights and of those that train the architecture."""
    labels = source.train.labels
    match config.split:
        case "half":
            return split_half(len(labels), config.train_portion, name="train-portion")
        case "stratified":
            return split_stratified(labels, config.train_portion, config.seed, "train-portion")
        case "per-class":
            fractions = config.train_fraction, config.val_fraction
            if isinstance(source.train, StoredSet):
                return source.train.split(fractions)
            train, val = split_per_class(labels, fractions, config.seed, ("train-fraction", "val-fraction"))
            return train, val
    assert config.split_file is not None
    return read_split_file(config.split_file, len(labels))


def sample(indices: Tensor, count: int) -> Tensor:
    """`count` of the indices, or all if there are fewer: always the same, spread over them all."""
    order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))
    return indices[order[:count].sort().values]


class SearchRun(Run):
    """One search: two optimisers, two streams of images, one supernet."""

    results = ("genotype.json",)

    def __init__(
        self,
        config: SearchConfig,
        source: DataSource,
        folder: RunFolder | FollowerFolder,
        table: Table | None = None,
        world: World | None = None,
    ) -> None:
        world = world or World()
        device = choose_device(config.device, world)
        channels_last = config.memory_format == "channels_last"
        train_indices, val_indices = split(config, source)
        augment = default_augment(source, cutout=config.cutout, flip=config.flip, channels_last=channels_last)

        def batches(indices: Tensor, **changes: Any) -> Batches:
            options = {"augment": augment, "seed": config.seed, "device": device, "workers": config.workers}
            options |= {"shard": world.shard, "batch_size": config.batch_size}
            return Batches(source.train, indices, **{**options, **changes})

        label = f"search {config.method}"
        super().__init__(folder, config, batches(train_indices), config.epochs, label, world)
        self.config = config
        self.table = table
        self.val_batches = batches(val_indices, seed=config.seed + 1)
        unchanged = {"augment": evaluation_augment(source, channels_last=channels_last), "shuffle": False}
        at_a_time = micro_batch_size(config.batch_size, config.grad_accum_steps)
        self.held_out = batches(val_indices, **unchanged, batch_size=at_a_time)
        # all of them in each process, which have no need of one another then
        unchanged["shard"] = ALONE.shard
        self.diagnosed = batches(sample(val_indices, config.diagnose_images), **unchanged)
        self.val_position = 0
        self.val_meter = Meter(device)

        seed_everything(config.seed)
        self.network = place(build_supernet(config, source.num_classes), config, device)
        if config.sync_batch_norm:
            synchronise_batch_norms(self.network)
        graphed = uses_graph(config, device, world)
        self.weight_optimizer = FlatSGD(
            weight_groups(self.network, config),
            lr=torch.tensor(config.learning_rate, device=device) if graphed else config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.nesterov,
            # the one that takes its rate from a tensor without reading it on the host
            fused=True if graphed else None,
        )
        scale = batch_scale(config.arch_learning_rate_scaling, config.batch_size, config.base_batch_size)
        self.arch_optimizer = torch.optim.Adam(
            self.network.arch_parameters(),
            lr=scale * config.arch_learning_rate,
            betas=(0.5, 0.999),
            weight_decay=config.arch_weight_decay,
            capturable=device.type == "cuda",
        )
        self.alpha_gradients = AlphaGradients(self.network)
        bf16 = config.amp == "bf16"
        self.architect = Architect(self.network, self.weight_optimizer, config.order, bf16, world)
        self.watch = watch = Watch(device, *self._watched_names())
        self._see = watch.see
        self._graph: GraphedStep | None = None
        if graphed:
            self._graph = GraphedStep(self._compute, Recorder(device), required=config.cuda_graph == "on")
        self.resume()
        self._val_stream = self.val_batches.stream(self.val_position)

    def _watched_names(self) -> list[list[str]]:
        """The names of a weight step's loss and gradients, of an architecture step's, and of one for both."""
        names = {p: f"the gradient of {name}" for name, p in self.network.named_parameters()}
        weights = [names[p] for p in self.architect.weights]
        arch = [f"the gradient of {name}" for name in self.network.named_arch_parameters()]
        return [["loss", *weights], ["validation loss", *arch], ["loss", *weights, *arch]]

    def split_names(self) -> dict[str, list[str]]:
        """The images of the two parts of the split, by the names of their files."""
        parts = {"weights": self.batches, "architecture": self.val_batches}
        return {part: b.dataset.names(b.indices.tolist()) for part, b in parts.items()}

    def agreed(self) -> list[Tensor]:
        return [*self.architect.weights, *self.architect.arch]

    def parts(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        return {
            "network": self.network,
            "weight_optimizer": self.weight_optimizer,
            "arch_optimizer": self.arch_optimizer,
        }

    def values(self) -> dict[str, Any]:
        return {
            "val_position": self.val_position,
            "val_meter": self.val_meter.sums,
            "alpha_gradients": self.alpha_gradients.state(),
        }

    def load_values(self, state: dict[str, Any]) -> None:
        self._keep_modes()
        self.val_position = state["val_position"]
        self.val_meter.sums.copy_(state["val_meter"])
        if "alpha_gradients" in state:
            self.alpha_gradients.load(state["alpha_gradients"])

    def _keep_modes(self) -> None:
        """A checkpoint brings the modes of its run's optimisers, which may have run on another device."""
        device = self.batches.device
        for group in self.weight_optimizer.param_groups:
            rate = float(group["lr"])
            group["lr"] = rate if self._graph is None else torch.tensor(rate, device=device)
            group["fused"] = None if self._graph is None else True
        for group in self.arch_optimizer.param_groups:
            group["capturable"] = device.type == "cuda"
        for state in self.arch_optimizer.state.values():
            state["step"] = state["step"].to(device if device.type == "cuda" else "cpu")

    def train_step(self, images: Tensor, labels: Tensor) -> None:
        within = self.step / len(self.batches) if self.config.schedule_per_step else 0.0
        set_learning_rate(self.weight_optimizer, scheduled_rate(self.config, "cosine", self.epoch + within))
        batches = [images, labels]
        searching = self.epoch >= self.config.arch_warmup_epochs
        bilevel = searching and self.config.levels == 2
        if bilevel:
            batches += next(self._val_stream)
        compute = self._compute if self._graph is None else self._graph
        compute("one level" if searching and not bilevel else "step", *batches)
        self.val_position += bilevel

    def _compute(self, variant: Hashable, *batches: Tensor) -> None:
        """A step on training images and labels and, once the architecture moves, on validation images too.

        In the variant "one level" the training images move both.
        Everything that changes is a tensor on the device, so that a CUDA graph can hold it.
        """
        if variant == "one level":
            self._one_level_step(batches)
            return
        train, val = batches[:2], batches[2:]
        if val and self.config.step_order == "arch-first":
            self._arch_step(train, val)
        self._weight_step(train)
        if val and self.config.step_order == "weights-first":
            self._arch_step(train, val)

    def _portion(self, batches: Batches) -> Portion:
        return Portion(batches.share, self.micro_batches_of(batches))

    def _weight_step(self, batch: Batch) -> None:
        weights = self.architect.weights
        grads, sums = self.architect.step_gradients(batch, weights, self._portion(self.batches))
        self._see(0, sums[0], grads)
        descend(self.weight_optimizer, weights, grads, self.config.grad_clip)
        self.meter.sums += sums

    def _arch_step(self, train: Batch, val: Batch) -> None:
        portions = self._portion(self.batches), self._portion(self.val_batches)
        grads, sums = self.architect.gradients(train, val, portions)
        self._see(1, sums[0], grads)
        self._move_architecture(grads)
        self.val_meter.sums += sums

    def _one_level_step(self, batch: Batch) -> None:
        weights = self.architect.weights
        both = [*weights, *self.architect.arch]
        grads, sums = self.architect.step_gradients(batch, both, self._portion(self.batches))
        self._see(2, sums[0], grads)
        descend(self.weight_optimizer, weights, grads[: len(weights)], self.config.grad_clip)
        self._move_architecture(grads[len(weights) :])
        self.meter.sums += sums

    def _move_architecture(self, grads: list[Tensor]) -> None:
        self.alpha_gradients.add(grads)
        descend(self.arch_optimizer, self.architect.arch, grads, self.config.arch_grad_clip)

    def finish_epoch(self) -> dict[str, Any]:
        images = self.meter.images + self.val_meter.images
        rule = self.config.genotype_rule
        genotype = self.network.genotype(rule)
        record: dict[str, Any] = {
            "train": self.meter.result(),
            "arch": self.val_meter.result(),
            "images_per_second": images / self.seconds if self.seconds else None,
            "learning_rate": float(self.weight_optimizer.param_groups[0]["lr"]),
            "arch_learning_rate": self.arch_optimizer.param_groups[0]["lr"],
            **architecture_diagnostics(self.network, genotype, rule),
            "gamma": gamma_diagnostics(self.network),
            "alpha_gradient": self.alpha_gradients.result(),
        }
        if self.table is not None:
            record["table"] = self.table.entry(genotype) if str(genotype) in self.table.cells else None
        every = self.config.validate_every
        if every and (self.epoch + 1) % every == 0:
            record["val"] = evaluate(self.network, self.held_out, self.world)
        every = self.config.diagnose_every
        if every and (self.epoch + 1) % every == 0:
            record["diagnostics"] = diagnose(self.architect, self.diagnosed, genotype)
            if self.table is not None:
                record["diagnostics"]["kendall_tau"] = kendall_tau(
                    self.network, self.diagnosed, self.table, self._table_dataset, self.config.diagnose_cells
                )
        self.folder.alphas.append({"epoch": self.epoch, **alphas(self.network)})
        self.val_meter.reset()
        self.alpha_gradients.reset()
        return record

    def summary(self, record: dict[str, Any]) -> str:
        train, val = record["train"], record.get("val")
        held_out = f"  val {val['loss']:.3f} {val['accuracy']:.1f}%" if val else ""
        entropy = " ".join(f"{cell} {value:.3f}" for cell, value in record["entropy"].items())
        return (
            f"epoch {record['epoch']:3d}/{self.epochs}  train {train['loss']:.3f} {train['accuracy']:.1f}%"
            f"{held_out}  {record['images_per_second']:.0f} images/s  lr {record['learning_rate']:.4f}"
            f"  entropy {entropy}  skips {record['skip_connects']}"
            f"  parameter-free {record['parameter_free_ops']}{self._in_table(record)}"
        )

    @property
    def _table_dataset(self) -> str:
        """The table's data set that is the run's own, or else its first."""
        assert self.table is not None
        return self.config.dataset if self.config.dataset in self.table.datasets else self.table.datasets[0]

    def _in_table(self, record: dict[str, Any]) -> str:
        if self.table is None:
            return ""
        entry = (record["table"] or {}).get(self._table_dataset)
        if entry is None:
            return "  table: no such cell"
        return f"  table: {self._table_dataset} {entry['test']:.2f}% rank {entry['rank']}"


@contextmanager
def opened(config: SearchConfig, read_only: bool = False) -> Iterator[SearchRun]:
    """The run of a config at the position from which it goes on, its folder locked.

    With `read_only` the folder is checked and stays as it is. Raises ConfigError, DataError, RunFolderError
    or CheckpointError if something does not fit.
    """
    with launched() as world, ExitStack() as stack:
        refuse_different_runs(world, config)
        with world.agreeing():
            config, source, data, table = _prepared(config, world, stack)
        refuse_different_data(world, data)
        with world.agreeing():
            folder = stack.enter_context(folder_of(world, "search", config, data, read_only))
        yield SearchRun(config, source, folder, table, world)


def _prepared(
    config: SearchConfig, world: World, stack: ExitStack
) -> tuple[SearchConfig, DataSource, Fingerprint, Table | None]:
    """The config with its image size, the data and their fingerprint; the backend is in `stack`."""
    config.check()
    if config.threads:
        torch.set_num_threads(config.threads)
    device = choose_device(config.device, world)
    graphed = device.type == "cuda" and world.alone
    where = f"device {device}" if world.alone else "several processes"
    require(config.cuda_graph != "on" or graphed, config, "cuda_graph", f"off or auto on {where}")
    table = None if config.table is None else open_table(config.table)
    source = load_data(config)
    parts = split(config, source)
    sizes = [len(indices) for indices in parts]
    check_shares(config.batch_size, sizes, world.size, config.grad_accum_steps)
    if config.diagnose_every:
        sizes.append(min(config.diagnose_images, sizes[1]))
    # a backend chosen outside, by RFDARTS_BACKEND say, holds unless the config names one
    backend = use_backend.name if config.backend == "auto" else config.backend
    if config.sync_batch_norm and not world.alone and backend in backends():
        able = backends()[backend].synchronises
        require(able, config, "sync_batch_norm", f"none on the backend {backend}")
    budget = None if config.memory_budget is None else int(config.memory_budget * 1e6)
    stack.enter_context(on_device(device))
    stack.enter_context(use_backend(backend, config.memory, budget))
    check_network(
        lambda: build_supernet(config, source.num_classes),
        config.batch_size,
        sizes,
        source.image_size,
        device,
        world.size,
        config.grad_accum_steps,
    )
    config = dataclasses.replace(config, image_size=source.image_size)
    data = fingerprint(source, dict(zip(("weights", "architecture"), parts, strict=True)))
    return config, source, data, table


def search(config: SearchConfig) -> AnyGenotype:
    """Searches, or goes on with what the folder `config.out` holds; writes genotype.json there.

    Raises ConfigError, DataError, RunFolderError or CheckpointError before any training if something does not
    fit, Stopped (with the state saved) after SIGTERM and RunFailed if the run cannot go on.
    """
    with opened(config) as run:
        if config.split == "per-class":
            run.write_result("split.json", json.dumps(run.split_names(), indent=1) + "\n")
        run.run()
        genotype = run.network.genotype(config.genotype_rule)
        run.write_result("genotype.json", to_json(genotype, config.genotype_rule) + "\n")
    return genotype
