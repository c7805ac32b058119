"""Training and evaluation of a derived network."""

from __future__ import annotations

import bisect
import dataclasses
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from rfdarts_fast.data import (
    Batches,
    ColourJitter,
    DataSource,
    default_augment,
    evaluation_augment,
)
from rfdarts_fast.messages import thing_at
from rfdarts_fast.nn import NasBench201Network, Network
from rfdarts_fast.nn.counting import multiply_adds
from rfdarts_fast.nn.derived import AUXILIARY_MIN_SIDE
from rfdarts_fast.ops import synchronise_batch_norms, use_backend
from rfdarts_fast.retrain.config import TrainConfig
from rfdarts_fast.runs import schema
from rfdarts_fast.runs.agreement import refuse_different_data, refuse_different_runs
from rfdarts_fast.runs.checkpoint import load_checkpoint, misfit, restoring
from rfdarts_fast.runs.config import ConfigError
from rfdarts_fast.runs.fingerprint import fingerprint
from rfdarts_fast.runs.follower import FollowerFolder, folder_of
from rfdarts_fast.runs.meters import batch_sums
from rfdarts_fast.runs.micro_batches import micro_batch_size, micro_batches, weighed
from rfdarts_fast.runs.output import complain
from rfdarts_fast.runs.run import (
    Run,
    RunFailed,
    check_network,
    check_shares,
    choose_device,
    evaluate,
    in_one_line,
    load_data,
    on_device,
    out_of_memory,
    place,
    seed_everything,
)
from rfdarts_fast.runs.run_folder import (
    LAST,
    RunFolder,
    RunFolderError,
    check_config,
    position,
    read_config,
    read_last,
    refuse_other_data,
    to_plain,
)
from rfdarts_fast.runs.schedule import scheduled_rate, set_learning_rate
from rfdarts_fast.runs.watch import Watch
from rfdarts_fast.runs.world import ALONE, World, launched
from rfdarts_fast.spaces import AnyGenotype, CellGenotype, GenotypeError, parse, to_json
from rfdarts_fast.spaces.text import MOST_CHARACTERS


