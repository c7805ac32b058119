"""The runs of a study as jobs of submitit: processes here, or jobs of a Slurm cluster."""

from __future__ import annotations

import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rfdarts_fast.messages import one_line, reason
from rfdarts_fast.results import load
from rfdarts_fast.retrain import TrainConfig, train
from rfdarts_fast.runs.config import ConfigError, require_package
from rfdarts_fast.runs.output import say
from rfdarts_fast.runs.run_folder import RunFolderError, differences_of, read_config, to_plain
from rfdarts_fast.search import SearchConfig, search
from rfdarts_fast.study.spec import Study
from rfdarts_fast.study.summary import write_study

# each goes on from where the one before was stopped
_MOST_TIMEOUTS = 1000


@dataclass(frozen=True)
class Resources:
    """The place where jobs run, and what each of them gets.

    Attributes:
        cluster: as of submitit; debug runs them in this process.
        hours: the time after which a job is stopped; on Slurm it then goes on as another job.
        cpus, gpus, memory_gb, partition: Slurm's.
    """

    cluster: Literal["local", "slurm", "debug"] = "local"
    hours: float = 72.0
    cpus: int = 1
    gpus: int = 0
    memory_gb: float | None = None
    partition: str | None = None


class RunJob:
    """A search, and a training of its genotype, in a process of its own; the answer is an error or None."""

    def __call__(self, config: SearchConfig, train_config: TrainConfig | None) -> str | None:
        try:
            search(config)
            if train_config is not None:
                train(train_config)
        except Exception as error:
            # into the job's log; an error that left this function would start submitit's debugger in debug
            traceback.print_exc()
            return one_line(f"{type(error).__name__}: {reason(error)}")
        return None

    def checkpoint(self, *configs: Any) -> Any:
        """The job that submitit is to start when time is up: the same again, which resumes."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, *configs)


def is_done(config: SearchConfig | TrainConfig) -> bool:
    """True for a run that is finished; RunFolderError for one that was begun with other options."""
    if not (config.out / "config.json").exists():
        return False
    command = "search" if isinstance(config, SearchConfig) else "train"
    there, here = to_plain(read_config(config.out, command, type(config))), to_plain(config)
    # a run notes the size that it found, and the genotype itself
    here["image_size"] = here["image_size"] or there["image_size"]
    if command == "train":
        here["genotype"] = there["genotype"]
    differences = differences_of(there, here, "there", "in the study")
    if differences:
        raise RunFolderError(f"study: {config.out} belongs to another run: {differences}")
    return load(config.out).finished


def run_all(
    study: Study, folder: Path, resources: Resources, at_once: int = 1, retries: int = 1
) -> dict[str, str]:
    """Runs all that are not done, `at_once` at a time; the last error of each that failed, by folder.

    Options are checked, and done runs compared with them, before the first job starts.
    """
    configs = {run.folder: (run.config(folder), run.train_config(folder)) for run in study.runs}
    todo = {
        name: pair
        for name, pair in configs.items()
        if not all(is_done(config) for config in pair if config is not None)
    }
    if len(todo) < len(configs):
        say(f"{len(configs) - len(todo)} of {len(configs)} runs are done")
    executor: Any = _executor(folder / "jobs", resources) if todo else None
    write_study(folder, study)
    lock, active, stopped = threading.Lock(), set(), threading.Event()

    def run(name: str) -> str | None:
        error: str | None = None
        for attempt in range(1 + retries):
            if stopped.is_set():
                return "interrupted"
            say(f"{name}: {'started' if attempt == 0 else f'retry {attempt} of {retries}'}")
            with lock:
                job = executor.submit(RunJob(), *todo[name])
                active.add(job)
            try:
                error = job.result()
            # submitit has several errors for a job that was killed or could not begin
            except Exception:
                error = one_line(f"job {job.job_id} died; its log is {job.paths.stderr}")
            active.discard(job)
            if stopped.is_set():
                return "interrupted"
            say(f"{name}: {error or 'done'}")
            if error is None:
                break
        return error

    with ThreadPoolExecutor(at_once) as pool:
        try:
            errors = dict(zip(todo, pool.map(run, todo), strict=True))
        except KeyboardInterrupt:
            stopped.set()
            for job in list(active):
                job.cancel(check=False)
            raise
    return {name: error for name, error in errors.items() if error is not None}


def _executor(folder: Path, resources: Resources) -> Any:
    submitit = require_package("study", "submitit", "cluster")
    try:
        executor = submitit.AutoExecutor(
            folder, cluster=resources.cluster, slurm_max_num_timeout=_MOST_TIMEOUTS
        )
    except RuntimeError as error:
        raise ConfigError(f"cluster: {resources.cluster} cannot be used: {reason(error)}") from None
    executor.update_parameters(name="rfdarts", timeout_min=round(60 * resources.hours))
    if resources.cluster == "slurm":
        wanted = {
            "cpus_per_task": resources.cpus,
            "gpus_per_node": resources.gpus or None,
            "mem_gb": resources.memory_gb,
            "slurm_partition": resources.partition,
        }
        executor.update_parameters(**{name: value for name, value in wanted.items() if value is not None})
    return executor
