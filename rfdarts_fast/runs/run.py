"""The course of a run: epochs of steps, checkpoints between them, and leaving when asked to."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import math
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from rfdarts_fast.data import Batches, DataSource, StoredSet, load
from rfdarts_fast.data.fingerprint import of_tensor
from rfdarts_fast.ops import use_backend
from rfdarts_fast.runs import schema
from rfdarts_fast.runs.checkpoint import restoring, rng_state, set_rng_state
from rfdarts_fast.runs.config import ConfigError, RunConfig
from rfdarts_fast.runs.files import WriteError, write_text
from rfdarts_fast.runs.follower import FollowerFolder
from rfdarts_fast.runs.graph import CaptureError
from rfdarts_fast.runs.meters import Meter
from rfdarts_fast.runs.micro_batches import micro_batch_count
from rfdarts_fast.runs.progress import EventWriter, Progress
from rfdarts_fast.runs.run_folder import LAST, RunFolder
from rfdarts_fast.runs.signals import Stopped, StopRequest
from rfdarts_fast.runs.watch import Watch
from rfdarts_fast.runs.world import ALONE, OtherFailed, PeerLost, World

Network = TypeVar("Network", bound=nn.Module)


def choose_device(name: str, world: World = ALONE) -> torch.device:
    """The device that `--device` names, in this process of several; ConfigError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    name = world.gpu(name)
    try:
        device = torch.device(name)
        # the meta device, for one, holds no values
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"device: {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def on_device(device: torch.device) -> AbstractContextManager[None]:
    """While it is entered, a CUDA device is the current one: memory is pinned and graphs are captured for
    this, and nothing is made on the first device meanwhile."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def load_data(config: RunConfig) -> DataSource:
    source = load(
        config.dataset,
        root=config.data_root,
        image_size=config.image_size,
        download=config.download,
        corrupt=config.corrupt,
    )
    if isinstance(source.train, StoredSet):
        source = dataclasses.replace(source, train=source.train.placed(config.cache_on))
    return source


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and PyTorch on all devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def place(network: Network, config: RunConfig, device: torch.device) -> Network:
    """The network on its device, its convolutions in the config's memory format."""
    channels_last = config.memory_format == "channels_last"
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return network.to(device).to(memory_format=layout)  # type: ignore[call-overload]


def batch_sizes(batch_size: int, set_sizes: Sequence[int]) -> set[int]:
    """The sizes of all batches of an epoch over sets of these sizes."""
    return {n for size in set_sizes for n in (min(batch_size, size), size % batch_size) if n}


def check_shares(
    batch_size: int, set_sizes: Sequence[int], processes: int, grad_accum_steps: int = 1
) -> None:
    """ConfigError unless each process has an image of every batch of sets of these sizes, and one for each
    micro-batch of a whole batch."""
    most = batch_size // processes
    if grad_accum_steps > max(most, 1):
        of_each = "" if processes == 1 else f" of each of {processes} processes"
        raise ConfigError(
            f"grad_accum_steps: expected at most {max(most, 1)}, the images{of_each} in a step of "
            f"{batch_size}, got {grad_accum_steps}"
        )
    smallest = min(batch_sizes(batch_size, set_sizes))
    if smallest < processes:
        raise ConfigError(
            f"batch_size: expected an image for each of {processes} processes in every step, but "
            f"{batch_size} leaves a batch of {smallest} of {' and '.join(map(str, set_sizes))} images"
        )


