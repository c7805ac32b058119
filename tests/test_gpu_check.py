"""The course of `make gpu-check`, rehearsed with a device that crashes, hangs and fails, and without one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check, gpu_stages, gpu_steps
from benchmarks.gpu_check import Stage, check

ROOT = Path(__file__).resolve().parent.parent
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")


def fake(name, code, **options):
    """A stage that does what a GPU's would: `figures` writes a row of steps, `os` and `time` are there."""
    head = (
        "import json, os, signal, subprocess, sys, time\n"
        "def figures(**row):\n"
        "    case = dict(network='RF', batch=64)\n"
        "    open(sys.argv[1], 'w').write(json.dumps({'steps': [{**case, **row}]}))\n"
    )
    return Stage(name, (sys.executable, "-u", "-c", head + code, "{json}"), **{"limit": 20, **options})


# the grandchild outlives its parent unless the whole group is killed
HANG = (
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    "print('child', child.pid)\n"
    "time.sleep(600)"
)
CRASH = "figures(variant='eager', ms=3.0)\nos.kill(os.getpid(), signal.SIGSEGV)"
FAIL = (
    "print('RuntimeError: CUDA error: an illegal memory access was encountered')\n"
    "print(''.join(f'line {i}\\n' for i in range(5000)))\nsys.exit(1)"
)


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """A check of which most goes wrong: folder, exit status, seconds."""
    folder, began = tmp_path_factory.mktemp("check") / "out", time.monotonic()
    stages = [
        fake("steps kernels", "figures(variant='kernels', ms=1.5)\nprint('fine')"),
        fake("steps eager", CRASH),
        fake("tests", FAIL),
        fake("racecheck", HANG, limit=8),
        fake("kernels", "open(sys.argv[1], 'w').write('{\"steps\": [')"),
        Stage("memcheck", ("/nowhere/compute-sanitizer",), 20),
        fake("last", "print('fine')"),
        fake("largest", "print('fine')", limit=10**4, least=10**4),
    ]
    return folder, check(stages, folder, 120), time.monotonic() - began


def test_every_outcome_is_told(rehearsed):
    folder, status, seconds = rehearsed
    outcomes = json.loads((folder / "summary.json").read_text())
    assert status == 1 and seconds < 120
    assert {name: outcome["state"] for name, outcome in outcomes.items()} == {
        "steps kernels": "passed",
        "steps eager": "failed",
        "tests": "failed",
        "racecheck": "stopped",
        "kernels": "failed",
        "memcheck": "failed",
        "last": "passed",
        "largest": "left out",
    }
    assert outcomes["steps eager"]["exit"] == -11
    assert "kernels.json" in outcomes["kernels"]["why"]
    assert "No such file" in outcomes["memcheck"]["why"]


def test_a_failure_takes_no_figures_with_it(rehearsed):
    folder, _, _ = rehearsed
    for name in ("steps-kernels", "steps-eager", "tests", "racecheck", "memcheck", "last"):
        assert isinstance(json.loads((folder / f"{name}.json").read_text()), dict)
    outcomes = json.loads((folder / "summary.json").read_text())
    assert outcomes["steps eager"]["figures"]["steps"][0]["ms"] == 3.0
    text = (folder / "summary.md").read_text()
    assert "| RF | 64 | 1.5 | 3.0 | 2.00 |" in text


def test_the_first_error_is_told_and_the_whole_log_kept(rehearsed):
    folder, _, _ = rehearsed
    text = (folder / "summary.md").read_text()
    assert "**tests** failed" in text and "an illegal memory access was encountered" in text
    assert len(text.splitlines()) < 60
    assert "line 4999" in (folder / "tests.log").read_text()


def test_what_hangs_is_killed_with_its_children(rehearsed):
    folder, _, _ = rehearsed
    child = int((folder / "racecheck.log").read_text().split()[1])
    for _ in range(100):
        # a zombie is gone too
        if not Path(f"/proc/{child}").exists() or " Z " in Path(f"/proc/{child}/stat").read_text():
            return
        time.sleep(0.05)
    pytest.fail("the child still runs")


def test_a_process_that_cannot_be_killed_is_left(monkeypatch, tmp_path):
    """As one that hangs in its driver."""
    monkeypatch.setattr(gpu_check, "PATIENCE", 0.2)
    left, kill = [], os.killpg
    monkeypatch.setattr(os, "killpg", lambda group, _: left.append(group))
    stage = fake("hang", "time.sleep(600)", limit=1)
    began = time.monotonic()
    assert check([stage, fake("next", "pass")], tmp_path, 30) == 1
    # it hangs for 600 s, and so would whoever waited for it
    assert time.monotonic() - began < 120
    kill(left[0], signal.SIGKILL)
    assert json.loads((tmp_path / "summary.json").read_text())["next"]["state"] == "passed"


