"""What the integer instructions of sm_90 compute, on NumPy vectors of lanes.

A function here takes the instruction and its sources, uint32 for registers (uint64 where it reads pairs),
bool for predicates, and returns its results in the order of `registers.results`, uint64 where a pair is
written. NVIDIA documents no semantics of SASS; these are what the sequences that nvcc emits for known C need
(tests compare them).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.sass.code import Instruction, SassError, half_bits

Vector = Any
LOW = np.uint64(0xFFFFFFFF)
WORD = np.uint64(32)


def wide(x: Vector) -> Vector:
    return x.astype(np.uint64)


def low(x: Vector) -> Vector:
    return (x & LOW).astype(np.uint32)


def high(x: Vector) -> Vector:
    return (x >> WORD).astype(np.uint32)


def signed(x: Vector) -> Vector:
    return x.view(np.int64 if x.dtype == np.uint64 else np.int32)


def extended(x: Vector, is_signed: bool) -> Vector:
    """32 bits as the low half of 64, their sign repeated if there is one."""
    return signed(x).astype(np.int64).view(np.uint64) if is_signed else wide(x)


def iadd3(one: Instruction, a: Vector, b: Vector, c: Vector, *carries: Vector) -> list[Vector]:
    """Sources are uint64: of a negated one 2^32 - x, whose bit 32 is the carry of ~x + 1."""
    total = a + b + c
    for carry in carries if "X" in one.mods else ():
        total = total + wide(carry)
    over = total >> WORD
    return [low(total), over >= 1, over >= 2]


def imad(one: Instruction, a: Vector, b: Vector, c: Vector, *carry: Vector) -> list[Vector]:
    mods = one.mods
    if "WIDE" in mods or "HI" in mods:
        is_signed = "U32" not in mods
        product = extended(a, is_signed) * extended(b, is_signed)
        total = product + c
        over = total < c
        if "X" in mods:
            total = total + wide(carry[0])
            over = over | (total < wide(carry[0]))
        return [total if "WIDE" in mods else high(total), over]
    total = a * b + c
    if "X" in mods:
        total = total + carry[0].astype(np.uint32)
    return [total]


def lea(one: Instruction, a: Vector, b: Vector, *rest: Vector) -> list[Vector]:
    """(a << shift) + b, b being uint64; HI: the upper half of (c, a), or of a with its sign, shifted, + b."""
    mods, others = one.mods, list(rest)
    carry = wide(others.pop()) if "X" in mods else np.uint64(0)
    shift = wide(others.pop()) & np.uint64(31)
    if "HI" not in mods:
        total = (low(wide(a) << shift)).astype(np.uint64) + b
        return [low(total), (total >> WORD) >= 1]
    pair = extended(a, True) if "SX32" in mods else wide(a) | wide(others.pop()) << WORD
    total = ((pair << shift) >> WORD) + b + carry
    return [low(total), (total >> WORD) >= 1]


def lop3(one: Instruction, a: Vector, b: Vector, c: Vector, lut: Vector, *extra: Vector) -> list[Vector]:
    value = by_table(int(lut.flat[0]), a, b, c)
    predicate = value != 0
    if extra:
        predicate = predicate | extra[0]
    return [predicate, value] if one.operands[0].kind == "predicate" else [value, predicate]


def by_table(table: int, a: Vector, b: Vector, c: Vector) -> Vector:
    short = {
        0xC0: lambda: a & b,
        0xFC: lambda: a | b,
        0x3C: lambda: a ^ b,
        0x33: lambda: ~b,
        0x0F: lambda: ~a,
    }
    if table in short:
        return short[table]()
    value = a & ~a
    for i in range(8):
        if table >> i & 1:
            value = value | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
    return value


def plop3(one: Instruction, a: Vector, b: Vector, c: Vector, first: Vector, second: Vector) -> list[Vector]:
    return [by_table(int(table.flat[0]), a, b, c) for table in (first, second)]


def shf(one: Instruction, a: Vector, shift: Vector, b: Vector) -> list[Vector]:
    """Of the pair (b, a)."""
    mods = one.mods
    kind = next((mod for mod in mods if mod in ("U32", "S32", "U64", "S64")), "U32")
    most = 32 if kind.endswith("32") else 63
    by = (
        wide(shift) & np.uint64(most - 1 if kind.endswith("32") else 63)
        if "W" in mods
        else np.minimum(shift, most)
    )
    by = wide(by)
    pair = wide(a) | wide(b) << WORD
    if "L" in mods:
        moved = pair << by
    elif kind == "S32" and "HI" in mods:
        moved_high: Vector = signed(b).astype(np.int64) >> by.view(np.int64)
        return [moved_high.astype(np.int32).view(np.uint32)]
    elif kind.startswith("S"):
        moved = (signed(pair) >> by.view(np.int64)).view(np.uint64)
    else:
        moved = pair >> by
    return [high(moved) if "HI" in mods else low(moved)]


COMPARE: dict[str, Callable[[Vector, Vector], Vector]] = {
    "EQ": np.equal,
    "NE": np.not_equal,
    "LT": np.less,
    "LE": np.less_equal,
    "GT": np.greater,
    "GE": np.greater_equal,
}


def compare(one: Instruction, a: Vector, b: Vector, *rest: Vector) -> Vector:
    """The comparison alone; EX: of 64 bits, the low halves' result being the last source."""
    mods = one.mods
    if "U32" not in mods:
        a, b = signed(a), signed(b)
    result = COMPARE[mods[0]](a, b)
    if "EX" in mods:
        equal, before = a == b, rest[-1]
        strict = {"LE": "LT", "GE": "GT"}.get(mods[0], mods[0])
        beyond = COMPARE[strict](a, b)
        result = (equal & before) if mods[0] == "EQ" else beyond | (equal & before)
    return result


