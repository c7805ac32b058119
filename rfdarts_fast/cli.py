"""The command line, `rfdarts COMMAND`: see USAGE."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from rfdarts_fast.data import DataError
from rfdarts_fast.messages import reason
from rfdarts_fast.ops import BackendError
from rfdarts_fast.retrain.config import TrainConfig
from rfdarts_fast.retrain.config import preset_values as train_preset
from rfdarts_fast.runs.checkpoint import CheckpointError
from rfdarts_fast.runs.config import (
    ConfigError,
    require,
    require_not_negative,
    require_positive,
)
from rfdarts_fast.runs.files import WriteError, write_text
from rfdarts_fast.runs.options import as_typed, parse_config, parse_options
from rfdarts_fast.runs.output import complain, repair_streams, say, silence
from rfdarts_fast.runs.run import RunFailed, in_one_line, out_of_memory
from rfdarts_fast.runs.run_folder import RunFolderError
from rfdarts_fast.runs.world import PeerLost, launched
from rfdarts_fast.search.config import SearchConfig
from rfdarts_fast.search.config import preset_values as search_preset

USAGE = """\
usage: rfdarts COMMAND [OPTIONS]

Differentiable architecture search with frozen random features.

commands:
  search    search a cell with a supernet
  train     train the network of a genotype from scratch
  cache     decode a subset of photos once, into a store that search reads
  eval      evaluate a training run on the test images
  export    a trained network as ONNX or safetensors
  check     verify a run's folder and say what can be resumed
  study     many searches as one resumable job, summarised with error bars
  show      a run or a genotype as text, figures and one HTML page
  query     look a NAS-Bench-201 cell up in a table of the benchmark
  bench     step time and memory here: reference, torch.compile, compiled kernels
  env       what is installed and built here

rfdarts COMMAND --help lists the options of a command. To begin:
  rfdarts search --preset quick --out runs/search
  rfdarts train --preset quick --genotype runs/search/genotype.json --out runs/train

On several processes, machines too (every option is the same; --batch-size is that of all processes):
  torchrun --nproc-per-node 8 -m rfdarts_fast search --preset rf-pcdarts-imagenet --out runs/search

exit codes:
  0    done
  1    the run cannot go on (disk, memory, loss), and names its last good state; `check` finds damage; a run
       of a `study` failed
  2    an option, a file or a folder does not fit: nothing was begun or changed
  75   the time limit is reached; 130 interrupted (Ctrl-C), 138 SIGUSR1, 143 terminated: the state is saved,
       and the same command resumes
  141  nobody reads the output any more
"""


@dataclass(frozen=True)
class EvalOptions:
    """Evaluate a training run on the test images of its data set."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a `rfdarts train` run."""
    checkpoint: Literal["best", "last"] = "best"
    """The checkpoint to evaluate."""
    data_root: Path | None = None
    """The data set's npz file or folder, if it has moved since."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU where there is one."""


@dataclass(frozen=True)
class ExportOptions:
    """Write the network of a training run for other programs. Needs the extra `export`."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a `rfdarts train` run."""
    onnx: Path | None = None
    """Write this ONNX file: normalised images [N, 3, S, S] to logits. It is kept only if onnxruntime computes
    the same."""
    safetensors: Path | None = None
    """Write the weights, without the auxiliary head, to this file; also for timm.create_model(
    "rfdarts_imagenet", genotype=..., checkpoint_path=FILE) after `import rfdarts_fast.export.timm`."""
    checkpoint: Literal["best", "last"] = "best"
    """The checkpoint whose weights are written."""


@dataclass(frozen=True)
class CheckOptions:
    """Verify a run's folder: every file, history against checkpoint, data. Nothing is changed.

    Exit code 0 if all is sound, 1 if not.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a `rfdarts search` or `rfdarts train` run."""
    data_root: Path | None = None
    """The data set's npz file or folder, if it has moved since."""


@dataclass(frozen=True)
class StudyOptions:
    """Run the searches of a study, all that are not done; then write a summary with error bars.

    The same command again goes on. Every run is an ordinary run folder below --out. Behind -- stand options
    of `rfdarts search` for all runs: rfdarts study nb201 --out runs/nb201 -- --dataset cifar10 --epochs 20
    """

    study: Annotated[str, tyro.conf.Positional]
    """A YAML file of search options, some with lists of values and some in `variants`, or one of nb201,
    robustness, cifar, ablations."""
    out: Path
    """The study's folder."""
    jobs: int = 1
    """Runs at a time."""
    cluster: Literal["local", "slurm", "debug"] = "local"
    """Processes here, jobs of Slurm, or one after the other in this process. Needs the extra `cluster`."""
    retries: int = 1
    """New starts of a run that failed; the same command tries it again, too."""
    hours: float = 72.0
    """Time limit of a job; on Slurm it then goes on as another one."""
    cpus: int = 1
    """slurm: cores of a job."""
    gpus: int = 0
    """slurm: GPUs of a job."""
    memory_gb: float | None = None
    """slurm: memory of a job (default: the cluster's)."""
    partition: str | None = None
    """slurm: where jobs run (default: the cluster's)."""
    list: bool = False
    """Print the runs as commands, and stop."""


