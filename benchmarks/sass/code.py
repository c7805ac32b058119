"""Kernels as nvdisasm prints them: instructions with operands and source lines, basic blocks, jump tables."""

from __future__ import annotations

import re
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

# numbers of registers in one file: R, UR, P and UP
UNIFORM, PREDICATE, UNIFORM_PREDICATE, REGISTERS = 256, 320, 328, 336
# instructions after which a warp may go on elsewhere, or in parts
CONTROL = {"BRA", "BRX", "EXIT", "CALL", "RET", "BSYNC", "WARPSYNC"}


class SassError(Exception):
    """What the interpreter does not know; the text names the kernel and the instruction."""


class Operand(NamedTuple):
    """An operand as written: `kind` is register, predicate, integer, float, constant, memory, label or other.

    Attributes:
        register: its number; None for RZ, URZ, PT and UPT, and where there is none.
        value: of an immediate, or of an address its offset.
        bank: of constants.
        parts: of an address its registers, and whether each is a pair of them, of 64 bits.
    """

    kind: str
    text: str
    register: int | None = None
    value: int | float = 0
    sign: str = ""
    absolute: bool = False
    bank: int = 0
    parts: tuple[tuple[int, bool], ...] = ()


class Instruction(NamedTuple):
    """At `offset` in its kernel's code; `guard` is the predicate it is executed under."""

    offset: int
    guard: Operand | None
    opcode: str
    operands: tuple[Operand, ...]
    targets: tuple[int, ...]
    line: tuple[str, int]
    text: str

    @property
    def base(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def mods(self) -> list[str]:
        return self.opcode.split(".")[1:]


@dataclass(frozen=True, eq=False)
class Kernel:
    """A kernel's code. blocks: first and last + 1 of each basic block's instructions, in order."""

    name: str
    instructions: list[Instruction]
    blocks: list[tuple[int, int]]
    # offset -> number of the block that begins there
    block_at: dict[int, int]
    # offset -> name of the subroutine that begins there
    subroutines: dict[int, str]
    # constant bank 2: jump tables
    tables: bytes
    registers: int
    # where parameters begin in constant bank 0, and their bytes
    parameters: tuple[int, int]


def compile_cubin(nvcc: Path, source: Path, include: Path, target: Path) -> None:
    """For sm_90, as setup.py compiles it, with source lines, which change no instruction."""
    command = [str(nvcc), "-std=c++20", "-O3", "-arch=sm_90", "-lineinfo", f"-I{include}"]
    subprocess.run([*command, "-cubin", str(source), "-o", str(target)], check=True)


class Listing(NamedTuple):
    """What nvdisasm prints of a cubin, by mangled name.

    Attributes:
        sections: lines of code; tables: constant bank 2; used: registers.
        places: where parameters begin in constant bank 0, and their bytes.
    """

    sections: dict[str, list[str]]
    tables: dict[str, bytes]
    used: dict[str, int]
    places: dict[str, tuple[int, int]]

    def kernel(self, name: str) -> Kernel:
        code = parse_code(self.sections[name])
        return Kernel(name, *code, self.tables.get(name, b""), self.used[name], self.places.get(name, (0, 0)))


def disassemble(nvdisasm: Path, cubin: Path) -> Listing:
    text = subprocess.run(
        [str(nvdisasm), "-g", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    return parse(text)


SECTION = re.compile(r"^\t\.section\t\.(text|nv\.constant2)\.([\w$]+),")
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;?\s*$")
LINE = re.compile(r'^\s*//## File "([^"]*)", line (\d+)')
REGISTER_COUNT = re.compile(r"EIATTR_REGCOUNT\n(?:.*\n){5,6}?.*index@\(([\w$]+)\)\n.*\.word\s+(0x[0-9a-f]+)")
PARAMETERS = re.compile(
    r"EIATTR_PARAM_CBANK\n(?:.*\n){5,6}?.*index@\(\.nv\.constant0\.([\w$]+)\)\n"
    r".*\.short\s+(0x[0-9a-f]+)\n.*\.short\s+(0x[0-9a-f]+)"
)
TARGETS = re.compile(r'\(\*"BRANCH_TARGETS ([^"]*)"\*\)')


def parse(text: str) -> Listing:
    sections: dict[str, list[str]] = {}
    tables: dict[str, bytes] = {}
    kind, name = "", ""
    for line in text.splitlines():
        if line.startswith("\t.section\t"):
            match = SECTION.match(line)
            kind, name = (match[1], match[2]) if match else ("", "")
        elif kind == "text":
            sections.setdefault(name, []).append(line)
        elif kind and (bytes_of := re.search(r"\.byte\s+(.*)", line)):
            numbers = [int(number, 16) for number in bytes_of[1].split(",")]
            tables[name] = tables.get(name, b"") + bytes(numbers)
    used = {name: int(count, 16) for name, count in REGISTER_COUNT.findall(text)}
    places = {name: (int(offset, 16), int(size, 16)) for name, offset, size in PARAMETERS.findall(text)}
    return Listing(sections, tables, used, places)


Blocks = list[tuple[int, int]]


def parse_code(lines: list[str]) -> tuple[list[Instruction], Blocks, dict[int, int], dict[int, str]]:
    """The first fields of a Kernel."""
    labels, subroutines, raw = {}, {}, []
    waiting: list[str] = []
    line_of = ("", 0)
    for text in lines:
        if match := LINE.match(text):
            line_of = match[1], int(match[2])
        elif match := re.match(r"^([.\w$]+):$", text):
            waiting.append(match[1])
        elif match := INSTRUCTION.match(text):
            offset = int(match[1], 16)
            for label in waiting:
                labels[label] = offset
                if label.startswith("$"):
                    subroutines[offset] = label
            waiting = []
            raw.append((offset, match[2], match[3], match[4], line_of))
    instructions = []
    for offset, guard, opcode, rest, where in raw:
        named = re.findall(r"`\(([^)]*)\)", rest)
        if match := TARGETS.search(rest):
            named, rest = match[1].split(","), rest[: match.start()].strip()
        targets = tuple(labels[label] for label in named if label in labels)
        operands = tuple(operand(part) for part in split_operands(rest))
        text = " ".join(filter(None, [guard and f"@{guard}", opcode, rest]))
        instructions.append(
            Instruction(offset, operand(guard) if guard else None, opcode, operands, targets, where, text)
        )
    return instructions, *find_blocks(instructions), subroutines


def split_operands(text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")] if text else []
    # BRX R20 -0x3660, RET R2 `(kernel)
    if len(parts) == 1 and (match := re.match(r"^(U?R\d+) (-?0x[0-9a-f]+|`\(.*\))$", parts[0])):
        return [match[1], match[2]]
    return parts


def find_blocks(instructions: list[Instruction]) -> tuple[list[tuple[int, int]], dict[int, int]]:
    starts = {instructions[0].offset}
    for i, one in enumerate(instructions):
        starts.update(one.targets)
        if one.base in CONTROL and i + 1 < len(instructions):
            starts.add(instructions[i + 1].offset)
    begins = [i for i, one in enumerate(instructions) if one.offset in starts]
    blocks = list(zip(begins, [*begins[1:], len(instructions)], strict=True))
    return blocks, {instructions[first].offset: i for i, (first, _) in enumerate(blocks)}


REGISTER = re.compile(r"^([-~]?)(\|?)(UR|R)(\d+|Z)\|?((?:\.\w+)*)\|?$")
PREDICATES = re.compile(r"^(!?)(UP|P)(\d|T)$")
CONSTANT = re.compile(r"^([-~]?)(\|?)c[x]?\[(0x[0-9a-f]+|UR\d+)\]\[([^\]]*)\]\|?((?:\.\w+)*)$")
MEMORY = re.compile(r"^(?:desc\[U?R\d+\])?\[([^\]]*)\]$")


def number(text: str) -> int | None:
    return int(text, 16) if re.match(r"^-?0x[0-9a-f]+$", text) else None


def address_parts(text: str) -> tuple[tuple[tuple[int, bool], ...], int]:
    """Registers and offset of R4.64+UR6+0x10."""
    parts, offset = [], 0
    for term in text.split("+"):
        value = number(term)
        if value is not None:
            offset += value
        elif match := re.match(r"^(UR|R)(\d+|Z)((?:\.\w+)*)$", term):
            if match[2] != "Z":
                if scale := re.search(r"\.X\d+", match[3]):
                    raise SassError(f"an address of {text!r}: {scale[0]} is not interpreted")
                parts.append((int(match[2]) + (UNIFORM if match[1] == "UR" else 0), ".64" in match[3]))
        elif term:
            raise SassError(f"an address of {text!r}: {term!r} is not interpreted")
    return tuple(parts), offset


def operand(text: str) -> Operand:
    if match := REGISTER.match(text):
        place = None if match[4] == "Z" else int(match[4]) + (UNIFORM if match[3] == "UR" else 0)
        return Operand("register", text, place, 0, match[1], match[2] == "|")
    if match := PREDICATES.match(text):
        first = UNIFORM_PREDICATE if match[2] == "UP" else PREDICATE
        return Operand("predicate", text, None if match[3] == "T" else first + int(match[3]), 0, match[1])
    value = number(text)
    if value is not None:
        return Operand("integer", text, None, value)
    if match := CONSTANT.match(text):
        bank = number(match[3])
        parts, offset = address_parts(match[4])
        return Operand(
            "constant", text, None, offset, match[1], match[2] == "|", -1 if bank is None else bank, parts
        )
    if match := MEMORY.match(text):
        parts, offset = address_parts(match[1])
        return Operand("memory", text, None, offset, parts=parts)
    if re.match(r"^[-+]?(\d|INF|QNAN|SNAN)", text):
        special = {"+INF": float("inf"), "-INF": float("-inf")}
        unsigned = text.lstrip("+-")
        plain = float("nan") if unsigned in ("QNAN", "SNAN") else special.get(text)
        return Operand("float", text, None, float(text) if plain is None else plain)
    return Operand("label" if text.startswith("`") else "other", text)


def half_bits(value: float) -> int:
    return struct.unpack("<H", struct.pack("<e", value))[0]
