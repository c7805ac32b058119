"""Classes of instructions, and how long the parts of a multiprocessor take for each.

A multiprocessor of an H100 has four schedulers, each of which issues one warp instruction a cycle. Rates are
those of the CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions", compute capability
9.0, in lanes a cycle of a multiprocessor: 128 of float32, 64 of float64, 64 of integers (sums, comparisons,
shifts, logic, products), 16 of special functions and of conversions from and to 64 bits, 32 of shuffles.
Which opcodes share a unit is what Nsight Compute's pipelines say: integer products run on one half of the
float32 lanes. Shared memory and L1 pass one wavefront of 128 bytes a cycle. Tensor cores: the data sheet's
989 TFLOP/s are 512 multiply-adds a cycle of each scheduler, at 1.83 GHz; warps' own HMMA, other than warp
groups' products, are known to reach about two thirds of it. Uniform instructions, control and constants take
issue slots; more is not published.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from benchmarks.sass.code import Instruction, Kernel, SassError

SCHEDULERS = 4
MULTIPROCESSORS = 132
CLOCK = 1.98e9
# lanes of a warp / lanes a cycle of one scheduler's unit
CYCLES = {"imad": 2, "alu": 2, "fp64": 2, "xu": 8}
# one wavefront a cycle of a whole multiprocessor
WAVEFRONT = 4
TENSOR = 512

CLASSES = {
    "fp32": "FADD FMUL FFMA FADD32I FMUL32I FFMA32I FSWZADD HADD2 HMUL2 HFMA2",
    "imad": "IMAD IDP IMUL",
    "alu": "IADD3 IADD32I LOP3 LOP32I SHF LEA ISETP SEL FSEL FSETP FSET FMNMX FCHK MOV MOV32I PRMT VIADD "
    "VIMNMX VIMNMX3 VIADDMNMX IABS IMNMX PLOP3 I2FP F2FP F2IP BMSK SGXT P2R R2P VOTE CS2R HSETP2 HSET2 "
    "HMNMX2 VHMNMX VABSDIFF VABSDIFF4 I2I I2IP ISCADD",
    "xu": "MUFU I2F F2I F2F FRND POPC FLO BREV",
    "fp64": "DADD DMUL DFMA DSETP DMNMX",
    "tensor": "HMMA IMMA",
    "shared": "LDS STS LDSM STSM ATOMS",
    "shuffle": "SHFL REDUX MATCH MOVM",
    "global": "LDG STG LD ST RED ATOM ATOMG LDGSTS LDL STL",
    "constant": "LDC ULDC",
    "uniform": "UMOV UIADD3 UIMAD ULEA ULOP3 USHF USEL UISETP UPLOP3 UPRMT UBMSK USGXT UPOPC UFLO UBREV "
    "UP2UR VOTEU R2UR S2UR UVIADD UVIMNMX UIABS UR2UP ELECT",
    "control": "BRA BRX EXIT CALL RET BSSY BSYNC BREAK WARPSYNC ENDCOLLECTIVE NOP BAR MEMBAR YIELD ERRBAR "
    "CCTL DEPBAR LDGDEPBAR S2R B2R NANOSLEEP FENCE BMOV CCTLL",
}
CLASS = {opcode: name for name, opcodes in CLASSES.items() for opcode in opcodes.split()}


# of HMMA.16816 and others, the shape of the product
MULTIPLY_ADDS = {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8, "16832": 16 * 8 * 32}


@cache
def classes(kernel: Kernel) -> list[str]:
    """Of its instructions. Raises SassError for an opcode, or a tensor cores' shape, that is in no class."""
    for one in kernel.instructions:
        known = one.base in CLASS and (CLASS[one.base] != "tensor" or one.mods[0] in MULTIPLY_ADDS)
        if not known:
            raise SassError(f"{kernel.name} at {one.offset:#x}: {one.text}: is in no class of instructions")
    return [CLASS[one.base] for one in kernel.instructions]


def cycles_of(one: Instruction) -> float:
    """That an instruction keeps its scheduler's unit busy."""
    name = CLASS[one.base]
    return MULTIPLY_ADDS[one.mods[0]] / TENSOR if name == "tensor" else CYCLES.get(name, 0)


class Work(NamedTuple):
    """What a launch's warps issue, all blocks together.

    Attributes:
        issued: warp instructions by class.
        cycles: of one scheduler's unit, by unit, "issue" among them.
        multiprocessors: how many of them have a block.
    """

    issued: dict[str, float]
    cycles: dict[str, float]
    multiprocessors: int

    def seconds(self, unit: str) -> float:
        return self.cycles[unit] / (self.multiprocessors * SCHEDULERS * CLOCK)

    @property
    def instructions(self) -> float:
        return sum(self.issued.values())

    @property
    def binding(self) -> str:
        """The unit that takes longest."""
        return max(self.cycles, key=lambda unit: self.cycles[unit])


def added(works: list[Work]) -> Work:
    """Launches one after the other; their cycles are those of a full device."""
    issued: dict[str, float] = {}
    cycles: dict[str, float] = {}
    for work in works:
        for name, count in work.issued.items():
            issued[name] = issued.get(name, 0) + count
        for unit, count in work.cycles.items():
            cycles[unit] = cycles.get(unit, 0) + count * MULTIPROCESSORS / work.multiprocessors
    return Work(issued, cycles, MULTIPROCESSORS)
