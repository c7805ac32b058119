"""Counted warp instructions against counts by hand: compiled loops, divergence, divisions, bank conflicts."""

import math
import re
import struct
import subprocess

import pytest

from benchmarks.sass import SassError, code, machine, memory, pipes, profile, steps
from tests.kernels.emulation import find_nvcc, find_tool

THREADS, BLOCKS = 96, 3

# of thread t: how often it goes round a loop, in C and in Python
TRIPS = {
    "(t * 7 - 50) / p.d & 15": lambda t, p: quotient(t * 7 - 50, p["d"]) & 15,
    "(t - 40) % p.d & 15": lambda t, p: remainder(t - 40, p["d"]) & 15,
    "(unsigned(t) * 2654435761u) / p.u & 15": lambda t, p: (t * 2654435761 % 2**32) // p["u"] & 15,
    "(unsigned(t) * 2654435761u) % p.u & 15": lambda t, p: (t * 2654435761 % 2**32) % p["u"] & 15,
    "int((p.big - t * 1000003ll) / (p.d - t)) & 15": lambda t, p: (
        quotient(p["big"] - t * 1000003, p["d"] - t) & 15
    ),
    "min(t, 9) + max(t - 280, p.d) & 15": lambda t, p: min(t, 9) + max(t - 280, p["d"]) & 15,
    "((t - 70) >> 2 ^ t << 3) & 15": lambda t, p: ((t - 70) >> 2 ^ t << 3) & 15,
    "(t << p.u % 5) >> p.u / 30 & 15": lambda t, p: (t << p["u"] % 5) >> p["u"] // 30 & 15,
    "int((t * 0x9e3779b97f4a7c15ull) >> 60)": lambda t, p: (t * 0x9E3779B97F4A7C15) % 2**64 >> 60,
    "(t * 3 - 100) % 7 & 15": lambda t, p: remainder(t * 3 - 100, 7) & 15,
    "abs(t - 20) < p.d * -5 ? t & 7 : 12": lambda t, p: t & 7 if abs(t - 20) < p["d"] * -5 else 12,
    "(long long)t * t * t * 900000 > p.big ? t % 5 : 2": lambda t, p: (
        t % 5 if t**3 * 900000 > p["big"] else 2
    ),
    "(p.table[t % 8] + p.bytes[t % 3]) & 15": lambda t, p: p["table"][t % 8] + p["bytes"][t % 3] & 15,
    "__popc(t) + (__float_as_int(1.0f) >> 23) % 8": lambda t, p: t.bit_count() + 127 % 8,
}
PARAMETERS = {
    "d": -13,
    "u": 37,
    "big": 5_000_000_000_123,
    "table": [3, 1, 4, 1, 5, 9, 2, 6],
    "bytes": [7, -2, 5],
}
LAYOUT = (
    "struct P { int d; unsigned u; long long big; int table[8]; signed char bytes[8]; volatile int* out; };\n"
)
KERNEL = 'extern "C" __global__ void {name}(const __grid_constant__ P p) {{\n  {body}\n}}\n'
ROUND = """int t = threadIdx.x + blockIdx.x * blockDim.x, trips = {trips};
#pragma unroll 1
  for (int i = 0; i < trips; i++) *p.out = i;"""
DIVERGENCE = """int t = threadIdx.x + blockIdx.x * blockDim.x;
  if (t & 1) {
#pragma unroll 1
    for (int i = 0; i < t % 3; i++) p.out[1] = i;
  } else {
#pragma unroll 1
    for (int i = 0; i < t % 5; i++) {
      if (t % 4 == 2) p.out[2] = i;
      p.out[3] = p.out[4];
    }
  }
  p.out[5] = t;"""
# some lanes of a part have left when the others meet again
LEAVING = """int t = threadIdx.x + blockIdx.x * blockDim.x;
  if (t & 1) {
#pragma unroll 1
    for (int i = 0; i < t % 3; i++) p.out[1] = i;
    if (t % 5 == 0) return;
    p.out[2] = t;
  }
  p.out[3] = t;"""
SHARED = """extern __shared__ __align__(16) float s[];
  volatile float* v = s;
  v[threadIdx.x * p.u] = 1;
  float4 q = *reinterpret_cast<float4*>(s + threadIdx.x * 4 * p.u);
  p.out[0] = q.x + q.y + q.z + q.w;
  p.out[1] = v[threadIdx.x / 32];"""