def test_time_runs_out(tmp_path, monkeypatch):
    """However long the stages might take."""
    monkeypatch.setattr(gpu_check, "PATIENCE", 1)
    began = time.monotonic()
    assert check([fake(name, HANG, limit=600, least=2) for name in "abc"], tmp_path, 6) == 1
    # of 1,800 s
    assert time.monotonic() - began < 120
    states = [outcome["state"] for outcome in json.loads((tmp_path / "summary.json").read_text()).values()]
    assert states == ["stopped", "left out", "left out"]


def test_statuses(tmp_path):
    good, late = fake("good", "pass"), fake("late", "pass", limit=10**4, least=10**4)
    assert check([good], tmp_path, 60) == 0
    assert check([good, late], tmp_path, 60) == 2
    assert check([fake("machine", "sys.exit(1)", needed=True), good], tmp_path, 60) == 3
    assert list(json.loads((tmp_path / "summary.json").read_text())) == ["machine"]


@without_gpu
def test_a_machine_without_a_gpu_says_so(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--out", str(tmp_path / "out"), "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "machine: failed" in done.stdout and "there is no CUDA device" in done.stdout


@pytest.mark.parametrize("quick", [False, True])
def test_the_stages(quick):
    stages = gpu_stages.stages("cuda", quick)
    names = [stage.name for stage in stages]
    assert len({stage.file_name for stage in stages}) == len(names)
    # figures come before what takes long
    assert max(i for i, name in enumerate(names) if name.startswith("steps")) < names.index("memcheck")
    checked = {"memcheck"} if quick else {"memcheck", "racecheck", "synccheck", "initcheck"}
    assert checked <= {*names}
    for stage in stages:
        if stage.name in checked:
            assert stage.environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    assert all(stage.least <= stage.limit for stage in stages)


def test_a_summary_of_errors():
    """What failed has no number to show."""
    steps = [{"network": "RF", "batch": 64, "variant": "kernels", "error": "out of memory"}]
    largest = [{"network": "RF", "variant": "kernels", "error": "RuntimeError: CUDA error"}]
    figures = {"machine": {"error": "x"}, "steps": steps, "largest": largest}
    text = gpu_check.summary({"a": {"state": "failed", "figures": figures}}, 1.0)
    assert "| RF | 64 | out of memory |  |" in text
    assert "- largest batch, RF, kernels: RuntimeError: CUDA error" in text


def test_the_commands_are_understood(monkeypatch, tmp_path):
    measured = []
    monkeypatch.setattr(gpu_steps, "measure", lambda options, _: measured.append(options.what))
    monkeypatch.setattr(gpu_steps, "small_case", lambda: measured.append("small-case"))
    monkeypatch.setattr(gpu_steps, "build", lambda: measured.append("build"))
    for quick in (False, True):
        for stage in gpu_stages.stages("cuda", quick):
            command = [*stage.command]
            if "benchmarks.gpu_steps" in command:
                assert gpu_steps.main(command[command.index("benchmarks.gpu_steps") + 1 :]) == 0
    assert {*measured} == {"machine", "build", "smoke", "steps", "kernels", "small-case", "largest"}


@pytest.mark.slow
@pytest.mark.parametrize("selection", [gpu_stages.GPU_TESTS, gpu_stages.QUICK_TESTS, gpu_stages.TRITON_TESTS])
def test_the_tests_that_it_runs_exist(selection):
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", *selection]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout


def test_figures_are_written_as_they_come(tmp_path):
    figures = gpu_steps.Figures(tmp_path / "a.json")
    figures.add("steps", lambda: {"ms": 1.0}, variant="kernels")

    def fail():
        raise RuntimeError("CUDA error: misaligned address\nmore")

    figures.add("steps", fail, variant="kernels graph")
    assert figures.failed
    assert json.loads((tmp_path / "a.json").read_text()) == {
        "steps": [
            {"variant": "kernels", "ms": 1.0},
            {"variant": "kernels graph", "error": "RuntimeError: CUDA error: misaligned address"},
        ]
    }


def test_the_largest_batch_survives_lack_of_memory(monkeypatch):
    """The error is torch's own, whichever backend ran out of memory."""
    tried = []

    def make_step(name, variant, batch, device):
        def step():
            tried.append(batch)
            if batch > 700:
                raise torch.OutOfMemoryError("CUDA out of memory: 9 numbers of float32 do not fit")

        return step

    monkeypatch.setattr(gpu_steps, "make_step", make_step)
    monkeypatch.setattr(gpu_steps, "wait", lambda device: None)
    assert gpu_steps.largest_batch("RF-PCDARTS", "kernels", "cpu") == {"batch": 682}
    assert tried[:4] == [128, 256, 512, 1024]
    assert gpu_steps.largest_batch("RF-PCDARTS", "kernels", "cpu", least=2048) == {"batch": 0}


@pytest.mark.slow
def test_steps_on_the_cpu(tmp_path):
    """The real commands, of two small supernets."""
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "steps-RF-DARTS.json").read_text())["steps"]
    assert [row["variant"] for row in rows] == [*gpu_stages.KERNELS, *gpu_stages.EAGER]
    assert all(row["ms"] > 0 for row in rows)
