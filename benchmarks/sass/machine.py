"""Runs the control flow of sampled blocks' warps and counts what they issue.

All warps run side by side, each from basic block to basic block; every time those that are furthest behind
take the next one. A warp that diverges goes on in parts, which join at BSYNC as on the device. A barrier of a
block needs no waiting, as what passes through shared memory is unknown anyway.

Branches on data, which is unknown: those around a subroutine's slow path (of divisions and square roots)
avoid it. Others that go forward are not taken, as if some lane of every warp needed what they skip; `assumed`
counts them. One that goes back is an error.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np

from benchmarks.sass import registers as analysis
from benchmarks.sass.code import Instruction, Kernel, SassError
from benchmarks.sass.lanes import Size, Vector, bits
from benchmarks.sass.steps import Step, Steps

DONE = 1 << 30
SLOW = re.compile(r"slowpath|mediumpath|_full")


class Part(NamedTuple):
    """Some of a warp's lanes, at a block; waiting for all of `barrier` there, or free to run."""

    block: int
    lanes: Vector
    # its name, and all lanes that are to come
    barrier: tuple[str, int] | None


class Machine(Steps):
    """Warps of the blocks `block_ids`, [blocks][x, y, z], of one launch.

    Attributes after `run`:
        issued: of each instruction how often a warp issued it; active: by how many lanes, all times together.
        assumed: offset of a branch on data -> how often a warp met it.
    """

    def __init__(self, kernel: Kernel, grid: Size, size: Size, params: bytes, block_ids: list[Size]) -> None:
        super().__init__(kernel, grid, size, params, block_ids)
        self.exited = ~self.mask
        self.at = np.zeros(self.warps, np.int64)
        self.parts: list[list[Part]] = [[] for _ in range(self.warps)]
        self.barriers: dict[str, Vector] = {}
        self.issued, self.active = np.zeros(0), np.zeros(0)
        self.assumed: dict[int, int] = {}
        self.steps: dict[int, list[Step]] = {}

    def steps_of(self, index: int) -> list[Step]:
        """What is done for an instruction, nothing where counting suffices."""
        one = self.kernel.instructions[index]
        base = one.base
        if base in ("BSSY", "BREAK"):
            return [self.barrier_step(one)]
        steps: list[Step] = []
        if base in analysis.SHARED or base in analysis.GLOBAL:
            steps += self.access_steps(index, one)
        if self.chosen[index]:
            steps.append(self.value_step(one))
        return steps

    def barrier(self, one: Instruction) -> Vector:
        """For each lane those it will wait for: sibling parts of a warp may use one barrier at a time."""
        return self.barriers.setdefault(one.operands[0].text, np.zeros((self.warps, 32), np.uint64))

    def barrier_step(self, one: Instruction) -> Step:
        """Of BSSY, and of BREAK: the lanes will not come."""
        name, barrier = one.operands[0].text, self.barrier(one)
        guarded = self.guarded(one, False)

        def set_barrier() -> None:
            lanes, _, doubt = guarded()
            if doubt is not None and (doubt & self.lanes).any():
                raise self.fail(one, "depends on data")
            active = lanes.reshape(-1, 32)
            together = np.repeat(bits(active)[:, None], 32, 1)
            if one.base == "BSSY":
                np.copyto(barrier, together, where=active)
                return
            np.bitwise_and(barrier, ~together, out=barrier)
            for warp in np.nonzero(active.any(1))[0]:
                left = ~int(together[warp, 0])
                self.parts[warp] = [
                    part._replace(barrier=(name, part.barrier[1] & left))
                    if part.barrier and part.barrier[0] == name
                    else part
                    for part in self.parts[warp]
                ]

        return set_barrier

    def free(self, warp: int) -> None:
        """The warp's next part runs: those complete at a barrier as one, else any that waits for none."""
        parts = self.parts[warp]
        for part in parts:
            if part.barrier is None:
                continue
            same = [other for other in parts if (other.block, other.barrier) == (part.block, part.barrier)]
            lanes = np.any([other.lanes for other in same], 0)
            if int(bits(lanes)) == part.barrier[1] & ~int(bits(self.exited[warp])):
                self.parts[warp] = [other for other in parts if all(other is not each for each in same)]
                self.parts[warp].append(Part(part.block, lanes, None))
                return self.free(warp)
        for i, part in enumerate(parts):
            if part.barrier is None:
                del parts[i]
                self.at[warp], self.mask[warp] = part.block, part.lanes
                return None
        if parts:
            raise SassError(f"{self.name}: a warp's parts wait for each other")
        self.at[warp] = DONE
        self.mask[warp] = False
        return None

    def go(self, targets: Vector) -> None:
        """Every running lane to its own block; negative: it exits."""
        lanes = self.lanes.reshape(-1, 32)
        low = np.where(lanes, targets, DONE).min(1)
        high = np.where(lanes, targets, -1).max(1)
        low = np.where(lanes & (targets < 0), -1, low[:, None]).min(1)
        together = self.running & (low == high) & (low >= 0)
        self.at[together] = low[together]
        for warp in np.nonzero(self.running & ~together)[0]:
            mine = lanes[warp].copy()
            for target in np.unique(targets[warp][mine]):
                part = mine & (targets[warp] == target)
                if target < 0:
                    self.exited[warp] |= part
                else:
                    self.parts[warp].append(Part(int(target), part, None))
            self.free(int(warp))

    def wait(self, name: str, needed: Vector, following: int) -> None:
        """Until all of `needed`, the lanes of each warp, are here or have exited."""
        here = bits(self.mask)
        complete = self.running & (here == (needed & ~bits(self.exited)))
        self.at[complete] = following
        for warp in np.nonzero(self.running & ~complete)[0]:
            self.parts[warp].append(Part(following, self.mask[warp].copy(), (name, int(needed[warp]))))
            self.free(int(warp))

    def condition(self, one: Instruction, block: int) -> Vector:
        """Lanes for which a branch is taken."""
        taken = self.true
        for operand in [one.guard, *[each for each in one.operands if each.kind == "predicate"]]:
            if operand is None:
                continue
            value, unknown = self.reader(one, operand, False, False)()
            if unknown is not None and (unknown & self.lanes & taken).any():
                if one.base != "BRA":
                    raise self.fail(one, "depends on data")
                value = np.where(unknown, self.take_data_branch(one, block), value)
            taken = taken & value
        return taken

    def take_data_branch(self, one: Instruction, block: int) -> bool:
        """Away from a slow path, else on to the next instruction."""
        target = self.kernel.block_at[one.targets[0]]
        slow = [self.leads_to_slow_path(side) for side in (block + 1, target)]
        if slow[0] != slow[1]:
            return slow[0]
        if one.targets[0] <= one.offset:
            raise self.fail(one, "depends on data")
        self.assumed[one.offset] = self.assumed.get(one.offset, 0) + int(self.running.sum())
        return False

    def leads_to_slow_path(self, block: int) -> bool:
        for _ in range(4):
            end = self.kernel.instructions[self.kernel.blocks[block][1] - 1]
            if end.base == "CALL":
                return bool(SLOW.search(self.kernel.subroutines.get(end.targets[0], "")))
            if end.base in ("BRA", "EXIT", "RET", "BRX", "BSYNC"):
                return False
            block += 1
        return False

    def finish(self, block: int) -> None:
        """Where the running warps go after a block."""
        one = self.kernel.instructions[self.kernel.blocks[block][1] - 1]
        base, after = one.base, block + 1
        if base == "BRA" and "DIV" in one.mods:
            partly = (self.mask | self.exited).all(1)
            targets = np.where(partly, after, self.kernel.block_at[one.targets[0]])
            self.go(np.repeat(targets[:, None], 32, 1))
        elif base in ("BRA", "CALL", "EXIT"):
            taken = self.condition(one, block).reshape(-1, 32)
            target = -1 if base == "EXIT" else self.kernel.block_at[one.targets[0]]
            self.go(np.where(taken, target, after))
        elif base in ("RET", "BRX"):
            self.go(self.indirect(one))
        elif base == "BSYNC":
            first_lane = self.mask.argmax(1)
            needed = self.barrier(one)[np.arange(self.warps), first_lane]
            self.wait(one.operands[0].text, needed, after)
        elif base == "WARPSYNC":
            if "ALL" not in one.mods:
                raise self.fail(one, "is not interpreted")
            self.wait("", np.full(self.warps, 0xFFFFFFFF, np.uint64), after)
        else:
            self.at[self.running] = after

    def indirect(self, one: Instruction) -> Vector:
        register = one.operands[0].register
        if register is None or one.guard is not None:
            raise self.fail(one, "is not interpreted")
        value, unknown = self.values[register], self.unknown[register]
        if unknown is not None and (unknown & self.lanes).any():
            raise self.fail(one, "depends on data")
        place = value.astype(np.int64)
        if one.base == "BRX":
            place = place + int(one.operands[1].value) + one.offset + 16
        targets = np.zeros(len(place), np.int64)
        for offset in np.unique(place[self.lanes]):
            if int(offset) not in self.kernel.block_at:
                raise self.fail(one, f"no block begins at {int(offset):#x}")
            targets[place == offset] = self.kernel.block_at[int(offset)]
        return targets.reshape(-1, 32)

    def run(self, most: int = 1_000_000) -> None:
        """Raises SassError for what it does not know, and after `most` basic blocks."""
        lengths = [last - first for first, last in self.kernel.blocks]
        issued, active = np.zeros(len(lengths), np.int64), np.zeros(len(lengths), np.int64)
        with np.errstate(all="ignore"):
            for _ in range(most):
                block = int(self.at.min())
                if block == DONE:
                    self.issued, self.active = np.repeat(issued, lengths), np.repeat(active, lengths)
                    return
                self.running = self.at == block
                lanes = self.mask & self.running[:, None]
                self.lanes, self.all_lanes = lanes.ravel(), bool(lanes.all())
                issued[block] += self.running.sum()
                active[block] += lanes.sum()
                if block not in self.steps:
                    every = range(*self.kernel.blocks[block])
                    self.steps[block] = [step for i in every for step in self.steps_of(i)]
                for step in self.steps[block]:
                    step()
                self.finish(block)
        raise SassError(f"{self.name}: more than {most} basic blocks")
