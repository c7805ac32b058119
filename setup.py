"""Builds the compiled kernels beside the Python package; everything else is in pyproject.toml.

RFDARTS_BUILD_CPU, RFDARTS_BUILD_CUDA and RFDARTS_BUILD_HARNESS (the CPU kernels one by one, for tests)
decide: `auto` (default) builds them where torch and the compilers are, and says what is missing where not;
`required` fails instead; `off` does not try. The package works without them. CUDA kernels are built
wherever nvcc is, whatever torch's own build, for the architectures of TORCH_CUDA_ARCH_LIST or those below.
A wheel for every Python needs the harness off: pybind11 builds for one.
"""

import functools
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup

CSRC = Path("csrc")
CPU, CUDA, HARNESS = "rfdarts_fast.ops._C", "rfdarts_fast.ops._cuda", "rfdarts_fast.ops._kernels"
VARIABLES = {CPU: "RFDARTS_BUILD_CPU", CUDA: "RFDARTS_BUILD_CUDA", HARNESS: "RFDARTS_BUILD_HARNESS"}
# one binary for every torch from 2.11 and every Python from 3.10 on
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"]
# no debugging symbols: they are most of what the compiler would write
FLAGS = ["-std=c++20", "-fvisibility=hidden", "-Wall", "-Wno-psabi", "-g0"]
CPU_FLAGS = ["-O2", "-fvect-cost-model=dynamic", "-ffp-contract=fast"]
# A100, whose code 8.6 and 8.9 run too (RTX 30 and 40, A10, L4, L40); H100; B200; RTX 50. The last one also as
# PTX, for what comes after
ARCHS = "8.0 9.0 10.0 12.0"


def missing() -> str | None:
    """What keeps any kernels from being built here, or None."""
    if platform.system() != "Linux":
        return f"they are built on Linux only, this is {platform.system()}"
    try:
        import torch
    except ImportError:
        return "torch is not installed; install torch>=2.11 first, then `pip install --no-build-isolation .`"
    if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 11):
        return f"torch {torch.__version__} is too old, they need 2.11"
    compiler = os.environ.get("CXX", "g++").split()[0]
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler ({compiler})"
    return None


def find_nvcc() -> Path | None:
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    on_path = shutil.which("nvcc")
    candidates = [Path(home, "bin", "nvcc") for home in homes if home]
    candidates += [Path(on_path)] if on_path else []
    for path in [*candidates, Path("/usr/local/cuda/bin/nvcc")]:
        # a wrapper elsewhere on PATH has no toolkit around it
        if path.is_file() and (path.resolve().parents[1] / "include" / "cuda_runtime.h").is_file():
            return path.resolve()
    return None


def cuda_missing() -> str | None:
    nvcc = find_nvcc()
    if nvcc is None:
        return "there is no nvcc (looked at CUDA_HOME, CUDA_PATH, PATH and /usr/local/cuda)"
    if not any((nvcc.parent.parent / lib / "libcudart_static.a").is_file() for lib in ("lib64", "lib")):
        return f"there is no libcudart_static.a beside {nvcc}"
    return None


def harness_missing(cpu: bool) -> str | None:
    if not cpu:
        return "the CPU kernels are not built"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    return None