def combine(mods: list[str], a: Vector, b: Vector) -> Vector:
    return a & b if "AND" in mods else a | b if "OR" in mods else a ^ b


def isetp(one: Instruction, a: Vector, b: Vector, *rest: Vector) -> list[Vector]:
    result = compare(one, a, b, *rest)
    return [combine(one.mods, result, rest[0]), combine(one.mods, ~result, rest[0])]


def minmax(one: Instruction, a: Vector, b: Vector, is_min: Vector) -> list[Vector]:
    x, y = (a, b) if "U32" in one.mods else (signed(a), signed(b))
    chosen: Vector = np.where(is_min, np.minimum(x, y), np.maximum(x, y))
    return [chosen.view(np.uint32)]


def prmt(one: Instruction, a: Vector, selector: Vector, b: Vector) -> list[Vector]:
    if one.mods:
        raise SassError("not interpreted")
    pair = wide(a) | wide(b) << WORD
    value = np.zeros_like(a)
    for i in range(4):
        nibble = wide(selector >> np.uint32(4 * i)) & np.uint64(15)
        byte = (pair >> ((nibble & np.uint64(7)) * np.uint64(8))) & np.uint64(0xFF)
        sign = np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0))
        byte = np.where(nibble & np.uint64(8), sign, byte)
        value = value | (byte.astype(np.uint32) << np.uint32(8 * i))
    return [value]


def float_of(one: Instruction, a: Vector) -> list[Vector]:
    """I2F and I2FP to float32, RP: to above."""
    mods = one.mods
    if "F64" in mods or "F16" in mods or "BF16" in mods:
        raise SassError("not interpreted")
    exact = a if any(mod in ("U32", "U64") for mod in mods) else signed(a)
    with np.errstate(all="ignore"):
        value = exact.astype(np.float32)
        if "RP" in mods:
            # longdouble holds 64 bits exactly
            below = value.astype(np.longdouble) < exact.astype(np.longdouble)
            value = np.where(below, np.nextafter(value, np.float32(np.inf)), value).astype(np.float32)
    return [value.view(np.uint32)]


