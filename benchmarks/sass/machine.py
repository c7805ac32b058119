"""Runs the control flow of sampled blocks' warps and counts what they issue.

All warps run side by side as NumPy vectors of lanes, each from basic block to basic block; every time the warps that
are furthest behind take the next one. A warp that diverges goes on in parts, which join at BSYNC as on the device.
Data (what memory and floating-point instructions return) is not known. A branch on it that leads to a subroutine's
slow path is not taken; of another one `DATA_BRANCH` says what is assumed, and `assumed` which they were.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from benchmarks.sass import registers as analysis
from benchmarks.sass.code import (
    REGISTERS,
    UNIFORM,
    UNIFORM_PREDICATE,
    Instruction,
    Kernel,
    Operand,
    SassError,
)
from benchmarks.sass.integers import borrows, combine, semantics
from benchmarks.sass.memory import LINE, SECTOR, distinct, shared_wavefronts

Vector = Any
# value, and where it is unknown (None: nowhere)
Value = tuple[Vector, Vector | None]
Step = Callable[[], None]
# of a kernel's constant bank 0 on sm_90
BLOCK_SIZE, GRID_SIZE = 0x0, 0xC
DONE = 1 << 30
SLOW = re.compile(r"slowpath|mediumpath|_full")
SIZES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
Size = tuple[int, int, int]


class Part(NamedTuple):
    """Some of a warp's lanes, at a block; waiting for all of `barrier` there, or free to run."""

    block: int
    lanes: Vector
    barrier: int | None


