"""What one instruction does to the registers, and to the counts of memory accesses.

What memory and floating-point instructions return is unknown, and what depends on it; a predicate is known
where the known one that it is combined with decides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.sass import registers as analysis
from benchmarks.sass.code import PREDICATE, Instruction, Kernel, Operand, SassError
from benchmarks.sass.integers import borrows, combine, compare, semantics
from benchmarks.sass.lanes import Lanes, Size, Vector, bits, either, is_uniform
from benchmarks.sass.memory import LINE, SECTOR, distinct, shared_wavefronts

Step = Callable[[], None]
# results, and where they are unknown
Results = tuple[list[Vector], Vector | None]
SIZES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


def clears_a_flag(one: Instruction) -> bool:
    """LOP3 R, R, mask of all bits but one: a register of flags, one for each thing a kernel must remember."""
    if one.base != "LOP3" or len(one.operands) < 5 or one.operands[0].kind != "register":
        return False
    to, source, mask, _, table = one.operands[:5]
    one_bit = ~int(mask.value) & 0xFFFFFFFF if mask.kind == "integer" else 0
    return to.register == source.register is not None and table.value == 0xC0 and one_bit.bit_count() == 1


def undecided_pair(mods: list[str], a: Vector, a_unknown: Vector, b: Vector, b_unknown: Vector) -> Vector:
    """Where a AND b, a OR b, a XOR b is unknown."""
    if "AND" in mods:
        return (a_unknown & (b | b_unknown)) | (b_unknown & (a | a_unknown))
    if "OR" in mods:
        return (a_unknown & (~b | b_unknown)) | (b_unknown & (~a | a_unknown))
    return a_unknown | b_unknown


class Steps(Lanes):
    """The steps of instructions, made once each.

    Attributes:
        chosen: of each instruction whether a branch or an address depends on it.
        wavefronts: of each instruction those of shared memory, or the lines of global memory.
        ideal: those of shared memory without bank conflicts; sectors: those of global memory.
        unknown_accesses: how many had addresses that are data; they count as without conflicts.
    """

    def __init__(self, kernel: Kernel, grid: Size, size: Size, params: bytes, block_ids: list[Size]) -> None:
        super().__init__(kernel, grid, size, params, block_ids)
        total = len(kernel.instructions)
        self.wavefronts, self.ideal, self.sectors = np.zeros(total), np.zeros(total), np.zeros(total)
        self.unknown_accesses = np.zeros(total, np.int64)
        self.chosen = analysis.control_slice(kernel)

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
        elif base in ("S2R", "S2UR", "CS2R", "LDC", "ULDC", "R2UR", "P2R", "VOTE", "VOTEU", "B2R"):
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

    def arithmetic(self, one: Instruction) -> Callable[[], Results]:
        compute = semantics(one.base)
        if compute is None:
            raise self.fail(one, f"{one.opcode} is not interpreted, and a branch or an address depends on it")
        first, wide, borrow = len(analysis.results(one)), analysis.pairs(one), borrows(one.base)
        readers = [
            self.reader(one, operand, i - first in borrow, i in wide)
            for i, operand in enumerate(one.operands)
            if i >= first
        ]
        logical, flag = one.base in ("ISETP", "UISETP", "PLOP3", "UPLOP3"), clears_a_flag(one)

        def run() -> Results:
            values, unknowns = [], []
            for reader in readers:
                value, unknown = reader()
                values.append(value)
                unknowns.append(unknown)
            try:
                results = compute(one, *values)
            except SassError as error:
                raise self.fail(one, str(error)) from None
            if all(unknown is None for unknown in unknowns):
                return results, None
            if flag:
                # its other flags are set before they are read
                return compute(one, np.where(unknowns[0], self.zero, values[0]), *values[1:]), None
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
            return undecided_pair(one.mods, compare(one, *values), numbers, other, doubt)
        doubtful: Vector = never
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

    def float_comparison(self, one: Instruction) -> Callable[[], Results]:
        """Unknown but where the predicate that it is combined with decides."""
        last = [operand for operand in one.operands[2:] if operand.kind == "predicate"][-1]
        other = self.reader(one, last, False, False)

        def run() -> Results:
            value, doubt = other()
            never = ~self.true
            unknown = undecided_pair(one.mods, never, self.true, value, never if doubt is None else doubt)
            decided = combine(one.mods, never, value)
            return [decided, decided], unknown

        return run

    def special_step(self, one: Instruction) -> Callable[[], Results]:
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

            def loaded() -> Results:
                value, unknown = load()
                return [value], unknown

            return loaded
        if base == "B2R":
            # what a block looks for together is the exception: taken as not there
            kinds = [operand.kind for operand in analysis.results(one)]
            return lambda: ([self.zero != 0 if kind == "predicate" else self.zero for kind in kinds], None)
        if base == "R2UR":
            source = self.reader(one, operands[1], False, False)
            return lambda: self.of_first_lane(*source())
        if base in ("VOTE", "VOTEU"):
            return self.vote(one)
        mask = int(operands[3].value)
        kept = self.reader(one, operands[2], False, False)

        def packed() -> Results:
            value, unknown = kept()
            value = value & np.uint32(~mask & 0xFFFFFFFF)
            for i in range(7):
                if mask >> i & 1:
                    register = PREDICATE + i
                    value = value | (self.values[register].astype(np.uint32) << np.uint32(i))
                    unknown = either(unknown, self.unknown[register])
            return [value], unknown

        return packed

    def vote(self, one: Instruction) -> Callable[[], Results]:
        """Of the running lanes: ANY or ALL in a predicate, the votes themselves in a register."""
        source = self.reader(one, one.operands[-1], False, False)
        kinds = [operand.kind for operand in analysis.results(one)]

        def voted() -> Results:
            value, unknown = source()
            lanes = self.lanes.reshape(-1, 32)
            for_it = value.reshape(-1, 32) & lanes
            decided = (for_it == lanes).all(1) if "ALL" in one.mods else for_it.any(1)
            found = {"predicate": decided, "register": bits(for_it).astype(np.uint32)}
            doubt = None if unknown is None else np.repeat((unknown & self.lanes).reshape(-1, 32).any(1), 32)
            return [np.repeat(found[kind], 32) for kind in kinds], doubt

        return voted

    def of_first_lane(self, value: Vector, unknown: Vector | None) -> Results:
        lanes = self.lanes.reshape(-1, 32)
        first = lanes.argmax(1)[:, None]
        pick = lambda x: np.repeat(np.take_along_axis(x.reshape(-1, 32), first, 1), 32)  # noqa: E731
        return [pick(value)], None if unknown is None else pick(unknown)

    def access_steps(self, index: int, one: Instruction) -> list[Step]:
        """One, or two of what copies from global to shared memory."""
        places = [operand for operand in one.operands if operand.kind == "memory"]
        if one.base == "LDGSTS":
            to, source = places
            return [self.access_step(index, one, to, True), self.access_step(index, one, source, False)]
        return [self.access_step(index, one, places[0], one.base in analysis.SHARED)]

    def access_step(self, index: int, one: Instruction, operand: Operand, shared: bool) -> Step:
        size = next((SIZES[mod] for mod in one.mods if mod in SIZES), 4)
        taking_part = np.ones((1, 32), bool)
        if one.base in ("LDSM", "STSM"):
            # rows of 16 bytes, eight lanes' addresses a matrix
            size, matrices = 16, next((int(mod) for mod in one.mods if mod in ("2", "4")), 1)
            taking_part = (np.arange(32) < 8 * matrices)[None]
        guarded = self.guarded(one, False)

        def step() -> None:
            lanes, _, _ = guarded()
            rows = self.running & lanes.reshape(-1, 32).any(1)
            if not rows.any():
                return
            addresses, unknown = self.address(operand)
            active = lanes.reshape(-1, 32) & taking_part
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
