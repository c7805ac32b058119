"""The processes of a run: one, or those that torchrun started.

Each process computes the gradient of its part of a batch (`Batches`, `shard`), weighed by its share, so that
the sum over the processes is the gradient of the whole batch. One message carries all of it, with the step's
sums of losses and hits, and requests to stop: all processes leave after the same step.
"""

from __future__ import annotations

import io
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rfdarts_fast.data.seeding import Purpose, torch_generator
from rfdarts_fast.messages import reason
from rfdarts_fast.runs.config import ConfigError
from rfdarts_fast.runs.signals import CODES, StopRequest

Value = TypeVar("Value")

# messages that a GPU may lag behind before its requests to stop are waited for
_GPU_LAG = 8
_TIMEOUT = timedelta(minutes=30)


class PeerLost(RuntimeError):
    """Another process of the run is gone, or cannot be reached."""


class OtherFailed(SystemExit):
    """All fail where one does, and another process says why; this one leaves without a word."""

    def __init__(self, code: int = 2) -> None:
        super().__init__(code)


class World:
    """The processes that share a run; the default is one process alone, which sends nothing.

    Attributes:
        rank: this process, from 0 on. Process 0 `leads`: it alone reads and writes the run's folder.
        size: number of processes.
        local_rank: number of this process on its machine.
        stop: the requests to stop that this process knows of.
        messages: bytes of a gradient message -> number of those sent so far.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0) -> None:
        self.rank = rank
        self.size = size
        self.local_rank = local_rank
        self.stop = StopRequest()
        self.messages: Counter[int] = Counter()
        self._flags: Tensor | None = None
        self._flags_of_steps: deque[Tensor] = deque()

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.size == 1

    @property
    def shard(self) -> tuple[int, int]:
        """The part of each batch that is this process's, as `Batches` takes it."""
        return self.rank, self.size

    def gpu(self, name: str) -> str:
        """The device that a name means in this process: the GPU of its number, which is made the current one.

        Other devices, and all of a process alone, are what they are called. Raises ConfigError if there are
        fewer GPUs than processes on this machine.
        """
        if self.alone or not name.startswith("cuda") or not torch.cuda.is_available():
            return name
        if name != "cuda":
            raise ConfigError(f"device: expected cpu, cuda or auto with several processes, got {name!r}")
        if self.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"device: expected a GPU for each process of a machine, got {torch.cuda.device_count()} and "
                f"process {self.local_rank}"
            )
        torch.cuda.set_device(self.local_rank)
        return f"cuda:{self.local_rank}"

    def seed_step(self, seed: int, epoch: int, step: int) -> None:
        """Seeds what a step draws besides its data, such as drop path: of its own in each process.

        It depends on the position alone, so that no checkpoint has to keep it. One process alone draws on.
        """
        if not self.alone:
            generator = torch_generator(seed, Purpose.STEP, epoch, step, self.rank, self.size)
            torch.manual_seed(generator.initial_seed())

    def sum_step(self, grads: Sequence[Tensor], sums: Tensor) -> tuple[list[Tensor], Tensor]:
        """The sums over all processes of the gradients of one step and of `sums`, [k], in one message.

        Raises PeerLost.
        """
        if self.alone:
            return list(grads), sums
        flags = grads[0].new_zeros(len(CODES))
        code = self.stop.code
        if code is not None:
            # a list would be copied to a GPU, which waits for it; this happens once
            flags[CODES.index(code)] = 1
        flat = torch.cat([*(grad.reshape(-1) for grad in grads), sums.to(flags.dtype), flags])
        self.sum_(flat)
        self.messages[flat.numel() * flat.element_size()] += 1
        *parts, sums_of_all, self._flags = flat.split([g.numel() for g in grads] + [len(sums), len(flags)])
        return [part.view_as(grad) for part, grad in zip(parts, grads, strict=True)], sums_of_all.to(sums)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Makes a tensor, which is contiguous, its sum over all processes. Raises PeerLost."""
        if not self.alone:
            with _reaching_others():
                dist.all_reduce(tensor)
        return tensor

    def stop_code(self) -> int | None:
        """The exit code of a stop that some process was asked for, the same in all after the same step.

        A GPU is not waited for: the request counts some steps later.
        """
        if self.alone or self._flags is None:
            return self.stop.code
        self._flags_of_steps.append(self._flags)
        if len(self._flags_of_steps) <= (_GPU_LAG if self._flags.is_cuda else 0):
            return None
        flags = self._flags_of_steps.popleft().tolist()
        return next((code for code, flag in zip(CODES, flags, strict=True) if flag), None)

    def gathered(self, value: Value) -> list[Value]:
        """The plain values of all processes, by rank. Raises PeerLost."""
        if self.alone:
            return [value]
        values: list[Any] = [None] * self.size
        with _reaching_others():
            dist.all_gather_object(values, value)
        return values

    def from_leader(self, value: Value) -> Value:
        """The plain value that process 0 has, tensors included. Raises PeerLost."""
        if self.alone:
            return value
        # torch's own form, in which tensors that share memory are sent once
        sent = io.BytesIO()
        torch.save(value if self.leads else None, sent)
        values = [sent.getvalue()]
        with _reaching_others():
            dist.broadcast_object_list(values)
        return torch.load(io.BytesIO(values[0]), map_location="cpu", weights_only=True)

    @torch.no_grad()
    def take_from_leader(self, network: nn.Module) -> None:
        """Makes all parameters and buffers those of process 0, a message for each dtype. Raises PeerLost."""
        if self.alone:
            return
        tensors = list(network.state_dict().values())
        for dtype in sorted({x.dtype for x in tensors}, key=str):
            chosen = [x for x in tensors if x.dtype == dtype]
            flat = torch.cat([x.reshape(-1) for x in chosen])
            with _reaching_others():
                dist.broadcast(flat, 0)
            for x, part in zip(chosen, flat.split([x.numel() for x in chosen]), strict=True):
                x.copy_(part.view(x.shape))

    def refuse_different(self, value: Value, name: str, difference: Callable[[Value, Value], str]) -> None:
        """ConfigError, in process 0 alone, unless all processes have the same plain value; PeerLost.

        Args:
            name: what the message begins with.
            difference: tells in words how process 0's value and another one differ.
        """
        values = self.gathered(value)
        other = next((k for k, there in enumerate(values) if there != values[0]), None)
        if other is None:
            return
        if not self.leads:
            raise OtherFailed
        differs = difference(values[0], values[other])
        raise ConfigError(f"{name}: expected the same in all processes, but in process {other} {differs}")

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """An error inside in one process ends all. Nothing inside may wait for the others.

        The first process that fails raises its error, the others OtherFailed.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            error = raised
        failed = self.gathered(error is not None)
        if error is not None and failed.index(True) == self.rank:
            raise error
        if any(failed):
            raise OtherFailed


ALONE = World()
"""A process without others, as of a run that torchrun did not start."""


@contextmanager
def launched() -> Iterator[World]:
    """The world of this process: that of torchrun's environment (RANK, WORLD_SIZE, ...), or itself alone.

    gloo carries what is on the CPU, nccl what is on GPUs. A process group that is there already is taken.
    Raises ConfigError if the others cannot be joined.
    """
    if dist.is_available() and dist.is_initialized():
        yield World(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", 0)))
        return
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or "RANK" not in os.environ:
        yield World()
        return
    on_gpu = torch.cuda.is_available() and dist.is_nccl_available()
    try:
        store, rank, size = next(iter(dist.rendezvous("env://", timeout=_TIMEOUT)))
        # torchrun's store outlives the processes that it starts anew: addresses of dead ones are still there
        store = dist.PrefixStore(f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)} of {size}", store)
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"torchrun: the processes cannot be joined: {reason(error)}") from None
    try:
        yield World(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", 0)))
    finally:
        dist.destroy_process_group()


@contextmanager
def _reaching_others() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise PeerLost(f"another process of the run is gone: {reason(error)}") from None