def integer_of(one: Instruction, a: Vector) -> list[Vector]:
    """F2I with truncation."""
    mods = one.mods
    if "TRUNC" not in mods or not {"U32", "U64"} & set(mods):
        raise SassError("not interpreted")
    to = np.uint64 if "U64" in mods else np.uint32
    with np.errstate(all="ignore"):
        x = a.view(np.float32).astype(np.longdouble)
        most = np.longdouble(2) ** (64 if "U64" in mods else 32) - 1
        return [np.clip(np.trunc(np.nan_to_num(x, nan=0.0)), 0, most).astype(to)]


def reciprocal(one: Instruction, a: Vector) -> list[Vector]:
    with np.errstate(all="ignore"):
        return [(np.float32(1) / a.view(np.float32)).view(np.uint32)]


def absolute(one: Instruction, a: Vector) -> list[Vector]:
    return [np.where(signed(a) < 0, np.uint32(0) - a, a)]


def constant_pair(one: Instruction, *sources: Vector) -> list[Vector]:
    if any(mod.startswith("BF16") for mod in one.mods):
        raise SassError("not interpreted")
    halves = [operand.value for operand in one.operands[3:]]
    upper, lower = (half_bits(float(value)) for value in halves)
    return [np.full_like(sources[0], upper << 16 | lower)]


def bit_mask(one: Instruction, a: Vector, b: Vector) -> list[Vector]:
    """BMSK: b ones from bit a on."""
    ones = (np.uint64(1) << np.minimum(wide(b), np.uint64(32))) - np.uint64(1)
    return [low(ones << np.minimum(wide(a), np.uint64(63)))]


def sign_extend(one: Instruction, a: Vector, b: Vector) -> list[Vector]:
    """SGXT: the low b bits, their sign repeated or zeros."""
    by = np.uint32(32) - np.minimum(b, np.uint32(32))
    up = low(wide(a) << wide(by))
    if "U32" in one.mods:
        return [low(wide(up) >> wide(by))]
    return [(signed(up).astype(np.int64) >> by.astype(np.int64)).astype(np.int32).view(np.uint32)]


def count_ones(one: Instruction, a: Vector) -> list[Vector]:
    return [np.bitwise_count(a).astype(np.uint32)]


Semantics = Callable[..., list[Vector]]
SEMANTICS: dict[str, Semantics] = {
    "IADD3": iadd3,
    "IMAD": imad,
    "LEA": lea,
    "LOP3": lop3,
    "PLOP3": plop3,
    "SHF": shf,
    "ISETP": isetp,
    "SEL": lambda one, a, b, p: [np.where(p, a, b)],
    "MOV": lambda one, a, *mask: [a],
    "VIADD": lambda one, a, b: [a + b],
    "VIMNMX": minmax,
    "VIMNMX3": lambda one, a, b, c, p: minmax(one, minmax(one, a, b, p)[0], c, p),
    "VIADDMNMX": lambda one, a, b, c, p: minmax(one, a + b, c, p),
    "IABS": absolute,
    "PRMT": prmt,
    "I2F": float_of,
    "I2FP": float_of,
    "F2I": integer_of,
    "MUFU": reciprocal,
    "HFMA2": constant_pair,
    "BMSK": bit_mask,
    "SGXT": sign_extend,
    "POPC": count_ones,
}
# sources that are read as uint64 with 2^32 - x for a negated x: all, or by number
BORROWS: dict[str, set[int]] = {"IADD3": {0, 1, 2}, "LEA": {1}}


def semantics(base: str) -> Semantics | None:
    """Uniform instructions do the same."""
    return SEMANTICS.get(base) or SEMANTICS.get(base.removeprefix("U"))


def borrows(base: str) -> set[int]:
    return BORROWS.get(base.removeprefix("U") if base.startswith("U") else base, set())
