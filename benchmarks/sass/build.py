"""What is compiled from a csrc folder, once while its files stay as they are: cubins and the emulation."""

from __future__ import annotations

import hashlib
import shutil
import struct
import tempfile
from pathlib import Path

from benchmarks.sass.code import Kernel, Listing, SassError, compile_cubin, disassemble
from benchmarks.sass.lanes import Size
from benchmarks.sass.profile import Launch, same_name
from tests.kernels import emulation

# of bfloat16, and those of every type
SOURCES = ("cell_bf16.cu", "cell.cu", "relu_conv_bn.cu")
CACHE = Path(__file__).resolve().parents[2] / "build" / "cuda_predicted"


class Build:
    """Of emulation.CSRC. Raises SassError without nvcc or nvdisasm."""

    def __init__(self) -> None:
        nvcc = emulation.find_nvcc()
        nvdisasm = emulation.find_tool("nvdisasm")
        if nvcc is None or nvdisasm is None:
            raise SassError("no nvcc and nvdisasm: the instructions of sm_90 cannot be counted")
        self.nvcc, self.nvdisasm = nvcc, nvdisasm
        digest = hashlib.sha256()
        for path in sorted(emulation.CSRC.rglob("*.*")):
            if path.suffix in (".cu", ".h", ".cpp", ".txt"):
                digest.update(str(path.relative_to(emulation.CSRC)).encode() + b"\0" + path.read_bytes())
        self.folder = CACHE / digest.hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.listings: dict[str, dict[str, tuple[Listing, str]]] = {}
        self.read: dict[str, Kernel] = {}

    def emulated(self) -> Path:
        """The library; in place only once it is whole."""
        library = self.folder / emulation.LIBRARY
        if not library.exists():
            with tempfile.TemporaryDirectory(dir=self.folder) as folder:
                shutil.move(emulation.build(Path(folder)), library)
        return library

    def cubin(self, source: str) -> Path:
        cubin = self.folder / f"{source}.cubin"
        if not cubin.exists():
            with tempfile.TemporaryDirectory(dir=self.folder) as folder:
                target = Path(folder) / "cubin"
                compile_cubin(self.nvcc, emulation.CSRC / "cuda" / source, emulation.CSRC, target)
                shutil.move(target, cubin)
        return cubin

    def kernel(self, name: str) -> Kernel:
        """By its mangled name, as in `Launch.kernel`; what nobody asks for is neither compiled nor read."""
        for source in SOURCES:
            if source not in self.listings:
                listing = disassemble(self.nvdisasm, self.cubin(source))
                self.listings[source] = {same_name(one): (listing, one) for one in listing.sections}
            if name in self.listings[source]:
                if name not in self.read:
                    listing, original = self.listings[source][name]
                    self.read[name] = listing.kernel(original)
                return self.read[name]
        raise SassError(f"{name} is in none of {', '.join(SOURCES)}")


def three(text: str) -> Size:
    x, y, z = map(int, text.split())
    return x, y, z


def launches(text: str, symbols: dict[int, str]) -> list[Launch]:
    """Of what the emulation's `recorded` returns and the library's symbols: address -> mangled name."""
    found = []
    for line in text.splitlines():
        fields = line.split(" | ")
        if len(fields) != 7:
            raise SassError(
                "the emulation of this csrc does not record grids and parameters: merge csrc/emulation"
            )
        _, _, shared, place, grid, threads, params = fields
        sizes = three(grid), three(threads)
        found.append(Launch(symbols[int(place)], *sizes, int(shared), bytes.fromhex(params)))
    return found


def symbols(library: Path) -> dict[int, str]:
    """Address -> mangled name of every function of a library, hidden ones too: its ELF symbol table."""
    data = library.read_bytes()
    section_offset, entry, count = (
        *struct.unpack_from("<Q", data, 0x28),
        *struct.unpack_from("<HH", data, 0x3A),
    )
    headers = [struct.unpack_from("<IIQQQQIIQQ", data, section_offset + i * entry) for i in range(count)]
    found = {}
    for _, kind, _, _, offset, size, link, _, _, each in headers:
        # SHT_SYMTAB
        if kind != 2:
            continue
        names = headers[link][4]
        for at in range(offset, offset + size, each):
            name, info, _, _, value, _ = struct.unpack_from("<IBBHQQ", data, at)
            # STT_FUNC
            if info & 15 == 2:
                begin = names + name
                found[value] = data[begin : data.index(b"\0", begin)].decode()
    return found