@torch.no_grad()
def check_network(
    build: Callable[[], nn.Module],
    batch_size: int,
    set_sizes: Sequence[int],
    image_size: int,
    device: torch.device,
    processes: int = 1,
    grad_accum_steps: int = 1,
) -> None:
    """ConfigError unless the network can train on sets of these sizes, tried on a copy, on the CPU;
    BackendError if a backend was asked for by name that cannot run on the device.

    Batches are shared out among the processes, and each part computed in micro-batches.
    """
    one_image = any(
        n // processes // micro_batch_count(n, batch_size, grad_accum_steps, processes) <= 1
        for n in batch_sizes(batch_size, set_sizes)
    )
    with use_backend("reference"):
        try:
            network = build()
        except ValueError as error:
            raise ConfigError(str(error)) from None
        try:
            network(torch.zeros(2, 3, image_size, image_size))
        except (ValueError, RuntimeError) as error:
            raise ConfigError(
                f"image_size: expected a size that fits the network's reductions, got {image_size}: "
                f"{str(error).splitlines()[0]}"
            ) from None
        try:
            if one_image:
                network(torch.zeros(1, 3, image_size, image_size))
        except ValueError:
            raise ConfigError(
                "batch_size: expected no batch of 1 in an epoch, too few pixels for BatchNorm, but "
                f"{batch_size} leaves one of {' and '.join(map(str, set_sizes))} images"
            ) from None
    if use_backend.name not in ("auto", "reference"):
        build().to(device)(torch.zeros(2, 3, image_size, image_size, device=device))


@torch.no_grad()
def evaluate(network: nn.Module, batches: Batches, world: World = ALONE) -> dict[str, float | None]:
    """Loss and accuracies over one pass in evaluation mode, of all processes' parts; the mode is put back."""
    training = network.training
    network.eval()
    meter = Meter(batches.device)
    for images, labels in batches.epoch(0):
        output = network(images)
        logits: Tensor = output[0] if isinstance(output, tuple) else output
        meter.add(F.cross_entropy(logits, labels), logits, labels)
    network.train(training)
    world.sum_(meter.sums)
    return meter.result()


class RunFailed(RuntimeError):
    """A run cannot go on; the message names the last good state, from which the same command resumes."""


class Diverged(RunFailed):
    """The training loss, or what is trained, is no longer finite."""


class Disagreement(RunFailed):
    """The processes of a run have come to different states."""


def in_one_line(error: BaseException) -> str:
    """The first line of an error's text, or the name of its class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def out_of_memory(error: BaseException) -> bool:
    """True for an error that means that memory is lacking, on the host or on a GPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


