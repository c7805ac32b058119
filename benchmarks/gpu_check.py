"""One command for a machine with a GPU: build, test, measure, sanitize, inside nine minutes whatever fails.

    python -m benchmarks.gpu_check [--out DIR] [--quick] [--only STAGE ...]

Each stage (gpu_stages.py) is a process with a time limit. DIR gets its whole output, NAME.log, its figures,
NAME.json, written as they come, and after every stage summary.json and summary.md, one page. What there is no
time for is left out and named. Exit status: 0 all stages passed, 1 one failed, 2 one was left out, 3 there is
no GPU, or nothing is built for it. `--quick` takes two minutes; `--device cpu` tries the script itself.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# whether a stage passed, and why not
PASSED, FAILED, STOPPED, LEFT_OUT = "passed", "failed", "stopped", "left out"
# seconds for a killed process to end; one that hangs in its driver never does
PATIENCE = 5
# what the line of a log that says most looks like, the most telling first
TELLING = [
    r"^========= (Invalid|Error|Program hit|.*(race|Race|uninitialized|Uninitialized|divergent|Barrier))",
    r"^E  +\S",
    r"^\w*(Error|Exception|Interrupt)\b.*",
    r"(?i)\b(error|failed|fatal)\b",
]


@dataclass(frozen=True)
class Stage:
    """A process of the check.

    Attributes:
        command: its arguments; `{json}` stands for the file that its figures go to.
        limit: seconds after which it is stopped.
        least: it is left out where fewer seconds are left.
        needed: without it no other stage has a meaning.
        environment: variables besides those that are there.
    """

    name: str
    command: Sequence[str]
    limit: float
    least: float = 10
    needed: bool = False
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def file_name(self) -> str:
        return re.sub(r"[^A-Za-z0-9=]+", "-", self.name).strip("-")


def write(path: Path, text: str) -> None:
    """Under another name first: whoever is killed meanwhile leaves what was there."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    part.replace(path)


