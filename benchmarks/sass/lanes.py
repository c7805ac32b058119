"""Registers of many warps' lanes as NumPy vectors, and the operands of instructions read from them."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.sass.code import (
    PREDICATE,
    REGISTERS,
    UNIFORM,
    UNIFORM_PREDICATE,
    Instruction,
    Kernel,
    Operand,
    SassError,
)

Vector = Any
# value, and where it is unknown (None: nowhere)
Value = tuple[Vector, Vector | None]
Size = tuple[int, int, int]
POWERS = np.uint64(1) << np.arange(32, dtype=np.uint64)
# places in constant bank 0
BLOCK_SIZE, GRID_SIZE = 0x0, 0xC


def either(*unknowns: Vector | None) -> Vector | None:
    found: Vector | None = None
    for unknown in unknowns:
        if unknown is not None:
            found = unknown if found is None else found | unknown
    return found


def is_uniform(register: int) -> bool:
    return UNIFORM <= register < PREDICATE or register >= UNIFORM_PREDICATE


def bits(lanes: Vector) -> Vector:
    """bool [..., 32] as numbers."""
    return (lanes * POWERS).sum(-1, dtype=np.uint64)


class Lanes:
    """Of the blocks `block_ids`, [blocks][x, y, z], of one launch of a kernel.

    Attributes:
        values: of each register, uint32, or bool of a predicate; unknown: where it is not known.
        running: the warps that execute now; lanes: their active lanes, flat; all_lanes: whether that is all.
        mask: the lanes of each warp that are at its place now.
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
        self.values: list[Vector] = [self.zero if i < PREDICATE else ~self.true for i in range(REGISTERS)]
        self.unknown: list[Vector | None] = [self.true] * REGISTERS
        self.mask = (thread < threads).reshape(self.warps, 32)
        self.running = np.ones(self.warps, bool)
        self.lanes = self.mask.ravel()
        self.all_lanes = True

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
        total = np.full(len(self.zero), int(operand.value) & (2**64 - 1), np.uint64)
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