MATRICES = """extern __shared__ __align__(16) float s[];
  unsigned to = unsigned(__cvta_generic_to_shared(s)) + threadIdx.x * p.u * 16, a, b;
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(a), "=r"(b) : "r"(to));
  p.out[0] = a + b;"""
COPY = """extern __shared__ __align__(16) float s[];
  unsigned to = unsigned(__cvta_generic_to_shared(s)) + threadIdx.x * 16;
  auto from = (char*)p.out + threadIdx.x * p.u * 16;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from));
  asm volatile("cp.async.wait_all;");"""
WHOLE_BLOCK = """int any = __syncthreads_or(p.out[7] == 3);
  p.out[1] = 1;
  if (any) {
    p.out[2] = p.out[8];
    __syncthreads();
    p.out[3] = p.out[9];
  }"""

BODIES = {
    **{f"round{i}": ROUND.format(trips=trips) for i, trips in enumerate(TRIPS)},
    "divergence": DIVERGENCE,
    "leaving": LEAVING,
    "shared": SHARED,
    "matrices": MATRICES,
    "copy": COPY,
    "whole_block": WHOLE_BLOCK,
    "guarded": "if (threadIdx.x == 5) p.out[0] = 1;\n  p.out[1] = 2;",
    "loop_on_data": "int i = 0;\n  do p.out[0] = i; while (++i < p.out[1]);",
    "slow_path": "p.out[0] = 1 / sqrtf(float(p.out[1])) + 1.0 / p.out[2] + float(p.out[3]) / p.out[4];",
}


