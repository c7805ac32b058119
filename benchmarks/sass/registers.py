"""Which registers instructions write and read, and on which instructions branches and addresses depend."""

from __future__ import annotations

from functools import cache

from benchmarks.sass.code import (
    PREDICATE,
    UNIFORM_PREDICATE,
    Instruction,
    Kernel,
    Operand,
)

# results that are data, never known here; with how many registers of theirs are written: see `width`
LOADS = {"LDG", "LDS", "LDL", "LD", "LDSM", "ATOM", "ATOMG", "ATOMS", "TEX", "TLD"}
FLOATS = {
    *("FADD", "FMUL", "FFMA", "FMNMX", "FSEL", "FSETP", "FSET", "FCHK", "FSWZADD", "FADD32I", "FMUL32I"),
    *("DADD", "DMUL", "DFMA", "DSETP", "DMNMX"),
    *("HADD2", "HMUL2", "HFMA2", "HMNMX2", "VHMNMX", "HSETP2", "HSET2", "HMMA", "IMMA", "DMMA"),
    *("F2F", "F2FP", "FRND", "SHFL", "MATCH", "REDUX", "MOVM", "CS2UR"),
}
DATA_COMPARISONS = {"FSETP", "DSETP", "HSETP2"}
STORES = {"STG", "STS", "STL", "ST", "RED", "STSM"}
# shared memory and global memory whose addresses are worth knowing
SHARED = {"LDS", "STS", "LDSM", "STSM", "ATOMS"}
GLOBAL = {"LDG", "STG", "LD", "ST", "ATOMG", "RED", "ATOM", "LDGSTS"}
# carries and other predicates that follow the first register
SECOND_RESULTS = {"IADD3", "UIADD3", "LEA", "ULEA", "IMAD", "UIMAD", "LOP3", "ULOP3"}
NO_RESULT = {
    *(
        "BRA",
        "BRX",
        "EXIT",
        "CALL",
        "RET",
        "BSSY",
        "BSYNC",
        "BREAK",
        "WARPSYNC",
        "ENDCOLLECTIVE",
        "NOP",
        "BAR",
    ),
    *("MEMBAR", "YIELD", "ERRBAR", "CCTL", "CCTLL", "DEPBAR", "LDGDEPBAR", "LDGSTS", "ARRIVES", "NANOSLEEP"),
    *("FENCE", "ACQBULK", "PREEXIT", "UCGABAR_ARV", "UCGABAR_WAIT", "R2P", "BPT", "KILL"),
}


def width(instruction: Instruction) -> int:
    """Registers of the first result."""
    base, mods = instruction.base, instruction.mods
    if base in ("DADD", "DMUL", "DFMA", "DMNMX", "DMMA"):
        return 2
    if base in ("IMAD", "UIMAD"):
        return 2 if "WIDE" in mods else 1
    if base == "CS2R":
        return 1 if "32" in mods else 2
    if base in ("F2F", "I2F"):
        return 2 if mods[0] == "F64" else 1
    if base == "F2I":
        return 2 if "U64" in mods or "S64" in mods else 1
    if base in ("HMMA", "IMMA"):
        return 4 if "F32" in mods[1:2] or base == "IMMA" else 2
    if base in LOADS or base in ("LDC", "ULDC"):
        return 4 if "128" in mods or "4" in mods else 2 if "64" in mods or "2" in mods else 1
    return 1


def results(instruction: Instruction) -> list[Operand]:
    """Operands that are written, in order."""
    base, operands = instruction.base, instruction.operands
    if base in NO_RESULT or base in STORES or not operands:
        return []
    count = 1
    if operands[0].kind == "predicate":
        # P, P of comparisons; P, R of shuffles and of LOP3
        if base.endswith(("SETP", "SETP2")) or base in (
            "PLOP3",
            "UPLOP3",
            "SHFL",
            "LOP3",
            "ULOP3",
            "ATOM",
            "ATOMG",
        ):
            count = 2
        return list(operands[:count])
    if base in ("VOTE", "VOTEU", "MATCH", "B2R"):
        return [one for one in operands[:2] if one.kind == "register" or not one.sign]
    if base in SECOND_RESULTS:
        while count < len(operands) and operands[count].kind == "predicate":
            count += 1
    return list(operands[:count])


def written(instruction: Instruction) -> list[int]:
    registers: list[int] = []
    for i, one in enumerate(results(instruction)):
        if one.register is not None:
            count = (
                width(instruction) if one.kind == "register" and (i == 0 or instruction.base == "SHFL") else 1
            )
            registers += range(one.register, one.register + count)
    if instruction.base == "R2P":
        registers += range(PREDICATE, PREDICATE + 7)
    return registers


def is_data(instruction: Instruction) -> bool:
    """Whether what it writes is not known here."""
    base = instruction.base
    if base == "HFMA2":
        return not is_constant_pair(instruction)
    if base == "MUFU":
        return instruction.mods[0] != "RCP"
    if base in ("I2F", "F2I"):
        return "F64" in instruction.mods
    return base in LOADS or (base in FLOATS and base not in DATA_COMPARISONS)