@functools.cache
def archs() -> list[str]:
    """Entries such as 9.0, 9.0a or 10.0+PTX: those that were asked for, or of ARCHS those that nvcc knows."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if not asked:
        command = [str(find_nvcc()), "--list-gpu-arch"]
        known = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        asked = " ".join(arch for arch in ARCHS.split() if f"compute_{arch.replace('.', '')}" in known)
        asked += "+PTX"
    entries = re.split(r"[;, ]+", asked)
    for entry in entries:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", entry):
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: expected entries such as 9.0 or 10.0+PTX, got {entry!r}")
    return entries


def gencode() -> list[str]:
    flags = []
    for entry in archs():
        number = entry.removesuffix("+PTX").replace(".", "")
        code = f"[sm_{number},compute_{number}]" if entry.endswith("+PTX") else f"sm_{number}"
        flags += ["-gencode", f"arch=compute_{number},code={code}"]
    return flags


def compile_kernels() -> list[str]:
    """Object files of all .cu files, compiled anew where a source or header has changed."""
    # not pip's temporary folder: it would take minutes at every change of any other file
    folder = Path("build/cuda").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    headers = [*CSRC.glob("cuda/*.h"), *CSRC.glob("core/*.h")]
    changed = max(path.stat().st_mtime for path in headers)
    common = [str(find_nvcc()), "-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", *gencode()]
    common += [f"-I{CSRC}"]
    key = folder / "command"
    if not key.is_file() or key.read_text() != " ".join(common):
        changed = float("inf")

    def compile_one(line: str) -> str:
        source, target = CSRC / line, folder / (Path(line).stem + ".o")
        if not target.is_file() or target.stat().st_mtime < max(changed, source.stat().st_mtime):
            part = target.with_suffix(".part")
            subprocess.run([*common, "-c", str(source), "-o", str(part)], check=True)
            part.replace(target)
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, (CSRC / "sources_cuda.txt").read_text().split()))
    key.write_text(" ".join(common))
    return objects


def wanted(name: str, reason: str | None) -> bool:
    """Whether to build an extension that `reason` keeps from being built, if it is not None."""
    variable = VARIABLES[name]
    option = os.environ.get(variable, "auto")
    if option not in ("auto", "required", "off"):
        raise SystemExit(f"{variable}: expected auto, required or off, got {option!r}")
    if option == "off":
        return False
    if reason is not None:
        if option == "required":
            raise SystemExit(f"rfdarts_fast: cannot build {name}: {reason}")
        print(f"rfdarts_fast: building without {name}: {reason}", file=sys.stderr)
    return reason is None


def build_options() -> dict:
    reason = missing()
    cpu, cuda = wanted(CPU, reason), wanted(CUDA, reason or cuda_missing())
    harness = wanted(HARNESS, reason or harness_missing(cpu))
    if not cpu and not cuda:
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class Build(BuildExtension):
        def build_extension(self, ext) -> None:
            try:
                if ext.name == CUDA:
                    ext.extra_objects += compile_kernels()
                if ext.name == HARNESS:
                    # compiled a moment ago, for the ops
                    objects = [Path(self.build_temp, CSRC, source).with_suffix(".o") for source in kernels]
                    ext.extra_objects += [str(path) for path in objects]
                super().build_extension(ext)
            except Exception as error:
                if os.environ.get(VARIABLES[ext.name]) == "required":
                    raise
                print(f"rfdarts_fast: {ext.name} failed to build: {error}", file=sys.stderr)

    def extension(name: str, sources: list[str], flags: list[str], **options):
        found = CppExtension(
            name,
            [str(CSRC / source) for source in sources],
            extra_compile_args={"cxx": FLAGS + STABLE_ABI + flags},
            py_limited_api=True,
            **options,
        )
        # a failed build leaves it out
        found.optional = True
        return found

    include = str(CSRC.resolve())
    sources = (CSRC / "sources.txt").read_text().split()
    kernels = [source for source in sources if Path(source).name.startswith("isa")]
    extensions = []
    if cpu:
        extensions.append(extension(CPU, sources, CPU_FLAGS, include_dirs=[include]))
    if harness:
        import pybind11

        found = Extension(
            HARNESS,
            [str(CSRC / "bindings/harness.cpp"), str(CSRC / "emulation/avx512_bf16.cpp")],
            include_dirs=[include, pybind11.get_include()],
            extra_compile_args={"cxx": [*FLAGS, *CPU_FLAGS]},
            language="c++",
        )
        found.optional = True
        extensions.append(found)
    if cuda:
        home = find_nvcc().parent.parent
        # one library for a torch with CUDA and without: the runtime inside, what torch lacks unresolved
        link = ["-Wl,--no-as-needed", "-ltorch", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        extensions.append(
            extension(
                CUDA,
                ["bindings/cuda.cpp", "core/cell.cpp"],
                ["-O2", f'-DRFDARTS_CUDA_ARCHS="{" ".join(archs())}"'],
                include_dirs=[include, str(home / "include")],
                library_dirs=[str(home / "lib64"), str(home / "lib")],
                extra_link_args=link,
            )
        )
    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": Build},
        "options": {} if harness else {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


if __name__ == "__main__":
    setup(**build_options())