@dataclass(frozen=True)
class ShowOptions:
    """Show a run, a study or a genotype: a summary here, and figures and a report in files.

    The run may still go on. Figures need the extra `report`.
    """

    what: Annotated[str, tyro.conf.Positional]
    """Folder of a search, a training or a study; or a genotype as of `rfdarts train --genotype`."""
    html: Path | None = None
    """Write a report to this file: one page with everything inside, to open in a browser or to send."""
    figures: Path | None = None
    """Write every figure to this folder, as SVG and PNG."""
    table: Path | None = None
    """A table as of `rfdarts query`, to look NAS-Bench-201 cells up in."""


@dataclass(frozen=True)
class QueryOptions:
    """Look a NAS-Bench-201 cell up in a table: its accuracies in percent after the benchmark's full training.

    A cell is looked up by its string: isomorphic cells have results of their own, as in the benchmark.
    """

    table: Path
    """A CSV file, plain or gzipped, with a column arch and some named like cifar10_test, or the official
    NATS-Bench file or folder (needs the extra `nasbench`; it is a pickle, so take it from its authors)."""
    cell: Annotated[str | None, tyro.conf.Positional] = None
    """A cell string such as '|skip_connect~0|+|none~0|...', or the genotype.json of a search."""
    best: bool = False
    """The best cell by test accuracy instead of a given one."""
    rank: bool = False
    """The cell's rank by test accuracy, too. In a NATS-Bench folder all cells are read for it."""
    dataset: Literal["all", "cifar10", "cifar100", "imagenet16"] = "all"
    """imagenet16 is ImageNet16-120."""


def run_search(args: list[str]) -> None:
    from rfdarts_fast.search import search

    with launched() as world:
        with world.agreeing():
            config = parse_config(SearchConfig, search_preset, args, "rfdarts search")
        genotype = search(config)
        if not world.leads:
            return
    say(f"\n{genotype}\n\ngenotype  {config.out / 'genotype.json'}\nmetrics   {config.out / 'metrics.jsonl'}")


def run_train(args: list[str]) -> None:
    from rfdarts_fast.retrain import train

    with launched() as world:
        with world.agreeing():
            config = parse_config(TrainConfig, train_preset, args, "rfdarts train")
        result = train(config)
        if not world.leads:
            return
    say(
        f"\ntest accuracy {result['test_accuracy']:.2f}% after the last epoch, best "
        f"{result['best_accuracy']:.2f}% after epoch {result['best_epoch']}; "
        f"{result['parameters'] / 1e6:.3f} M parameters\n\n"
        f"checkpoints  {config.out / 'checkpoint.pt'}, {config.out / 'best.pt'}\n"
        f"metrics      {config.out / 'metrics.jsonl'}"
    )


def run_cache(args: list[str]) -> None:
    from rfdarts_fast.cache import CacheOptions, build_store

    print(build_store(parse_options(CacheOptions, args, "rfdarts cache")))


def run_eval(args: list[str]) -> None:
    from rfdarts_fast.retrain import evaluate_run

    options = parse_options(EvalOptions, args, "rfdarts eval")
    changes: dict[str, Any] = {"device": options.device}
    if options.data_root is not None:
        changes["data_root"] = options.data_root
    print(json.dumps(evaluate_run(options.run, options.checkpoint, **changes)))


def run_export(args: list[str]) -> None:
    from rfdarts_fast.export import export_onnx, save_weights
    from rfdarts_fast.retrain.run import load_network

    options = parse_options(ExportOptions, args, "rfdarts export")
    require(bool(options.onnx or options.safetensors), options, "onnx", "this or --safetensors, or both")
    file, network, config = load_network(options.run, options.checkpoint)
    if options.onnx is not None:
        assert config.image_size is not None
        error = export_onnx(network, config.image_size, options.onnx)
        print(f"wrote {options.onnx} from {file}: onnxruntime's logits are within {error:.1e} of the largest")
    if options.safetensors is not None:
        save_weights(network, config, options.safetensors)
        print(f"wrote {options.safetensors} from {file}")


def run_check(args: list[str]) -> int:
    from rfdarts_fast import retrain, search
    from rfdarts_fast.runs.check import check_folder

    options = parse_options(CheckOptions, args, "rfdarts check")
    commands: dict[str, Any] = {
        "search": (SearchConfig, search.run.opened),
        "train": (TrainConfig, retrain.run.opened),
    }
    report = check_folder(options.run, commands, options.data_root)
    print(report)
    return 0 if report.sound else 1