def quotient(a, b):
    """As in C."""
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def remainder(a, b):
    return a - quotient(a, b) * b


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    nvcc = find_nvcc()
    nvdisasm = find_tool("nvdisasm")
    if nvcc is None or nvdisasm is None:
        pytest.skip("needs nvcc, and nvdisasm of a CUDA toolkit or of triton")
    folder = tmp_path_factory.mktemp("sass")
    kernels = [KERNEL.format(name=name, body=body) for name, body in BODIES.items()]
    (folder / "kernels.cu").write_text(LAYOUT + "".join(kernels))
    code.compile_cubin(nvcc, folder / "kernels.cu", folder, folder / "kernels.cubin")
    command = [str(nvdisasm), "-g", str(folder / "kernels.cubin")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def listing(text):
    return code.parse(text)


def packed(**changes):
    p = PARAMETERS | changes
    return struct.pack("<iIq8i8bQ", p["d"], p["u"], p["big"], *p["table"], *p["bytes"], *[0] * 5, 1 << 30)


def run(listing, name, blocks=BLOCKS, threads=THREADS, **changes):
    ids = [(x, 0, 0) for x in range(blocks)]
    found = machine.Machine(listing.kernel(name), (blocks, 1, 1), (threads, 1, 1), packed(**changes), ids)
    found.run()
    return found


def by_opcode(found, opcode):
    """Of all instructions: issued, and by how many lanes."""
    chosen = [i for i, one in enumerate(found.kernel.instructions) if one.base == opcode]
    return sum(found.issued[chosen]), sum(found.active[chosen])


@pytest.mark.parametrize("i", range(len(TRIPS)), ids=list(TRIPS))
def test_trips_of_a_loop(listing, i):
    trips = [list(TRIPS.values())[i](t, PARAMETERS) for t in range(THREADS * BLOCKS)]
    assert len(set(trips)) > 1 and min(trips) >= 0
    # a warp stores until its last lane has left
    warps = [max(trips[first : first + 32]) for first in range(0, len(trips), 32)]
    assert by_opcode(run(listing, f"round{i}"), "STG") == (sum(warps), sum(trips))


def test_one_trip_more_is_the_loop_once_more(text, listing):
    """Its instructions are those from the label to the branch back to it."""
    [name] = [f"round{i}" for i, trips in enumerate(TRIPS) if trips.startswith("min(t, 9)")]
    counts = [run(listing, name, 1, 32, d=d).issued.sum() for d in (1, 2)]
    section = text[text.index(f".section\t.text.{name},") :]
    section = section[: section.index("EXIT", section.index("STG"))]
    [(label, _)] = re.findall(r"^(\.L_x_\d+):\n((?:(?!\.L_x).*\n)*?.*STG.*\n)", section, re.MULTILINE)
    loop = section[section.index(f"\n{label}:") :]
    loop = loop[: loop.index("\n", loop.index(f"BRA `({label})"))]
    assert counts[1] - counts[0] == len(re.findall(r"^\s+/\*[0-9a-f]{4}\*/", loop, re.MULTILINE))


def stores_by_place(found):
    """Index in p.out -> how often a warp stored there."""
    stores = {}
    for one, count in zip(found.kernel.instructions, found.issued, strict=True):
        if one.base == "STG":
            place = int(one.operands[0].value) // 4
            stores[place] = stores.get(place, 0) + count
    return stores


def warps_of_all():
    every = range(THREADS * BLOCKS)
    return [every[first : first + 32] for first in range(0, len(every), 32)]


def test_parts_of_a_warp_join_without_those_that_left(listing):
    found, warps = run(listing, "leaving"), warps_of_all()
    odd = sum(max(t % 3 for t in warp if t % 2) for warp in warps)
    assert stores_by_place(found) == {1: odd, 2: len(warps), 3: len(warps)}


def test_parts_of_a_warp_join_again(listing):
    stores, warps = stores_by_place(run(listing, "divergence")), warps_of_all()
    odd = sum(max(t % 3 for t in warp if t % 2) for warp in warps)
    even = sum(max(t % 5 for t in warp if t % 2 == 0) for warp in warps)
    assert stores.pop(1) == odd and stores.pop(3) == even and stores.pop(5) == len(warps)
    [inner] = stores.values()
    assert 0 < inner <= even


def test_a_false_guard_takes_a_slot(listing):
    found = run(listing, "guarded", threads=64)
    guarded = [one for one in found.kernel.instructions if one.base == "STG" and one.guard]
    if not guarded:
        pytest.skip("this nvcc branches around the store")
    assert by_opcode(found, "STG")[0] == 2 * 2 * BLOCKS


@pytest.mark.parametrize("stride", [0, 1, 2, 3, 4, 8, 32])
def test_bank_conflicts(listing, stride):
    found = run(listing, "shared", 1, 32, u=stride)
    took = {}
    for one, count in zip(found.kernel.instructions, found.wavefronts, strict=True):
        if one.base in ("STS", "LDS"):
            took[one.opcode] = count
    # lanes whose words are 32 / gcd apart share a bank
    conflicts = math.gcd(stride, 32) if stride else 1
    # of 16 bytes, eight lanes at a time: 4 * stride words apart
    wide = 4 * max(1, 8 // (32 // math.gcd(4 * stride, 32))) if stride else 1
    assert took == {"STS": conflicts, "LDS": 1, "LDS.128": wide}


@pytest.mark.parametrize(("stride", "wavefronts"), [(1, 2), (2, 4), (3, 2), (8, 16)])
def test_bank_conflicts_of_matrices(listing, stride, wavefronts):
    """Two of eight rows of 16 bytes, whose addresses the first sixteen lanes have."""
    found = run(listing, "matrices", 1, 32, u=stride)
    each = zip(found.kernel.instructions, found.wavefronts, strict=True)
    assert [count for one, count in each if one.base == "LDSM"] == [wavefronts]


@pytest.mark.parametrize(("stride", "lines"), [(1, 4), (2, 8), (8, 32)])
def test_copies_to_shared_memory(listing, stride, lines):
    """Lines of global memory, and four wavefronts."""
    found = run(listing, "copy", 1, 32, u=stride)
    each = zip(found.kernel.instructions, found.wavefronts, strict=True)
    assert [count for one, count in each if one.base == "LDGSTS"] == [lines + 4]


def test_wavefronts_of_half_words_and_of_lanes_left_out():
    import numpy as np

    lanes = np.ones((1, 32), bool)
    addresses = np.arange(32, dtype=np.uint64)[None] * np.uint64(2)
    assert [int(each[0]) for each in memory.shared_wavefronts(addresses, lanes, 2)] == [1, 1]
    assert [int(each[0]) for each in memory.shared_wavefronts(addresses * np.uint64(64), lanes, 2)] == [32, 1]
    lanes[:, 4:] = False
    assert [int(each[0]) for each in memory.shared_wavefronts(addresses * np.uint64(64), lanes, 2)] == [4, 1]
    assert [int(each[0]) for each in memory.shared_wavefronts(addresses, ~lanes & lanes, 2)] == [0, 0]
    assert memory.distinct(addresses * np.uint64(64), lanes, 2, 128).tolist() == [4]
    assert memory.distinct(addresses * np.uint64(16), lanes, 2, 32).tolist() == [4]


def test_slow_paths_are_not_taken(listing):
    found = run(listing, "slow_path", 1, 32)
    assert found.kernel.subroutines and by_opcode(found, "CALL") == (0, 0)
    assert by_opcode(found, "STG")[0] == 1


def test_what_a_block_looks_for_together_is_not_there(listing):
    found = run(listing, "whole_block", 1, 64)
    # each of two warps stores once, and does not come to what follows
    assert (by_opcode(found, "STG")[0], by_opcode(found, "LDG")[0]) == (2, 2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("R51, R51, 0xffffffef, RZ, 0xc0, !PT", True),
        ("R51, R50, 0xffffffef, RZ, 0xc0, !PT", False),
        ("R51, R51, 0xffffffee, RZ, 0xc0, !PT", False),
        ("R51, R51, 0x10, RZ, 0xfc, !PT", False),
        ("R51, R51, R3, RZ, 0xc0, !PT", False),
        ("P5, RZ, R51, 0xffffffef, RZ, 0xc0, !PT", False),
    ],
)
def test_a_register_of_flags(text, expected):
    operands = tuple(code.operand(part) for part in code.split_operands(text))
    one = code.Instruction(0, None, "LOP3.LUT", operands, (), ("", 0), text)
    assert steps.clears_a_flag(one) == expected


def test_a_loop_on_data_is_an_error(listing):
    with pytest.raises(SassError, match=r"loop_on_data at 0x\w+: @!?P\d BRA .*: depends on data"):
        run(listing, "loop_on_data")


def test_an_unknown_opcode_is_an_error(text):
    with pytest.raises(SassError, match=r"round0 at 0x\w+: QMAD.*not interpreted"):
        run(code.parse(re.sub(r"\bIMAD\b", "QMAD", text)), "round0")
    unknown = code.parse(re.sub(r"\bSTG\b", "QTG", text)).kernel("guarded")
    launch = profile.Launch("guarded", (1, 1, 1), (32, 1, 1), 0, packed())
    with pytest.raises(SassError, match=r"guarded at 0x\w+: .*QTG.* in no class"):
        profile.profiled(unknown, launch)


def test_parameters_of_another_size_are_an_error(listing):
    with pytest.raises(SassError, match="64 bytes of parameters, recorded were 4"):
        machine.Machine(listing.kernel("guarded"), (1, 1, 1), (32, 1, 1), bytes(4), [(0, 0, 0)])


def test_a_profile_counts_what_was_interpreted(listing):
    """Once by class and once by unit; blocks that are not interpreted count as those that are."""
    launch = profile.Launch("copy", (1000, 1, 1), (32, 1, 1), 0, packed(u=1))
    work = profile.profiled(listing.kernel("copy"), launch).work
    alone = run(listing, "copy", 1, 32, u=1).issued.sum()
    assert work.instructions == work.cycles["issue"] == pytest.approx(1000 * alone)
    assert work.issued["global"] == 1000 and work.cycles["lsu"] == 4 * 8 * 1000
    assert work.multiprocessors == 132


def test_names():
    forward = "_ZN7rfdarts4cuda19conv_forward_kernelI13__nv_bfloat16Li1EEEvNS0_11ConvForwardIT_EE"
    assert profile.function_name(forward) == "conv_forward_kernel" and profile.same_name(forward) == forward
    ours = "_ZN7rfdarts4cuda12_GLOBAL__N_127update_kernelIfEEv"
    theirs = "_ZN7rfdarts4cuda39_GLOBAL__N__fba9bcd2_7_cell_cu_52d2d70427update_kernelIfEEv"
    assert profile.same_name(theirs) == ours


def test_samples_reach_both_ends_and_every_row():
    assert profile.sample((5, 2, 1), 24) == [(x, y, 0) for y in range(2) for x in range(5)]
    found = profile.sample((1000, 10, 1), 24)
    assert {y for _, y, _ in found} == set(range(10))
    for row in range(10):
        columns = [x for x, y, _ in found if y == row]
        assert columns[0] == 0 and columns[-1] == 999 and len(columns) == 3


def test_issue_slots_of_a_full_device():
    """132 multiprocessors x 4 schedulers x 1.98 GHz; fewer blocks use fewer."""
    work = pipes.Work({"alu": 1e6}, {"issue": 1e6, "alu": 2e6}, 132)
    assert work.seconds("issue") == pytest.approx(1e6 / (132 * 4 * 1.98e9)) and work.binding == "alu"
    few = work._replace(multiprocessors=66)
    assert pipes.added([work, few]).seconds("issue") == pytest.approx(3 * work.seconds("issue"))
