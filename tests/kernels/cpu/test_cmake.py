"""CMakeLists.txt, for other build systems, knows the sources of setup.py."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
def test_cmake_builds_what_setup_builds(tmp_path):
    subprocess.run(["cmake", "-S", ROOT, "-B", tmp_path], check=True, capture_output=True)
    commands = json.loads((tmp_path / "compile_commands.json").read_text())
    sources = (ROOT / "csrc/sources.txt").read_text().split()
    assert {Path(c["file"]) for c in commands} == {
        ROOT / "csrc" / source for source in sources if "bindings" not in source
    }
    # the smallest of them, for the others take minutes
    (command,) = [c for c in commands if c["file"].endswith("core/cell.cpp")]
    subprocess.run(command["command"], shell=True, cwd=command["directory"], check=True)