def is_constant_pair(instruction: Instruction) -> bool:
    """HFMA2 R, -RZ, RZ, high, low: a way to write a constant."""
    _, a, b, *halves = instruction.operands
    zeros = all(one.kind == "register" and one.register is None for one in (a, b))
    return zeros and len(halves) == 2 and all(one.kind in ("float", "integer") for one in halves)


def pairs(instruction: Instruction) -> set[int]:
    """Operands that are read as 64 bits, by number."""
    base, mods = instruction.base, instruction.mods
    if base in ("IMAD", "UIMAD") and ("WIDE" in mods or "HI" in mods):
        return {len(instruction.operands) - 1 - ("X" in mods)}
    if base == "I2F" and ("U64" in mods or "S64" in mods):
        return {1}
    return {0} if base in ("RET", "BRX") else set()


def registers_of(one: Operand, wide: bool = False) -> list[int]:
    found = [register + i for register, pair in one.parts for i in range(1 + pair)]
    if one.register is not None:
        found += range(one.register, one.register + 1 + wide)
    return found


def read(instruction: Instruction) -> list[int]:
    skip, wide = len(results(instruction)), pairs(instruction)
    found = [register for one in [instruction.guard] if one for register in registers_of(one)]
    for i, one in enumerate(instruction.operands):
        # of a comparison of data only the predicate that it is combined with counts
        if i >= skip and (instruction.base not in DATA_COMPARISONS or one.kind == "predicate"):
            found += registers_of(one, i in wide)
    if instruction.base in ("P2R", "UP2UR"):
        first = PREDICATE if instruction.base == "P2R" else UNIFORM_PREDICATE
        found += range(first, first + 7)
    return found


def roots(instruction: Instruction) -> list[int]:
    """Registers that matter whatever follows: of branches, of addresses, of the guards of accesses."""
    guard = registers_of(instruction.guard) if instruction.guard else []
    base = instruction.base
    if base in ("BRA", "EXIT", "BRX", "CALL", "RET", "BREAK", "BSYNC", "WARPSYNC", "BSSY"):
        return [*guard, *read(instruction)]
    if base in SHARED or base in GLOBAL:
        return guard + [
            register for one in instruction.operands for register in registers_of(one) if one.parts
        ]
    return []


def successors(kernel: Kernel, block: int) -> list[int]:
    """Blocks that may follow; after a return, all that follow calls."""
    end = kernel.instructions[kernel.blocks[block][1] - 1]
    after = [block + 1] if block + 1 < len(kernel.blocks) else []
    targets = [kernel.block_at[offset] for offset in end.targets]
    always = end.guard is None or (end.guard.register is None and not end.guard.sign)
    if end.base == "BRA":
        conditional = not always or len(end.operands) > 1
        return targets + (after if conditional else [])
    if end.base in ("BRX", "CALL"):
        return targets + ([] if always else after)
    if end.base == "EXIT":
        return [] if always else after
    if end.base == "RET":
        calls = [
            i + 1
            for i, (_, stop) in enumerate(kernel.blocks)
            if kernel.instructions[stop - 1].base == "CALL" and i + 1 < len(kernel.blocks)
        ]
        return calls + ([] if always else after)
    return after


def bits(registers: list[int]) -> int:
    value = 0
    for register in registers:
        value |= 1 << register
    return value


@cache
def control_slice(kernel: Kernel) -> list[bool]:
    """For each instruction whether a branch or an address depends on what it writes."""
    facts = [
        (bits(written(one)), bits(read(one)), bits(roots(one)), one.guard is None, is_data(one))
        for one in kernel.instructions
    ]

    def backward(block: int, needed: int, chosen: list[bool] | None = None) -> int:
        first, last = kernel.blocks[block]
        for i in range(last - 1, first - 1, -1):
            writes, reads, wanted, always, data = facts[i]
            if writes & needed:
                if chosen is not None:
                    chosen[i] = True
                if always:
                    needed &= ~writes
                    needed |= 0 if data else reads
                else:
                    # what was there before stays where the guard is false
                    guard = kernel.instructions[i].guard
                    needed |= bits(registers_of(guard)) if data and guard else reads
            needed |= wanted
        return needed

    count = len(kernel.blocks)
    following = [successors(kernel, block) for block in range(count)]
    before: list[list[int]] = [[] for _ in range(count)]
    for block, nexts in enumerate(following):
        for one in nexts:
            before[one].append(block)
    needed_at = [0] * count
    todo = list(range(count))
    waiting = set(todo)
    while todo:
        block = todo.pop()
        waiting.discard(block)
        needed = 0
        for one in following[block]:
            needed |= needed_at[one]
        needed = backward(block, needed)
        if needed != needed_at[block]:
            needed_at[block] = needed
            fresh = [one for one in before[block] if one not in waiting]
            waiting.update(fresh)
            todo += fresh
    chosen = [False] * len(kernel.instructions)
    for block in range(count):
        needed = 0
        for one in following[block]:
            needed |= needed_at[one]
        backward(block, needed, chosen)
    return chosen
