"""nvcc compiles every kernel without spilling a register. Needs no GPU."""

import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.cuda.emulated import CSRC, find_nvcc

STRICT = ["-Xptxas", "-warn-spills,-warn-lmem-usage,-Werror", "-Werror", "all-warnings"]


@pytest.fixture(scope="module")
def nvcc():
    found = find_nvcc()
    if found is None:
        pytest.skip("needs nvcc to compile the CUDA kernels")
    return found


@pytest.mark.parametrize(
    "arch", [pytest.param("80", marks=pytest.mark.slow), "90", pytest.param("100", marks=pytest.mark.slow)]
)
def test_kernels_compile_without_spills(nvcc, tmp_path, arch):
    def compile_one(source):
        target = tmp_path / (source.replace("/", "_") + ".cubin")
        command = [str(nvcc), "-std=c++20", "-O3", f"-arch=sm_{arch}", f"-I{CSRC}", f"-I{CSRC / 'include'}"]
        command += [*STRICT, "-cubin", str(CSRC / source), "-o", str(target)]
        return subprocess.run(command, capture_output=True, text=True)

    with ThreadPoolExecutor(2) as pool:
        for result in pool.map(compile_one, (CSRC / "sources_cuda.txt").read_text().split()):
            assert result.returncode == 0, result.stderr


def test_the_gate_sees_a_spill(nvcc, tmp_path):
    source = tmp_path / "spill.cu"
    source.write_text(
        "__global__ void __launch_bounds__(1024) spill(float* x) {\n"
        "  float v[96];\n#pragma unroll\n  for (int i = 0; i < 96; i++) v[i] = x[i * 1024 + threadIdx.x];\n"
        "  __syncthreads();\n#pragma unroll\n  for (int i = 0; i < 96; i++)\n"
        "    x[i * 1024 + threadIdx.x] = v[95 - i];\n}\n"
    )
    command = [str(nvcc), "-arch=sm_90", *STRICT, "-cubin", str(source), "-o", str(tmp_path / "spill.cubin")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode != 0 and "spill" in result.stderr
