"""nvcc compiles every kernel without spilling a register. Needs no GPU."""

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from rfdarts_fast.ops import backends
from tests.kernels.emulation import CSRC, find_nvcc, resource_usage, setup_options

STRICT = ["-Xptxas", "-warn-spills,-warn-lmem-usage,-Werror", "-Werror", "all-warnings"]
ARCHS = ("80", "90", "100", "120")


@pytest.fixture(scope="module")
def nvcc():
    found = find_nvcc()
    if found is None:
        pytest.skip("needs nvcc to compile the CUDA kernels")
    return found


def test_built_kernels_do_not_spill():
    if not backends()["cuda"].status()["built"]:
        pytest.skip("needs the CUDA kernels built")
    used = resource_usage()
    if used is None:
        pytest.skip("needs cuobjdump, of a CUDA toolkit or of triton")
    built = str(backends()["cuda"].status()["archs"]).replace("+PTX", "").replace(".", "").split()
    assert set(used) == {f"sm_{arch}" for arch in built}
    written = "".join(path.read_text() for path in (CSRC / "cuda").iterdir())
    names = set(re.findall(r"(\w+_kernel)\(const __grid_constant__", written))
    assert len(names) == written.count("__global__ void")
    for arch, kernels in used.items():
        assert all(any(name in symbol for symbol in kernels) for name in names), arch
        spilled = {name: usage for name, usage in kernels.items() if usage["STACK"] or usage["LOCAL"]}
        assert not spilled, arch


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_compile_without_spills(nvcc, tmp_path, arch):
    def compile_one(source):
        target = tmp_path / (source.replace("/", "_") + ".cubin")
        command = [str(nvcc), "-std=c++20", "-O3", f"-arch=sm_{arch}", f"-I{CSRC}"]
        command += [*STRICT, "-cubin", str(CSRC / source), "-o", str(target)]
        return subprocess.run(command, capture_output=True, text=True)

    with ThreadPoolExecutor(2) as pool:
        for result in pool.map(compile_one, (CSRC / "sources_cuda.txt").read_text().split()):
            assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("known", "asked", "expected"),
    [
        ("75 80 90 100 103 120", "", "8.0 9.0 10.0 12.0+PTX"),
        # of a toolkit before 12.8
        ("75 80 86 89 90", "", "8.0 9.0+PTX"),
        ("", "8.6;9.0a", "8.6 9.0a"),
    ],
)
def test_architectures_are_those_that_nvcc_knows(monkeypatch, known, asked, expected):
    options = setup_options()
    text = "\n".join(f"compute_{number}" for number in known.split())
    done = subprocess.CompletedProcess([], 0, stdout=text)
    monkeypatch.setattr(options.subprocess, "run", lambda *_, **__: done)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    assert options.archs() == expected.split()


SPILL = (
    "__global__ void __launch_bounds__(1024) spill(float* x) {\n"
    "  float v[96];\n#pragma unroll\n  for (int i = 0; i < 96; i++) v[i] = x[i * 1024 + threadIdx.x];\n"
    "  __syncthreads();\n#pragma unroll\n  for (int i = 0; i < 96; i++)\n"
    "    x[i * 1024 + threadIdx.x] = v[95 - i];\n}\n"
)


def test_both_gates_see_a_spill(nvcc, tmp_path):
    source, target = tmp_path / "spill.cu", tmp_path / "spill.o"
    source.write_text(SPILL)
    command = [str(nvcc), "-arch=sm_90", "-c", str(source), "-o", str(target)]
    result = subprocess.run([*command, *STRICT], capture_output=True, text=True)
    assert result.returncode != 0 and "spill" in result.stderr
    subprocess.run(command, check=True)
    used = resource_usage(target)
    if used is not None:
        [usage] = used["sm_90"].values()
        assert usage["STACK"] > 0