def begin(command: Sequence[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """In a session of its own, so that `stop` reaches what it starts."""
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def stop(process: subprocess.Popen[bytes]) -> None:
    """Kills a process and what it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(PATIENCE)


def telling_line(log: Path) -> str:
    """The first line of a log that names an error, or else its last."""
    lines = [line.rstrip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    for pattern in TELLING:
        for line in lines:
            if re.search(pattern, line):
                return line[:300]
    return lines[-1][:300] if lines else "no output"


def run(stage: Stage, folder: Path, seconds: float) -> dict[str, Any]:
    """Runs a stage for at most so many seconds; returns its outcome and figures."""
    log, figures = folder / f"{stage.file_name}.log", folder / f"{stage.file_name}.json"
    log.unlink(missing_ok=True)
    figures.unlink(missing_ok=True)
    command = [str(figures) if part == "{json}" else part for part in stage.command]
    found: dict[str, Any] = {"state": FAILED, "command": command, "log": log.name, "limit": round(seconds)}
    began = time.monotonic()
    try:
        process = begin(command, log, stage.environment)
        try:
            found["exit"] = process.wait(seconds)
            found["state"] = FAILED if found["exit"] else PASSED
        except subprocess.TimeoutExpired:
            found["state"] = STOPPED
        finally:
            stop(process)
    except OSError as error:
        log.write_text(f"{error}\n")
    found["seconds"] = round(time.monotonic() - began, 1)
    if found["state"] != PASSED:
        found["why"] = telling_line(log)
    if figures.is_file():
        try:
            found["figures"] = json.loads(figures.read_text())
        except ValueError as error:
            found |= {"state": FAILED, "why": f"{figures.name}: {error}"}
    else:
        write(figures, json.dumps(found, indent=1) + "\n")
    return found


def check(stages: Sequence[Stage], folder: Path, seconds: float) -> int:
    """Runs the stages one after the other, within so many seconds; returns the exit status."""
    folder.mkdir(parents=True, exist_ok=True)
    began, outcomes = time.monotonic(), {}
    for stage in stages:
        # a process that has to be killed may take its time
        left = seconds - (time.monotonic() - began) - PATIENCE
        if left < min(stage.least, stage.limit):
            outcome = {"state": LEFT_OUT, "why": f"{max(left, 0):.0f} s were left"}
        else:
            outcome = run(stage, folder, min(stage.limit, left))
        outcomes[stage.name] = outcome
        write(folder / "summary.json", json.dumps(outcomes, indent=1) + "\n")
        write(folder / "summary.md", summary(outcomes, time.monotonic() - began))
        print(f"{stage.name}: {outcome['state']}{_reason(outcome)}", flush=True)
        if stage.needed and outcome["state"] != PASSED:
            return 3
    states = {outcome["state"] for outcome in outcomes.values()}
    return 1 if states & {FAILED, STOPPED} else 2 if LEFT_OUT in states else 0


def _reason(outcome: dict[str, Any]) -> str:
    seconds = f", {outcome['seconds']} s" if "seconds" in outcome else ""
    return seconds + (f": {outcome['why']}" if "why" in outcome else "")


def summary(outcomes: dict[str, dict[str, Any]], seconds: float) -> str:
    """One page: what failed and why, the machine, steps, largest batches, the stages."""
    bad = {name: outcome for name, outcome in outcomes.items() if outcome["state"] != PASSED}
    lines = [
        f"# GPU check: {len(outcomes) - len(bad)} of {len(outcomes)} stages passed in {seconds:.0f} s",
        "",
    ]
    lines += [f"- **{name}** {outcome['state']}{_reason(outcome)}" for name, outcome in bad.items()]
    figures = [outcome["figures"] for outcome in outcomes.values() if outcome.get("figures")]
    machine = next((f["machine"] for f in figures if "machine" in f), {})
    told = ("gpus", "memory_gib", "driver", "torch", "cuda", "triton", "commit")
    lines += ["", ", ".join(f"{name} {machine[name]}" for name in told if name in machine), ""]
    lines += step_table([row for f in figures for row in f.get("steps", [])])
    largest = [row for f in figures for row in f.get("largest", [])]
    lines += [
        f"- largest batch, {row['network']}, {row['variant']}: {row.get('batch', row.get('error'))}"
        for row in largest
    ]
    lines += ["", "| stage | | s | log |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {name} | {o['state']} | {o.get('seconds', '')} | {o.get('log', '')} |"
        for name, o in outcomes.items()
    ]
    return "\n".join(lines) + "\n"


def step_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each network and batch: ms of a step of each variant, and how many times faster the fastest
    of ours is than the faster eager layout."""
    cases: dict[tuple[str, int], dict[str, Any]] = {}
    for row in rows:
        cases.setdefault((row["network"], row["batch"]), {})[row["variant"]] = row.get(
            "ms", row.get("error", "")
        )
    if not cases:
        return []
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    header = ["ms a step", "batch", *variants, "times faster"]
    lines = ["| " + " | ".join(header) + " |", "| --- " * len(header) + "|"]
    for (network, batch), found in cases.items():
        times = {variant: value for variant, value in found.items() if isinstance(value, float)}
        eager = [ms for variant, ms in times.items() if variant.startswith("eager")]
        ours = [ms for variant, ms in times.items() if variant.startswith("kernels")]
        faster = f"{min(eager) / min(ours):.2f}" if eager and ours else ""
        row = [network, batch, *(found.get(variant, "") for variant in variants), faster]
        lines.append("| " + " | ".join(map(str, row)) + " |")
    return [*lines, ""]


def main() -> int:
    from benchmarks.gpu_stages import stages

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "runs/gpu_check", metavar="DIR")
    parser.add_argument("--quick", action="store_true", help="two minutes: what is most likely to break")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="stages whose names begin so")
    parser.add_argument("--seconds", type=float, help="for all stages; default 510, quick 115")
    parser.add_argument("--device", default="cuda", help="cpu: two cells, batch 2, no GPU stages")
    options = parser.parse_args()
    # so that what runs is stopped too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    chosen = stages(options.device, options.quick)
    if options.only:
        chosen = [s for s in chosen if s.needed or s.name.startswith(tuple(options.only))]
    seconds = options.seconds or (115 if options.quick else 510)
    status = check(chosen, options.out.resolve(), seconds)
    print(f"\n{(options.out / 'summary.md').read_text()}", end="")
    return status


if __name__ == "__main__":
    sys.exit(main())
