"""Warp instructions of CUDA kernels, counted without a GPU: the compiled code of sm_90 as nvdisasm prints it,
its integer and control instructions interpreted with the parameters that the emulation records for each
launch."""

from benchmarks.sass.build import Build, launches, symbols
from benchmarks.sass.code import SassError
from benchmarks.sass.pipes import Work, added
from benchmarks.sass.profile import BLOCKS, Launch, Profile, profiled
from benchmarks.sass.report import doubts, kernel_report, table

__all__ = [
    "BLOCKS",
    "Build",
    "Launch",
    "Profile",
    "SassError",
    "Work",
    "added",
    "doubts",
    "kernel_report",
    "launches",
    "profiled",
    "symbols",
    "table",
]