class Run(ABC):
    """A run over `epochs` of steps. Subclasses define a step, the end of an epoch and the state.

    Attributes:
        results: names of the files that a finished run leaves.
        epoch, step: position; all epochs before `epoch` and `step` steps of it are done.
    """

    results: tuple[str, ...] = ()

    def __init__(
        self,
        folder: RunFolder | FollowerFolder,
        config: RunConfig,
        batches: Batches,
        epochs: int,
        label: str,
        world: World,
    ) -> None:
        self.folder: Any = folder
        self.world = world
        minutes = config.time_limit_minutes
        world.stop = StopRequest(None if minutes is None else 60 * minutes)
        self.batches = batches
        self.epochs = epochs
        self.label = label
        self.epoch = 0
        self.step = 0
        self.meter = Meter(batches.device)
        # time spent in the steps of this epoch, without validation and checkpoints
        self.seconds = 0.0
        self._checkpoint_seconds = 60 * config.checkpoint_minutes
        self._seed = config.seed
        self._grad_accum_steps = config.grad_accum_steps
        # of a subclass that sets it
        self.watch: Watch | None = None
        # the position from which it counts
        self._begun = 0
        self._events = EventWriter(folder.path, config.tensorboard and world.leads)

    def micro_batches_of(self, batches: Batches) -> int:
        """The number of micro-batches in which the part that came last is computed."""
        return micro_batch_count(batches.whole, batches.batch_size, self._grad_accum_steps, self.world.size)

    @abstractmethod
    def train_step(self, images: Tensor, labels: Tensor) -> None:
        """One step at the current position."""

    @abstractmethod
    def finish_epoch(self) -> dict[str, Any]:
        """Called after the last step of an epoch; returns its record in metrics.jsonl."""

    @abstractmethod
    def agreed(self) -> list[Tensor]:
        """The tensors that have to be the same in all processes at the end of an epoch."""

    @abstractmethod
    def parts(self) -> dict[str, nn.Module | Optimizer]:
        """The networks and optimisers that a checkpoint keeps."""

    @abstractmethod
    def values(self) -> dict[str, Any]:
        """The subclass's other values in a checkpoint; plain ones and tensors."""

    @abstractmethod
    def load_values(self, state: dict[str, Any]) -> None:
        """Puts `values()` back; `parts()` are loaded before."""

    @abstractmethod
    def summary(self, record: dict[str, Any]) -> str:
        """A line of text for the end of an epoch."""

    def _plain_state(self) -> dict[str, Any]:
        return {
            **self.values(),
            "epoch": self.epoch,
            "step": self.step,
            "meter": self.meter.sums,
            "seconds": self.seconds,
            "rng": rng_state(),
        }

    def misfit(self, state: dict[str, Any]) -> str | None:
        """The first part of a checkpoint that is not of this run's kind; None if all fits."""
        ranges = {"epoch": (0, self.epochs), "step": (0, len(self.batches))}
        return schema.misfit(state, {**self.parts(), **self._plain_state()}) or schema.range_misfit(
            state, ranges
        )

    def save(self, name: str = LAST) -> None:
        """Writes a checkpoint; Diverged instead of a state that is not finite, and the good ones stay."""
        if not self.world.leads:
            return
        state = {**{name: part.state_dict() for name, part in self.parts().items()}, **self._plain_state()}
        diverged = schema.not_finite(state)
        if diverged:
            raise self._diverged(f"{diverged}: became NaN or infinite")
        self.folder.save(state, name)

    def resume(self) -> None:
        """Goes back to the folder's last good checkpoint, if there is one; all processes to the same."""
        with self.world.agreeing():
            state = self.folder.load(self.misfit)
        state = self.world.from_leader(state)
        if state is not None:
            with restoring(self.folder.path / LAST):
                self.epoch, self.step, self.seconds = state["epoch"], state["step"], state["seconds"]
                self.meter.sums.copy_(state["meter"])
                for name, part in self.parts().items():
                    part.load_state_dict(state[name])
                self.load_values(state)
                set_rng_state(state["rng"])
        for part in self.parts().values():
            if isinstance(part, nn.Module):
                self.world.take_from_leader(part)
        with self.world.agreeing():
            self.folder.begin()

    def run(self) -> None:
        """Runs to the end.

        Raises:
            Stopped: after SIGTERM or SIGINT, with the state saved.
            RunFailed: if the disk, memory, the loss or a failed CUDA graph does not allow to go on.
        """
        steps = len(self.batches)
        self._begun = self.epoch * steps + self.step
        progress = Progress(self.epochs * steps, self._begun, self.label, self.world.leads)
        if not self.world.alone:
            progress.line(f"{self.world.size} processes share each batch of {self.batches.batch_size} images")
        if self._grad_accum_steps > 1:
            progress.line(f"the gradients of {self._grad_accum_steps} micro-batches add up to a step's")
        for note in self.folder.notes:
            progress.line(note)
        if self.epoch or self.step:
            progress.line(f"resuming at epoch {self.epoch}, step {self.step} of {steps}")
        # scanning thousands of long-lived modules again and again is slow
        gc.collect()
        gc.freeze()
        try:
            with self.world.stop:
                if self.folder.last_saved is None:
                    # records without a checkpoint are a damage from now on
                    self.save()
                while self.epoch < self.epochs:
                    self._run_epoch(progress)
            sent = [f"{count} of {size:,} bytes" for size, count in self.world.messages.items()]
            if sent:
                progress.line(f"gradient messages of each process: {', '.join(sent)}")
        except KeyboardInterrupt:
            progress.line(f"interrupted; {self._kept()}")
            raise
        except (Diverged, Disagreement):
            # all processes know it at the same step
            if self.world.leads:
                raise
            raise OtherFailed(1) from None
        except (WriteError, PeerLost) as error:
            raise RunFailed(f"{error}; {self._kept()}") from None
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            raise RunFailed(f"memory: {in_one_line(error)}; {self._kept()}") from None
        finally:
            gc.unfreeze()
            progress.close()
            self._events.close()

    def write_result(self, name: str, text: str) -> None:
        """Writes a file of results; after RunFailed the same command writes it again."""
        if not self.world.leads:
            return
        try:
            write_text(self.folder.path / name, text)
        except WriteError as error:
            raise RunFailed(f"{error}; {self._kept()}") from None

    def _kept(self) -> str:
        if not self.world.leads:
            return f"the last good state is in {self.folder.path}: the same command resumes"
        saved = self.folder.last_saved
        return f"the last good state is {saved}: the same command resumes" if saved else "nothing is lost"

    def _diverged(self, what: str, at: str | None = None) -> Diverged:
        return Diverged(
            f"{what} in {at or f'epoch {self.epoch}'}; the last good state is {self.folder.last_saved} "
            "(a smaller --learning-rate needs a new folder)"
        )

    def _run_epoch(self, progress: Progress) -> None:
        saved = before = time.monotonic()
        for images, labels in self.batches.epoch(self.epoch, self.step):
            self.world.seed_step(self._seed, self.epoch, self.step)
            try:
                self.train_step(images, labels)
            except CaptureError as error:
                self.save()
                kept = f"{self._kept()}, with --cuda-graph off"
                raise RunFailed(f"cuda-graph: {in_one_line(error)}; {kept}") from None
            self._look()
            self.step += 1
            now = time.monotonic()
            self.seconds += now - before
            progress.step()
            code = self.world.stop_code()
            if code is not None:
                self.save()
                progress.line(f"stopped and saved at epoch {self.epoch}, step {self.step}")
                raise Stopped(code)
            if now - saved > self._checkpoint_seconds:
                self.save()
                saved = time.monotonic()
            before = time.monotonic()
        if self.batches.device.type == "cuda":
            torch.cuda.synchronize(self.batches.device)
            self.seconds += time.monotonic() - before
        loss = self.meter.result()["loss"]
        if loss is not None and not math.isfinite(loss):
            raise self._diverged(f"loss: became {loss}")
        self._agree()
        record = {"epoch": self.epoch, **self.finish_epoch()}
        self.folder.metrics.append(record)
        self.meter.reset()
        self.seconds = 0.0
        self.epoch, self.step = self.epoch + 1, 0
        self.save()
        self._events.add(record)
        progress.line(self.summary(record))

    def _look(self) -> None:
        """Diverged if the watch has seen a loss or gradient that is not finite."""
        bad = None if self.watch is None else self.watch.end_step()
        if bad is not None:
            epoch, step = divmod(self._begun + bad[0], len(self.batches))
            raise self._diverged(f"{bad[1]}: became NaN or infinite", f"epoch {epoch}, step {step}")

    def _agree(self) -> None:
        """Disagreement unless all processes have come to the same state.

        Then running statistics are the leader's: as under DistributedDataParallel, those of the others count
        for nothing.
        """
        if self.world.alone:
            return
        each = "".join(of_tensor(tensor) for tensor in self.agreed())
        digests = self.world.gathered(hashlib.sha256(each.encode()).hexdigest())
        other = next((k for k, there in enumerate(digests) if there != digests[0]), None)
        if other is not None:
            raise Disagreement(
                f"process {other} has come to other weights or alphas than process 0 in epoch {self.epoch}; "
                f"{self._kept()}"
            )
        for part in self.parts().values():
            if isinstance(part, nn.Module):
                self.world.take_from_leader(part)