def run_study(args: list[str]) -> int:
    from rfdarts_fast.study import load_study, read_study
    from rfdarts_fast.study.jobs import Resources, run_all
    from rfdarts_fast.study.show import ShownStudy, write_summary
    from rfdarts_fast.study.summary import planned_runs

    own, extra = (args[: args.index("--")], args[args.index("--") + 1 :]) if "--" in args else (args, [])
    options = parse_options(StudyOptions, own, "rfdarts study")
    require_positive(options, "jobs", "hours", "cpus", most=100_000)
    require_not_negative(options, "retries", "gpus", most=1000)
    study = read_study(options.study, extra)
    if options.list:
        print(planned_runs(study.runs))
        return 0
    names = ("cluster", "hours", "cpus", "gpus", "memory_gb", "partition")
    resources = Resources(**{name: getattr(options, name) for name in names})
    errors = run_all(study, options.out, resources, options.jobs, options.retries)
    results = load_study(options.out, errors=errors)
    written = write_summary(results)
    print(f"\n{ShownStudy(results).text()}\n\nwrote {', '.join(map(str, written))}")
    return 1 if errors else 0


def run_show(args: list[str]) -> None:
    from rfdarts_fast.report.figures import write_figures
    from rfdarts_fast.report.show import Shown, ShownGenotype, ShownRun
    from rfdarts_fast.results import load
    from rfdarts_fast.retrain.run import read_genotype
    from rfdarts_fast.study import load_study
    from rfdarts_fast.study.show import ShownStudy
    from rfdarts_fast.study.summary import STUDY_FILE
    from rfdarts_fast.tables import open_table

    options = parse_options(ShowOptions, args, "rfdarts show")
    table = None if options.table is None else open_table(options.table)
    shown: Shown
    if (Path(options.what) / STUDY_FILE).is_file():
        shown = ShownStudy(load_study(Path(options.what), table))
    elif Path(options.what).is_dir():
        shown = ShownRun(load(options.what), table)
    else:
        shown = ShownGenotype(read_genotype(options.what), options.what, table)
    # files first: what is missing for them is an error before any output
    if options.html is not None:
        options.html.parent.mkdir(parents=True, exist_ok=True)
        write_text(options.html, shown.page())
    written = [] if options.figures is None else write_figures(options.figures, shown.figures())
    print(shown.text())
    for file in (*([options.html] if options.html else []), *written):
        print(f"wrote {file}")


def run_query(args: list[str]) -> None:
    from rfdarts_fast.retrain.run import read_genotype
    from rfdarts_fast.tables import open_table, query

    options = parse_options(QueryOptions, args, "rfdarts query")
    require(options.best == (options.cell is None), options, "cell", "either a cell or --best")
    table = open_table(options.table)
    datasets = table.datasets if options.dataset == "all" else (options.dataset,)
    if options.cell is None:
        print(query.best(table, datasets, options.rank))
    else:
        print(query.described(table, read_genotype(options.cell), datasets, options.rank))


def run_bench(args: list[str]) -> None:
    from rfdarts_fast.bench.command import BenchOptions, benchmark

    print(benchmark(parse_options(BenchOptions, args, "rfdarts bench")))


def run_env(args: list[str]) -> None:
    from rfdarts_fast.runs.environment import backend_status, environment, optional_packages

    argparse.ArgumentParser("rfdarts env", description="What is installed and built here.").parse_args(args)
    here = environment()
    del here["command"]
    rows = {**here, **backend_status(), **optional_packages()}
    for name, value in rows.items():
        print(f"{name:14} {', '.join(value) or 'none' if isinstance(value, list) else value}")


def load_plugins() -> None:
    """Imports the modules that installed packages name in the entry-point group `rfdarts_fast.plugins`.

    They register primitives, spaces and data sets. Raises ConfigError for one that cannot be imported.
    """
    for plugin in entry_points(group="rfdarts_fast.plugins"):
        try:
            plugin.load()
        except Exception as error:
            raise ConfigError(f"plugin {plugin.name}: {plugin.value} cannot be loaded: {error}") from error


COMMANDS = {
    "search": run_search,
    "train": run_train,
    "cache": run_cache,
    "eval": run_eval,
    "export": run_export,
    "check": run_check,
    "study": run_study,
    "show": run_show,
    "query": run_query,
    "bench": run_bench,
    "env": run_env,
}


def run_command(args: list[str]) -> int:
    """Runs a command; its exit code."""
    if not args or args[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if args[0] not in COMMANDS:
        complain(f"rfdarts: there is no command {args[0]!r}\n\n{USAGE}")
        return 2
    try:
        load_plugins()
        return COMMANDS[args[0]](args[1:]) or 0
    except (ConfigError, DataError, RunFolderError, CheckpointError, BackendError) as error:
        complain(f"rfdarts {args[0]}: {as_typed(str(error), args)}")
        return 2
    except (RunFailed, WriteError, PeerLost) as error:
        complain(f"rfdarts {args[0]}: {error}")
        return 1
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        complain(f"rfdarts {args[0]}: memory: {in_one_line(error)}")
        return 1
    except KeyboardInterrupt:
        complain(f"rfdarts {args[0]}: interrupted")
        return 130


def main() -> None:
    """Runs the command of `sys.argv`; exit codes as in USAGE."""
    repair_streams()
    args = sys.argv[1:]
    try:
        try:
            code = run_command(args)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        silence(sys.stdout)
        code = 141
    except OSError as error:
        silence(sys.stdout)
        complain(f"rfdarts {' '.join(args[:1])}: {error.filename or 'stdout'}: {reason(error)}")
        code = 1
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    main()