class Machine:
    """Warps of the blocks `block_ids`, [blocks][x, y, z], of one launch.

    Attributes after `run`:
        issued: for each instruction how often a warp issued it; lanes: how many lanes were active then.
        wavefronts: for each instruction those of shared memory, or the lines of global memory.
        ideal: those of shared memory without bank conflicts; sectors: those of global memory.
        unknown_accesses: how many had addresses that are data; they count as without conflicts.
        assumed: offset of a branch on data -> how often a warp met it.
    """

    def __init__(self, kernel: Kernel, grid: Size, size: Size, params: bytes, block_ids: list[Size]) -> None:
        self.kernel, self.name = kernel, kernel.name
        threads = size[0] * size[1] * size[2]
        self.per_block = -(-threads // 32)
        self.warps = len(block_ids) * self.per_block
        count = self.warps * 32
        begin, length = kernel.parameters
        if length != len(params):
            raise SassError(f"{self.name}: has {length} bytes of parameters, recorded were {len(params)}")
        bank = bytearray(begin) + params + bytes(-len(params) % 16 + 16)
        struct.pack_into("<III", bank, BLOCK_SIZE, *size)
        struct.pack_into("<III", bank, GRID_SIZE, *grid)
        self.banks = {0: np.frombuffer(bytes(bank), np.uint8), 2: np.frombuffer(kernel.tables, np.uint8)}
        thread = np.tile(np.arange(self.per_block * 32), len(block_ids))
        ids = np.repeat(np.array(block_ids), self.per_block * 32, 0)
        self.special = {
            "SR_TID.X": thread % size[0],
            "SR_TID.Y": thread // size[0] % size[1],
            "SR_TID.Z": thread // (size[0] * size[1]),
            "SR_CTAID.X": ids[:, 0],
            "SR_CTAID.Y": ids[:, 1],
            "SR_CTAID.Z": ids[:, 2],
            "SR_LANEID": thread % 32,
            "SR_CgaCtaId": np.zeros(count),
            "SRZ": np.zeros(count),
        }
        self.zero = np.zeros(count, np.uint32)
        self.true = np.ones(count, bool)
        flags = UNIFORM_PREDICATE - 8
        self.values: list[Vector] = [self.zero if i < flags else ~self.true for i in range(REGISTERS)]
        self.unknown: list[Vector | None] = [self.true] * REGISTERS
        self.mask = (thread < threads).reshape(self.warps, 32)
        self.exited = ~self.mask
        self.at = np.zeros(self.warps, np.int64)
        self.parts: list[list[Part]] = [[] for _ in range(self.warps)]
        self.powers = np.uint64(1) << np.arange(32, dtype=np.uint64)
        self.barriers: dict[str, Vector] = {}
        # the warps that run now and their lanes, flat
        self.running = np.ones(self.warps, bool)
        self.lanes = self.mask.ravel()
        self.all_lanes = True
        total = len(kernel.instructions)
        self.block_issued = np.zeros(len(kernel.blocks), np.int64)
        self.block_lanes = np.zeros(len(kernel.blocks), np.int64)
        self.wavefronts, self.ideal, self.sectors = np.zeros(total), np.zeros(total), np.zeros(total)
        self.unknown_accesses = np.zeros(total, np.int64)
        self.assumed: dict[int, int] = {}
        self.chosen = analysis.control_slice(kernel)
        self.steps: dict[int, list[Step]] = {}

    # Values.

    def fail(self, one: Instruction, why: str) -> SassError:
        return SassError(f"{self.name} at {one.offset:#x}: {one.text}: {why}")

    def reader(self, one: Instruction, operand: Operand, borrow: bool, pair: bool) -> Callable[[], Value]:
        """Of a source: uint32, uint64 for a pair or where it borrows, or bool."""
        kind, register, sign = operand.kind, operand.register, operand.sign
        if kind == "predicate":
            if register is None:
                fixed = ~self.true if sign else self.true
                return lambda: (fixed, None)
            if sign:
                return lambda: (~self.values[register], self.unknown[register])
            return lambda: (self.values[register], self.unknown[register])
        if kind == "integer":
            number = int(operand.value)
            plain = np.full(len(self.zero), number & 0xFFFFFFFF, np.uint32)
            if pair:
                plain = np.full(len(self.zero), number & (2**64 - 1), np.uint64)
            elif borrow:
                plain = plain.astype(np.uint64)
            return lambda: (plain, None)
        if kind == "float":
            bits = np.full(len(self.zero), np.float32(operand.value)).view(np.uint32)
            return lambda: (bits, None)
        if kind == "constant":
            plain_constant = self.constant(one, operand, 8 if pair else 4)
            base: Callable[[], Value] = plain_constant
        elif kind == "register":
            if any(suffix in operand.text for suffix in (".H0", ".H1", ".B")):
                raise self.fail(one, "a part of a register is not interpreted")
            if register is None:
                nothing = np.zeros(len(self.zero), np.uint64) if pair else self.zero
                base = lambda: (nothing, None)  # noqa: E731
            elif pair:
                base = lambda: self.pair(register)  # noqa: E731
            else:
                base = lambda: (self.values[register], self.unknown[register])  # noqa: E731
        else:
            raise self.fail(one, f"operand {operand.text} is not interpreted")
        if operand.absolute:
            raise self.fail(one, "an absolute value is not interpreted")
        if not sign and not borrow:
            return base

        def changed() -> Value:
            value, unknown = base()
            if sign == "~":
                value = ~value
            if borrow:
                value = value.astype(np.uint64)
                if sign == "-":
                    value = np.uint64(1 << 32) - value
            elif sign == "-":
                value = np.zeros_like(value) - value
            return value, unknown

        return changed

    def pair(self, register: int) -> Value:
        value = self.values[register].astype(np.uint64) | self.values[register + 1].astype(
            np.uint64
        ) << np.uint64(32)
        return value, either(self.unknown[register], self.unknown[register + 1])

    def constant(
        self, one: Instruction, operand: Operand, size: int, signed: bool = False
    ) -> Callable[[], Value]:
        bank = self.banks.get(operand.bank)
        if bank is None:
            raise self.fail(one, f"constant bank {operand.bank} is not known")
        to = np.uint64 if size == 8 else np.uint32
        offset = int(operand.value)

        def gather(places: Vector) -> Vector:
            inside = np.clip(places, 0, len(bank) - size)
            value = np.zeros(len(places), np.uint64)
            for i in range(size):
                value |= bank[inside + i].astype(np.uint64) << np.uint64(8 * i)
            if signed:
                bits = 8 * size
                value = np.where(
                    value >> np.uint64(bits - 1) & np.uint64(1), value - np.uint64(1 << bits), value
                )
            return value.astype(to)

        if not operand.parts:
            fixed = gather(np.full(len(self.zero), offset))
            return lambda: (fixed, None)

        def indexed() -> Value:
            place, unknown = self.address(operand)
            return gather(place.astype(np.uint32).view(np.int32).astype(np.int64)), unknown

        return indexed

    def address(self, operand: Operand) -> Value:
        total = np.full(
            len(self.zero), operand.value & (2**64 - 1) if operand.value < 0 else operand.value, np.uint64
        )
        unknown: Vector | None = None
        for register, wide in operand.parts:
            value, where = self.pair(register) if wide else (self.values[register], self.unknown[register])
            total = total + value.astype(np.uint64)
            unknown = either(unknown, where)
        return total, unknown

    def write(
        self, register: int, value: Vector, unknown: Vector | None, where: Vector, everywhere: bool
    ) -> None:
        if everywhere:
            self.values[register] = value
            self.unknown[register] = unknown
            return
        self.values[register] = np.where(where, value, self.values[register])
        before = self.unknown[register]
        if before is not None or unknown is not None:
            new = np.zeros(len(where), bool) if unknown is None else unknown
            old = np.zeros(len(where), bool) if before is None else before
            merged = np.where(where, new, old)
            self.unknown[register] = merged if merged.any() else None

    # Instructions.

    def guarded(self, one: Instruction, uniform: bool) -> Callable[[], tuple[Vector, bool, Vector | None]]:
        """Lanes that execute it, whether all do, and where that is not known."""
        guard = one.guard

        def base() -> tuple[Vector, bool]:
            if not uniform or self.all_lanes:
                return self.lanes, self.all_lanes
            every = bool(self.running.all())
            return (self.true if every else np.repeat(self.running, 32)), every

        if guard is None or (guard.register is None and not guard.sign):
            return lambda: (*base(), None)
        condition = self.reader(one, guard, False, False)

        def lanes() -> tuple[Vector, bool, Vector | None]:
            value, unknown = condition()
            where, _ = base()
            taken = where & (value if unknown is None else value | unknown)
            return taken, bool(taken.all()), unknown

        return lanes

    def step(self, index: int) -> Step | None:
        """What is done for an instruction, None where counting suffices."""
        one = self.kernel.instructions[index]
        base = one.base
        if base in ("BSSY", "BREAK"):
            return self.barrier_step(one)
        steps: list[Step] = []
        if base in analysis.SHARED or base in analysis.GLOBAL:
            steps.append(self.access_step(index, one))
        if self.chosen[index]:
            steps.append(self.value_step(one))
        if not steps:
            return None
        return steps[0] if len(steps) == 1 else lambda: [each() for each in steps] and None

    def destinations(self, one: Instruction) -> list[tuple[int | None, bool]]:
        found = []
        for i, operand in enumerate(analysis.results(one)):
            found.append(
                (operand.register, i == 0 and operand.kind == "register" and analysis.width(one) == 2)
            )
        return found

    def value_step(self, one: Instruction) -> Step:
        base = one.base
        if base in ("FSETP", "DSETP", "HSETP2"):
            compute = self.float_comparison(one)
        elif analysis.is_data(one):
            return self.data_step(one)
        elif base in ("S2R", "S2UR", "CS2R", "LDC", "ULDC", "R2UR", "P2R", "VOTE", "VOTEU"):
            compute = self.special_step(one)
        else:
            compute = self.arithmetic(one)
        destinations = self.destinations(one)
        uniform = any(register is not None and is_uniform(register) for register, _ in destinations)
        guarded = self.guarded(one, uniform)

        def step() -> None:
            where, everywhere, doubt = guarded()
            if not everywhere and not where.any():
                return
            results, unknown = compute()
            unknown = either(unknown, doubt)
            for (register, wide), value in zip(destinations, results, strict=False):
                if register is None:
                    continue
                if wide:
                    self.write(
                        register,
                        (value & np.uint64(0xFFFFFFFF)).astype(np.uint32),
                        unknown,
                        where,
                        everywhere,
                    )
                    self.write(
                        register + 1, (value >> np.uint64(32)).astype(np.uint32), unknown, where, everywhere
                    )
                else:
                    self.write(register, value, unknown, where, everywhere)

        return step

    def data_step(self, one: Instruction) -> Step:
        registers = analysis.written(one)
        guarded = self.guarded(one, False)

        def step() -> None:
            where, everywhere, _ = guarded()
            for register in registers:
                self.write(register, self.values[register], self.true, where, everywhere)

        return step

    def arithmetic(self, one: Instruction) -> Callable[[], tuple[list[Vector], Vector | None]]:
        compute = semantics(one.base)
        if compute is None:
            raise self.fail(one, f"{one.opcode} is not interpreted, and a branch or an address depends on it")
        first, wide, borrow = len(analysis.results(one)), analysis.pairs(one), borrows(one.base)
        readers = [
            self.reader(one, operand, i - first in borrow, i in wide)
            for i, operand in enumerate(one.operands)
            if i >= first
        ]
        logical = one.base in ("ISETP", "UISETP", "PLOP3", "UPLOP3")

        def run() -> tuple[list[Vector], Vector | None]:
            values, unknowns = [], []
            for reader in readers:
                value, unknown = reader()
                values.append(value)
                unknowns.append(unknown)
            results = compute(one, *values)
            if all(unknown is None for unknown in unknowns):
                return results, None
            if logical:
                return results, self.undecided(one, compute, values, unknowns)
            return results, either(*unknowns)

        return run

    def undecided(
        self, one: Instruction, compute: Any, values: list[Vector], unknowns: list[Vector | None]
    ) -> Vector:
        """Where the first result changes with an unknown predicate, or depends on an unknown number."""
        never = ~self.true
        if one.base.endswith("ISETP"):
            numbers = either(*unknowns[:2])
            if "EX" in one.mods:
                numbers = either(numbers, unknowns[3])
            numbers = never if numbers is None else numbers
            other, doubt = values[2], never if unknowns[2] is None else unknowns[2]
            plain = one._replace(opcode=one.opcode)
            result = compute(
                plain, values[0], values[1], self.true if "AND" in one.mods else never, *values[3:]
            )[0]
            return undecided_pair(one.mods, result, numbers, other, doubt)
        doubtful = never
        base = compute(one, *values)[0]
        for i in range(3):
            where = unknowns[i]
            if where is None:
                continue
            flipped = [np.where(where, ~value, value) if j == i else value for j, value in enumerate(values)]
            doubtful = doubtful | (compute(one, *flipped)[0] != base)
        several = sum(unknown is not None for unknown in unknowns[:3])
        if several > 1:
            doubtful = either(*unknowns)
        return doubtful

    def float_comparison(self, one: Instruction) -> Callable[[], tuple[list[Vector], Vector | None]]:
        """Unknown but where the predicate that it is combined with decides."""
        last = [operand for operand in one.operands[2:] if operand.kind == "predicate"][-1]
        other = self.reader(one, last, False, False)

        def run() -> tuple[list[Vector], Vector | None]:
            value, doubt = other()
            never = ~self.true
            unknown = undecided_pair(one.mods, never, self.true, value, never if doubt is None else doubt)
            decided = combine(one.mods, never, value)
            return [decided, decided], unknown

        return run

    def special_step(self, one: Instruction) -> Callable[[], tuple[list[Vector], Vector | None]]:
        base, operands = one.base, one.operands
        if base in ("S2R", "S2UR", "CS2R"):
            name = operands[1].text
            wide = base == "CS2R" and "32" not in one.mods
            if name not in self.special:
                return lambda: ([self.zero], self.true)
            value = self.special[name].astype(np.uint64 if wide else np.uint32)
            return lambda: ([value], None)
        if base in ("LDC", "ULDC"):
            size = next((SIZES[mod] for mod in one.mods if mod in SIZES), 4)
            load = self.constant(one, operands[1], size, any(mod in ("S8", "S16") for mod in one.mods))

            def loaded() -> tuple[list[Vector], Vector | None]:
                value, unknown = load()
                return [value], unknown

            return loaded
        if base == "R2UR":
            source = self.reader(one, operands[1], False, False)
            return lambda: self.of_first_lane(*source())
        if base in ("VOTE", "VOTEU"):
            return self.vote(one)
        mask = int(operands[3].value)
        kept = self.reader(one, operands[2], False, False)

        def packed() -> tuple[list[Vector], Vector | None]:
            value, unknown = kept()
            value = value & np.uint32(~mask & 0xFFFFFFFF)
            for i in range(7):
                if mask >> i & 1:
                    register = UNIFORM_PREDICATE - 8 + i
                    value = value | (self.values[register].astype(np.uint32) << np.uint32(i))
                    unknown = either(unknown, self.unknown[register])
            return [value], unknown

        return packed

    def vote(self, one: Instruction) -> Callable[[], tuple[list[Vector], Vector | None]]:
        """Of the running lanes: ANY or ALL in a predicate, the votes themselves in a register."""
        source = self.reader(one, one.operands[-1], False, False)
        kinds = [operand.kind for operand in analysis.results(one)]

        def voted() -> tuple[list[Vector], Vector | None]:
            value, unknown = source()
            lanes = self.lanes.reshape(-1, 32)
            for_it = value.reshape(-1, 32) & lanes
            decided = (for_it == lanes).all(1) if "ALL" in one.mods else for_it.any(1)
            found = {"predicate": decided, "register": self.bits(for_it).astype(np.uint32)}
            doubt = None if unknown is None else np.repeat((unknown & self.lanes).reshape(-1, 32).any(1), 32)
            return [np.repeat(found[kind], 32) for kind in kinds], doubt

        return voted

    def of_first_lane(self, value: Vector, unknown: Vector | None) -> tuple[list[Vector], Vector | None]:
        lanes = self.lanes.reshape(-1, 32)
        first = lanes.argmax(1)[:, None]
        pick = lambda x: np.repeat(np.take_along_axis(x.reshape(-1, 32), first, 1), 32)  # noqa: E731
        return [pick(value)], None if unknown is None else pick(unknown)

    def access_step(self, index: int, one: Instruction) -> Step:
        operand = next((operand for operand in one.operands if operand.parts), None)
        size = next((SIZES[mod] for mod in one.mods if mod in SIZES), 4)
        if one.base in ("LDSM", "STSM"):
            size = 16
        guarded = self.guarded(one, False)
        shared = one.base in analysis.SHARED

        def step() -> None:
            lanes, _, _ = guarded()
            rows = self.running & lanes.reshape(-1, 32).any(1)
            if not rows.any():
                return
            addresses, unknown = self.address(operand) if operand else (self.zero.astype(np.uint64), None)
            active = lanes.reshape(-1, 32)
            if unknown is not None:
                lost = rows & (unknown & lanes).reshape(-1, 32).any(1)
                self.unknown_accesses[index] += lost.sum()
                least = np.ceil(active[lost].sum(1) * size / LINE).sum()
                self.wavefronts[index] += least
                self.ideal[index] += least
                rows = rows & ~lost
            addresses, active = addresses.reshape(-1, 32)[rows], active[rows]
            if shared:
                took, ideal = shared_wavefronts(addresses & np.uint64(0xFFFFFFFF), active, size)
                self.wavefronts[index] += took.sum()
                self.ideal[index] += ideal.sum()
            else:
                self.wavefronts[index] += distinct(addresses, active, size, LINE).sum()
                self.sectors[index] += distinct(addresses, active, size, SECTOR).sum()

        return step

    # Control flow.

    def bits(self, lanes: Vector) -> Vector:
        return (lanes * self.powers).sum(-1, dtype=np.uint64)

    def barrier(self, one: Instruction) -> tuple[str, Vector]:
        name = one.operands[0].text
        if name not in self.barriers:
            self.barriers[name] = np.zeros((self.warps, 32), np.uint64)
        return name, self.barriers[name]

    def barrier_step(self, one: Instruction) -> Step:
        """Each lane keeps the lanes it will wait for: sibling parts of a warp may use one barrier at a time."""
        _, barrier = self.barrier(one)
        guarded = self.guarded(one, False)

        def set_barrier() -> None:
            lanes, _, doubt = guarded()
            if doubt is not None and (doubt & self.lanes).any():
                raise self.fail(one, "depends on data")
            active = lanes.reshape(-1, 32)
            together = np.repeat(self.bits(active)[:, None], 32, 1)
            if one.base == "BSSY":
                np.copyto(barrier, together, where=active)
            else:
                np.bitwise_and(barrier, ~together, out=barrier)

        return set_barrier

    def free(self, warp: int) -> None:
        """The warp's next part runs: those complete at a barrier as one, else any that waits for none."""
        parts = self.parts[warp]
        for part in [part for part in parts if part.barrier is not None]:
            same = [other for other in parts if (other.block, other.barrier) == (part.block, part.barrier)]
            lanes = np.any([other.lanes for other in same], 0)
            if int(self.bits(lanes)) == int(part.barrier or 0) & ~int(self.bits(self.exited[warp])):
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

    def go(self, one: Instruction, targets: Vector) -> None:
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
            self.free(warp)

    def wait(self, one: Instruction, needed: Vector, following: int) -> None:
        here = self.bits(self.mask)
        complete = self.running & (here == (needed & ~self.bits(self.exited)))
        self.at[complete] = following
        for warp in np.nonzero(self.running & ~complete)[0]:
            self.parts[warp].append(Part(following, self.mask[warp].copy(), int(needed[warp])))
            self.free(warp)

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
        """Away from a slow path; else past what lies between."""
        target = self.kernel.block_at[one.targets[0]]
        slow = [self.leads_to_slow_path(side) for side in (block + 1, target)]
        if slow[0] != slow[1]:
            return slow[0]
        if one.targets[0] <= one.offset:
            raise self.fail(one, "depends on data")
        self.assumed[one.offset] = self.assumed.get(one.offset, 0) + int(self.running.sum())
        return DATA_BRANCH

    def leads_to_slow_path(self, block: int) -> bool:
        for _ in range(4):
            first, last = self.kernel.blocks[block]
            end = self.kernel.instructions[last - 1]
            if end.base == "CALL":
                return bool(SLOW.search(self.kernel.subroutines.get(end.targets[0], "")))
            if end.base in ("BRA", "EXIT", "RET", "BRX", "BSYNC"):
                return False
            block += 1
        return False

    def finish(self, block: int) -> None:
        """Where the running warps go after a block."""
        first, last = self.kernel.blocks[block]
        one = self.kernel.instructions[last - 1]
        base, after = one.base, block + 1
        if base == "BRA" and "DIV" in one.mods:
            partly = (self.mask | self.exited).all(1)
            targets = np.where(partly, after, self.kernel.block_at[one.targets[0]])
            self.go(one, np.repeat(targets[:, None], 32, 1))
        elif base in ("BRA", "CALL", "EXIT"):
            taken = self.condition(one, block).reshape(-1, 32)
            target = -1 if base == "EXIT" else self.kernel.block_at[one.targets[0]]
            self.go(one, np.where(taken, target, after))
        elif base in ("RET", "BRX"):
            self.go(one, self.indirect(one))
        elif base == "BSYNC":
            _, barrier = self.barrier(one)
            first_lane = self.mask.argmax(1)
            self.wait(one, barrier[np.arange(self.warps), first_lane], after)
        elif base == "WARPSYNC":
            if "ALL" not in one.mods:
                raise self.fail(one, "is not interpreted")
            self.wait(one, np.full(self.warps, 0xFFFFFFFF, np.uint64), after)
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

    def run(self, most: int = 10_000_000) -> None:
        """Raises SassError for what it does not know, and after `most` basic blocks."""
        with np.errstate(all="ignore"):
            for _ in range(most):
                block = int(self.at.min())
                if block == DONE:
                    return
                self.running = self.at == block
                lanes = self.mask & self.running[:, None]
                self.lanes, self.all_lanes = lanes.ravel(), bool(lanes.all())
                self.block_issued[block] += self.running.sum()
                self.block_lanes[block] += lanes.sum()
                if block not in self.steps:
                    found = [self.step(i) for i in range(*self.kernel.blocks[block])]
                    self.steps[block] = [step for step in found if step]
                for step in self.steps[block]:
                    step()
                self.finish(block)
        raise SassError(f"{self.name}: more than {most} basic blocks")

    def per_instruction(self, of_blocks: Vector) -> Vector:
        return np.repeat(of_blocks, [last - first for first, last in self.kernel.blocks])


# a branch on data that leads to no slow path: True for the lanes' taking it
DATA_BRANCH = False


def either(*unknowns: Vector | None) -> Vector | None:
    found: Vector | None = None
    for unknown in unknowns:
        if unknown is not None:
            found = unknown if found is None else found | unknown
    return found


def undecided_pair(mods: list[str], a: Vector, a_unknown: Vector, b: Vector, b_unknown: Vector) -> Vector:
    """Where a AND b, a OR b, a XOR b is unknown."""
    if "AND" in mods:
        return (a_unknown & (b | b_unknown)) | (b_unknown & (a | a_unknown))
    if "OR" in mods:
        return (a_unknown & (~b | b_unknown)) | (b_unknown & (~a | a_unknown))
    return a_unknown | b_unknown


def is_uniform(register: int) -> bool:
    return UNIFORM <= register < UNIFORM_PREDICATE - 8 or register >= UNIFORM_PREDICATE
