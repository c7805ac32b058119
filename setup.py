"""Builds the compiled kernels beside the Python package; everything else is in pyproject.toml.

RFDARTS_BUILD_CPU decides: `auto` (default) builds them where torch and a compiler are, and says what is
missing where not; `required` fails instead; `off` does not try. The package works without them.
"""

import os
import platform
import shutil
import sys
from pathlib import Path

from setuptools import setup

SOURCES = Path("csrc/sources.txt")
# one binary for every torch from 2.11 and every Python from 3.10 on
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"]
FLAGS = [
    "-O2",
    # debugging symbols are most of what a compiler writes here
    "-g0",
    "-fvect-cost-model=dynamic",
    "-std=c++20",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-Wall",
    "-Wno-psabi",
]


def missing() -> str | None:
    """What keeps the kernels from being built here, or None."""
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


def build_options() -> dict:
    option = os.environ.get("RFDARTS_BUILD_CPU", "auto")
    if option not in ("auto", "required", "off"):
        raise SystemExit(f"RFDARTS_BUILD_CPU: expected auto, required or off, got {option!r}")
    if option == "off":
        return {}
    reason = missing()
    if reason is not None:
        if option == "required":
            raise SystemExit(f"rfdarts_fast: cannot build the compiled kernels: {reason}")
        print(f"rfdarts_fast: building without the compiled kernels: {reason}", file=sys.stderr)
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class Build(BuildExtension):
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                if option == "required":
                    raise
                print(f"rfdarts_fast: the compiled kernels failed to build: {error}", file=sys.stderr)
                self.extensions = []

    extension = CppExtension(
        "rfdarts_fast.ops._C",
        [f"csrc/{line}" for line in SOURCES.read_text().split()],
        include_dirs=[str(Path("csrc/include").resolve())],
        extra_compile_args={"cxx": FLAGS + STABLE_ABI},
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**build_options())