def read_genotype(text: str) -> AnyGenotype:
    """A genotype from a JSON file's path or any text that `spaces.parse` reads; ConfigError otherwise."""
    try:
        if not text.endswith(".json"):
            return parse(text)
        there = thing_at(text)
        if there not in ("a file", "nothing there"):
            raise ConfigError(f"genotype: {text} cannot be read: it is {there}")
        with Path(text).open() as file:
            return parse(file.read(MOST_CHARACTERS + 1))
    except OSError as error:
        raise ConfigError(f"genotype: {text} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"genotype: {text} cannot be read: {error}") from None
    except GenotypeError as error:
        raise ConfigError(str(error)) from None


def build_network(config: TrainConfig, genotype: AnyGenotype, num_classes: int) -> nn.Module:
    """The derived network; its `forward` returns (logits, auxiliary logits or None)."""
    if isinstance(genotype, CellGenotype):
        return NasBench201Network(genotype, config.channels, num_classes, config.cells_per_stage)
    return Network(genotype, config.channels, num_classes, config.layers, config.auxiliary, config.stem)


def fitted(config: TrainConfig, genotype: AnyGenotype, num_classes: int, image_size: int) -> TrainConfig:
    """The config, with fewer channels if it asks for them; ConfigError for a network above its limit."""
    limit = config.max_multiply_adds
    if limit is None:
        return config

    def millions(channels: int) -> float:
        with torch.device("meta"):
            network = build_network(
                dataclasses.replace(config, channels=channels, auxiliary=False), genotype, num_classes
            )
        return multiply_adds(network, image_size) / 1e6

    widths = range(config.channels - config.channels % 2, 0, -2)
    # they grow with the width
    place = bisect.bisect_left(widths, True, key=lambda width: millions(width) < limit)
    fits = widths[place] if place < len(widths) else None
    if fits == config.channels or (config.auto_width and fits):
        return dataclasses.replace(config, channels=fits)
    here = millions(config.channels)
    if here < limit:
        return config
    narrower = f"--auto-width takes {fits} channels" if fits else "no width stays below it"
    raise ConfigError(
        f"max_multiply_adds: expected a network below {limit:g} million, got {here:.4g} with "
        f"{config.channels} channels ({narrower})"
    )


def check_genotype(config: TrainConfig, genotype: AnyGenotype, image_size: int) -> None:
    """ConfigError if the options do not fit the genotype, or the images the auxiliary head."""
    if isinstance(genotype, CellGenotype):
        for field in ("auxiliary", "drop_path"):
            if getattr(config, field):
                raise ConfigError(
                    f"{field}: expected none with a NAS-Bench-201 cell, got {getattr(config, field)!r}"
                )
        if config.stem != "cifar":
            raise ConfigError(f"stem: expected cifar with a NAS-Bench-201 cell, got {config.stem}")
        return
    if config.auxiliary:
        shrink = 4 if config.stem == "cifar" else 32
        side, needed = image_size // shrink, AUXILIARY_MIN_SIDE[config.stem]
        if side < needed:
            raise ConfigError(
                f"auxiliary: expected images of at least {needed * shrink} pixels for the auxiliary head, "
                f"got {image_size} (use --no-auxiliary)"
            )


class TrainRun(Run):
    """One training of a derived network; the test images choose the best checkpoint, as published."""

    results = ("genotype.json", "best.pt", "result.json")

    def __init__(
        self,
        config: TrainConfig,
        genotype: AnyGenotype,
        source: DataSource,
        folder: RunFolder | FollowerFolder,
        world: World | None = None,
    ) -> None:
        world = world or World()
        device = choose_device(config.device, world)
        channels_last = config.memory_format == "channels_last"
        jitter = ColourJitter(0.4, 0.4, 0.4, 0.2) if config.colour_jitter else None
        augment = default_augment(
            source, cutout=config.cutout, jitter=jitter, flip=config.flip, channels_last=channels_last
        )
        batches = Batches(
            source.train,
            None,
            config.batch_size,
            augment=augment,
            seed=config.seed,
            device=device,
            workers=config.workers,
            shard=world.shard,
        )
        super().__init__(folder, config, batches, config.epochs, "train", world)
        self.config = config
        self.genotype = genotype
        self.test_batches = _test_batches(config, source, device, world)
        seed_everything(config.seed)
        self.network = place(build_network(config, genotype, source.num_classes), config, device)
        if config.sync_batch_norm:
            synchronise_batch_norms(self.network)
        self.optimizer = torch.optim.SGD(
            self.network.parameters(),
            lr=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.nesterov,
        )
        self.ema: AveragedModel | None = None
        if config.ema_decay:
            average = get_ema_multi_avg_fn(config.ema_decay)
            self.ema = AveragedModel(self.network, multi_avg_fn=average, use_buffers=True)
        # kernels are for frozen convolutions, and their dispatcher is nothing to compile
        self._forward = torch.compile(self.network) if config.compile else self.network
        self.best: dict[str, Any] = {"epoch": -1, "accuracy": -1.0}
        self.resume()

    def agreed(self) -> list[Tensor]:
        return list(self.network.parameters())

    def parts(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        parts: dict[str, nn.Module | torch.optim.Optimizer]
        parts = {"network": self.network, "optimizer": self.optimizer}
        return parts if self.ema is None else {**parts, "ema": self.ema}

    def values(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_values(self, state: dict[str, Any]) -> None:
        self.best = state["best"]

    def train_step(self, images: Tensor, labels: Tensor) -> None:
        config = self.config
        rate = scheduled_rate(config, config.schedule, self.epoch, config.learning_rate_decay)
        set_learning_rate(self.optimizer, rate)
        # linear from 0 (quark0/darts train.py)
        if isinstance(self.network, Network):
            self.network.drop_path_prob = config.drop_path * self.epoch / config.epochs
        self.optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(4, dtype=torch.float64, device=images.device)
        for batch, share in micro_batches((images, labels), self.micro_batches_of(self.batches)):
            total, sums_of_part = self._loss(*batch)
            # .grad adds up
            weighed(total, share * self.batches.share).backward()
            sums += sums_of_part
        used = {name: p for name, p in self.network.named_parameters() if p.grad is not None}
        local = [p.grad for p in used.values() if p.grad is not None]
        grads, sums = self.world.sum_step(local, sums)
        for parameter, grad in zip(used.values(), grads, strict=True):
            parameter.grad = grad
        if self.watch is None:
            # parameters that no loss depends on have no gradient
            self.watch = Watch(images.device, ["loss", *(f"the gradient of {name}" for name in used)])
        self.watch.see(0, sums[0], grads)
        if config.grad_clip:
            nn.utils.clip_grad_norm_(self.network.parameters(), config.grad_clip)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update_parameters(self.network)
        self.meter.sums += sums

    def _loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The loss that is minimised, the auxiliary head's included, and sums as of `batch_sums`."""
        bf16, smoothing = self.config.amp == "bf16", self.config.label_smoothing
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            logits, auxiliary = self._outputs(images)
        logits = logits.float() if bf16 else logits
        total = loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        if auxiliary is not None:
            auxiliary = auxiliary.float() if bf16 else auxiliary
            of_auxiliary = F.cross_entropy(auxiliary, labels, label_smoothing=smoothing)
            total = loss + self.config.auxiliary_weight * of_auxiliary
        return total, batch_sums(loss, logits, labels)

    def _outputs(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        try:
            return self._forward(images)
        except RuntimeError as error:
            if not self.config.compile or out_of_memory(error):
                raise
            raise RunFailed(
                f"compile: the network cannot be compiled here: {in_one_line(error)}; {self._kept()}"
            ) from error

    def finish_epoch(self) -> dict[str, Any]:
        record: dict[str, Any] = {
            "train": self.meter.result(),
            "images_per_second": self.meter.images / self.seconds if self.seconds else None,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
        }
        done = self.epoch + 1
        if done % self.config.evaluate_every == 0 or done == self.epochs:
            record["test"] = evaluate(self.network, self.test_batches, self.world)
            if self.ema is not None:
                # the average is what is kept and exported
                record["without_ema"] = record["test"]
                record["test"] = evaluate(self.ema.module, self.test_batches, self.world)
            if record["test"]["accuracy"] > self.best["accuracy"]:
                self.best = {"epoch": self.epoch, "accuracy": record["test"]["accuracy"]}
                self.save("best.pt")
        return record

    def last_test(self) -> dict[str, Any]:
        """The last epoch's loss and accuracy on the test images; RunFolderError if its record lacks them."""
        test = self.folder.metrics.read()[-1].get("test")
        if not isinstance(test, dict) or not {"accuracy", "loss"} <= test.keys():
            raise RunFolderError(f"run: {self.folder.metrics.path} is damaged: its last record has no test")
        return test

    def result(self) -> dict[str, Any]:
        """The values of result.json; RunFolderError as `last_test`."""
        last = self.last_test()
        head = getattr(self.network, "auxiliary_head", None)
        own, of_head = (
            sum(p.numel() for p in part.parameters()) if part is not None else 0
            for part in (self.network, head)
        )
        return {
            "test_accuracy": last["accuracy"],
            "test_top5": last.get("top5"),
            "test_loss": last["loss"],
            "best_accuracy": self.best["accuracy"],
            "best_epoch": self.best["epoch"],
            "parameters": own - of_head,
        }

    def summary(self, record: dict[str, Any]) -> str:
        train, test = record["train"], record.get("test")
        tested = f"  test {test['loss']:.3f} {test['accuracy']:.2f}%" if test else ""
        # of few classes five are most
        if test and self.test_batches.dataset.labels.max() > 10:
            tested += f" top-5 {test['top5']:.2f}%"
        return (
            f"epoch {record['epoch']:3d}/{self.epochs}  train {train['loss']:.3f} {train['accuracy']:.1f}%"
            f"{tested}  {record['images_per_second']:.0f} images/s  lr {record['learning_rate']:.4f}"
        )


def _test_batches(
    config: TrainConfig, source: DataSource, device: torch.device, world: World = ALONE
) -> Batches:
    return Batches(
        source.require_test(),
        None,
        micro_batch_size(config.batch_size, config.grad_accum_steps),
        augment=evaluation_augment(source, channels_last=config.memory_format == "channels_last"),
        seed=config.seed,
        device=device,
        shuffle=False,
        workers=config.workers,
        shard=world.shard,
    )


@contextmanager
def opened(config: TrainConfig, read_only: bool = False) -> Iterator[TrainRun]:
    """The run of a config at the position from which it goes on; see `rfdarts_fast.search.run.opened`."""
    with launched() as world, ExitStack() as stack:
        refuse_different_runs(world, config)
        with world.agreeing():
            config, genotype, source = _prepared(config, world, stack)
            data = fingerprint(source)
        refuse_different_data(world, data)
        with world.agreeing():
            folder = stack.enter_context(folder_of(world, "train", config, data, read_only))
        yield TrainRun(config, genotype, source, folder, world)


def _prepared(
    config: TrainConfig, world: World, stack: ExitStack
) -> tuple[TrainConfig, AnyGenotype, DataSource]:
    """The config as it is noted, the genotype and the data; the backend is in `stack`."""
    config.check()
    if config.threads:
        torch.set_num_threads(config.threads)
    device = choose_device(config.device, world)
    genotype = read_genotype(config.genotype)
    source = load_data(config)
    source.require_test()
    check_genotype(config, genotype, source.image_size)
    check_shares(config.batch_size, [len(source.train)], world.size, config.grad_accum_steps)
    stack.enter_context(on_device(device))
    if config.compile:
        stack.enter_context(use_backend("reference"))
    check_network(
        lambda: build_network(config, genotype, source.num_classes),
        config.batch_size,
        [len(source.train)],
        source.image_size,
        device,
        world.size,
        config.grad_accum_steps,
    )
    config = fitted(config, genotype, source.num_classes, source.image_size)
    config = dataclasses.replace(config, image_size=source.image_size, genotype=str(genotype))
    return config, genotype, source


def train(config: TrainConfig) -> dict[str, Any]:
    """Trains, or goes on with what the folder `config.out` holds; writes result.json there and returns it.

    The result has the test accuracy (percent) of the last and of the best epoch, and the parameter count.
    Raises as `rfdarts_fast.search.search` does.
    """
    with opened(config) as run:
        run.write_result("genotype.json", to_json(run.genotype) + "\n")
        run.run()
        result = run.world.from_leader(run.result() if run.world.leads else {})
        run.write_result("result.json", json.dumps(result, indent=2) + "\n")
    return result


def evaluate_run(path: Path, checkpoint: str = "best", **changes: Any) -> dict[str, float | None]:
    """Loss (nats) and accuracies (percent) of a training run's checkpoint on the test images.

    Args:
        path: folder of a `rfdarts train` run.
        checkpoint: "best" or "last"; where the last is damaged or missing, the one before it, said on stderr.
        changes: values that replace those of the run's config, such as device or data_root.
    """
    file, network, stored = load_network(path, checkpoint)
    config = dataclasses.replace(stored, **changes)
    config.check()
    device = choose_device(config.device)
    source = load_data(config)
    parts = fingerprint(source)
    refuse_other_data(path, {name: parts[name] for name in ("classes", "test") if name in parts})
    classes = network.classifier.out_features
    if classes != source.num_classes:
        raise misfit(file, f"it has {classes} classes and the data set {source.num_classes}")
    with on_device(device):
        return evaluate(place(network, config, device), _test_batches(config, source, device))


def load_network(path: Path, checkpoint: str = "best") -> tuple[Path, Any, TrainConfig]:
    """The checkpoint of a training run's folder, its network, in training mode, and the run's config.

    Args:
        path: folder of a `rfdarts train` run.
        checkpoint: as of `evaluate_run`.

    Raises RunFolderError, CheckpointError or ConfigError for a folder that is damaged or of another kind.
    """
    config = read_config(path, "train", TrainConfig)
    config.check()
    file, state = _checkpoint(path, checkpoint)
    check_config(file, state, "train", to_plain(config))
    weights: Any = state.get("network")
    if config.ema_decay and isinstance(state.get("ema"), dict):
        # the part below `module.`, beside a counter
        weights = {n.removeprefix("module."): x for n, x in state["ema"].items() if n != "n_averaged"}
    bias = weights.get("classifier.bias") if isinstance(weights, dict) else None
    # without one the misfit below names it
    classes = len(bias) if isinstance(bias, Tensor) and bias.ndim == 1 else 1
    network = build_network(config, read_genotype(config.genotype), classes)
    wrong = schema.misfit(weights, network, "network")
    if wrong:
        raise misfit(file, wrong)
    with restoring(file):
        network.load_state_dict(weights)
    return file, network, config


def _checkpoint(path: Path, which: str) -> tuple[Path, dict[str, Any]]:
    file = path / ("best.pt" if which == "best" else LAST)
    if which == "best" and file.exists():
        return file, load_checkpoint(file)
    last = read_last(path) if which == "last" else None
    if last is None:
        raise RunFolderError(f"run: expected a checkpoint {file.name} in {path}, got none yet")
    there, state, damage = last
    if there != file:
        complain(f"{damage or f'run: {file} is missing'}; evaluating {there.name}, {position(state)}")
    return there, state
