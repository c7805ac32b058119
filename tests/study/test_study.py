"""Studies: their runs, resuming, failures, and the summary against numbers by hand."""

import csv
import dataclasses
import json
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from rfdarts_fast.runs.config import ConfigError
from rfdarts_fast.search import search
from rfdarts_fast.study import NAMED, load_study, read_study
from rfdarts_fast.study.show import ShownStudy
from rfdarts_fast.study.summary import RunRow, StudyResults, compared


@pytest.fixture
def file(tmp_path, tiny_npz):
    """The text of a study as a file, its runs of a fraction of a second."""

    def write(text):
        path = tmp_path / "tiny.yaml"
        path.write_text(
            f"dataset: npz\ndata-root: {tiny_npz}\ndevice: cpu\nspace: nasbench201\n"
            f"channels: 4\ncells-per-stage: 1\nbatch-size: 4\n{text}"
        )
        return path

    return write


@pytest.fixture
def study(rfdarts):
    """Exit code, stdout and stderr of `rfdarts study`."""
    return partial(rfdarts, "study")


TWO = "epochs: 1\nseed: [1, 2]\nvariants:\n  darts: {method: darts}\n  rf: {method: rf-darts}\n"


def test_runs_are_the_product(file):
    text = "method: rf-darts\nseed: [1, 2]\nlearning-rate: [0.1, 3e-1]\nvariants:\n  a: {affine: true}\n"
    runs = read_study(str(file(text + "  b: {epochs: [3, 4], learning-rate: 0.2}\n"))).runs
    assert [run.folder for run in runs] == [
        *(f"a,learning-rate={rate}/seed-{seed}" for seed in (1, 2) for rate in ("0.1", "0.3")),
        *(f"b,epochs={epochs}/seed-{seed}" for seed in (1, 2) for epochs in (3, 4)),
    ]
    config = runs[-1].config(file("").parent)
    assert (config.seed, config.epochs, config.learning_rate, config.affine) == (2, 4, 0.2, True)
    assert config.out == file("").parent / "b,epochs=4" / "seed-2"


def test_options_for_all_runs_win(file):
    run = read_study(str(file("epochs: 9\nmethod: darts")), ["--epochs", "3", "--no-nesterov"]).runs[0]
    assert (run.group, run.config(file("").parent).epochs) == ("search", 3)
    assert not run.config(file("").parent).nesterov


@pytest.mark.parametrize("name", NAMED)
def test_named_studies_can_be_run(name, tmp_path):
    runs = read_study(name).runs
    assert len({run.folder for run in runs}) == len(runs) >= 12
    for run in runs:
        run.config(tmp_path)


def test_named_studies_are_listed(study, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    out = study("--help")[1]
    assert all(name in out for name in NAMED)
    code, out, _ = study("nb201", "--out", "x", "--list", "--", "--epochs", "7")
    assert code == 0 and out.count("rfdarts search ") == 12 == out.count("--epochs 7")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("latyers: 3", "line 8: has no such option: 'latyers'"),
        ("epochs: many", "line 8: epochs: expected int, got 'many'"),
        ("epochs: [1, many]", "line 8: epochs: expected int, got 'many'"),
        ("epochs: [1, 1]", "line 8: epochs: expected each value once, got '1'"),
        ("epochs: []", "line 8: epochs: expected at least one value, got none"),
        ("epochs: 1\nepochs: 2", "line 9: epochs: expected it once, got '2'"),
        ("epochs: [[1]]", "line 8: epochs: expected a plain value or a list of them"),
        ("epochs: {a: 1}", "line 8: epochs: expected a plain value or a list of them"),
        ("out: x", "line 8: out: expected no such option in a study, got 'x'"),
        ("restart: true", "line 8: restart: expected no such option in a study, got 'true'"),
        ("variants: 3", "line 8: variants: expected names with options each"),
        ("train: 3", "line 8: train: expected options once, such as {epochs: 3}"),
        ("train: {epochs: [3, 4]}", "line 8: train: epochs: expected one value, got a list"),
        ("train: {genotype: DARTS_V1}", "line 8: genotype: expected no such option in a study"),
        ("train: {latyers: 3}", "line 8: has no such option: 'latyers'"),
        ("variants: {a: 3}", "line 8: 'a': expected options, such as {epochs: 3}"),
        ("variants: {a: {epochs: 1}, a: {epochs: 2}}", "line 8: expected another name, got 'a'"),
        ("variants: {a: {epochs: {b: 2}}}", "line 8: epochs: expected a plain value or a list"),
        ("variants:\n  a/b: {}\n  a_b: {}", "expected different runs, got two that are called a_b/seed-2"),
        ("epochs: &a 1", "line 8: expected no anchors and aliases"),
        ("epochs: !!int 1", "line 8: expected no tags"),
        ("---\nepochs: 1", "expected one document, got another"),
        ("epochs: " + "[" * 9000, "line 8: epochs: expected a plain value or a list of them"),
        ("seed: {0}\nepochs: {0}".format([*range(1, 102)]), "expected at most 10,000 runs, got more"),
    ],
)
def test_a_file_that_is_refused(file, text, message):
    with pytest.raises(ConfigError) as error:
        read_study(str(file(text)))
    assert message in str(error.value) and str(error.value).startswith("study: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "expected names and values, got nothing"), ("- 1", "line 1: expected names and values"),
     ("3", "line 1: expected names and values")],
)  # fmt: skip
def test_no_mapping(tmp_path, content, message):
    (tmp_path / "a.yaml").write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_study(str(tmp_path / "a.yaml"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ("nb202",),
            "study: expected a YAML file or one of ablations, cifar, nb201, robustness, got",
        ),
        (("nb201", "--jobs", "0"), "--jobs: expected a positive number, got 0"),
        (("nb201", "--retries", "-1"), "--retries: expected 0 or more, got -1"),
        (("nb201", "--", "--epochs", "0"), "--epochs: expected a positive number, got 0"),
        (("nb201", "--", "--latyers", "0"), "--latyers"),
    ],
)
def test_options_that_are_refused(study, tmp_path, args, message):
    pytest.importorskip("submitit", reason="needs the extra `cluster`")
    code, out, err = study(*args[:1], "--out", tmp_path / "s", *args[1:])
    assert (code, out) == (2, "")
    assert message in err and err.count("\n") == 1
    assert not (tmp_path / "s").exists()


@pytest.fixture
def submitit():
    return pytest.importorskip("submitit", reason="needs the extra `cluster`")


def test_a_study_runs_resumes_and_retries(study, file, tmp_path, monkeypatch, submitit):
    started, fails = [], {"rf/seed-2": 2}

    def counted(config):
        name = "/".join(config.out.parts[-2:])
        started.append(name)
        if fails.get(name):
            fails[name] -= 1
            raise RuntimeError("out of\nluck")
        return search(config)

    monkeypatch.setattr("rfdarts_fast.study.jobs.search", counted)
    options = (file(TWO), "--out", tmp_path / "s", "--cluster", "debug")
    code, out, _ = study(*options)
    assert code == 1
    assert started == ["darts/seed-1", "darts/seed-2", "rf/seed-1", "rf/seed-2", "rf/seed-2"]
    assert "rf/seed-2: RuntimeError: out of luck" in out and "3 of 4 runs finished" in out
    started.clear()
    code, out, _ = study(*options)
    assert (code, started) == (0, ["rf/seed-2"])
    assert "3 of 4 runs are done" in out and "4 of 4 runs finished" in out
    # a run is an ordinary one
    assert (tmp_path / "s" / "rf" / "seed-2" / "genotype.json").is_file()
    files = {path.name for path in (tmp_path / "s").iterdir()}
    assert {"study.json", "summary.txt", "summary.csv", "summary.json"} <= files
    with (tmp_path / "s" / "summary.csv").open() as lines:
        assert [(row["folder"], row["finished"]) for row in csv.DictReader(lines)][-1] == (
            "rf/seed-2",
            "True",
        )
    # nothing is left to do, and other options are another study
    started.clear()
    assert study(*options)[0] == 0 and started == []
    code, _, err = study(file(TWO.replace("epochs: 1", "epochs: 2")), *options[1:])
    assert code == 2 and "belongs to another run: epochs is 1 there and 2 in the study" in err


def test_genotypes_are_trained_on_the_same_data(study, file, tmp_path, submitit):
    text = "epochs: 1\nmethod: rf-darts\nseed: [4, 5]\nthreads: 1\n"
    path = file(
        text + "train: {preset: nasbench201, channels: 4, cells-per-stage: 1, epochs: 2, batch-size: 5}"
    )
    options = (path, "--out", tmp_path / "s", "--cluster", "debug")
    code, out, err = study(*options)
    assert code == 0, err
    results = load_study(tmp_path / "s")
    for row in results.rows:
        folder = tmp_path / "s" / f"{row.folder}-trained"
        config = json.loads((folder / "config.json").read_text())
        assert (config["dataset"], config["seed"], config["threads"], config["batch_size"]) == (
            "npz",
            row.seed,
            1,
            5,
        )
        assert config["genotype"] == row.genotype
        assert row.test == json.loads((folder / "result.json").read_text())["test_accuracy"]
    assert "test accuracy after training" in out
    assert "2 of 2 runs are done" in study(*options)[1]
    (folder / "result.json").unlink()
    assert "1 of 2 runs are done" in study(*options)[1]
    assert study(path, "--out", "x", "--list")[1].count("rfdarts train --preset nasbench201") == 2


def test_a_job_that_fails_leaves_its_traceback(study, file, tmp_path, monkeypatch, submitit):
    def die(config):
        raise KeyError("no luck")

    monkeypatch.setattr("rfdarts_fast.study.jobs.search", die)
    text = "epochs: 1\nmethod: rf-darts\nseed: [1]"
    code, out, err = study(file(text), "--out", tmp_path / "s", "--cluster", "debug", "--retries", 0)
    assert code == 1 and "0 of 1 runs finished" in out
    assert "seed-1: KeyError: 'no luck'" in out and 'raise KeyError("no luck")' in err


@pytest.mark.slow
def test_jobs_in_processes_of_their_own(study, file, tmp_path, submitit):
    code, out, _ = study(file(TWO), "--out", tmp_path / "s", "--jobs", 2)
    assert code == 0, out
    assert "4 of 4 runs finished" in out
    assert list((tmp_path / "s" / "jobs").glob("*_log.out"))


def test_without_submitit(study, file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    code, _, err = study(file(TWO), "--out", tmp_path / "s")
    assert code == 2
    assert "package submitit, which is not installed (pip install 'rfdarts_fast[cluster]')" in err
    assert not (tmp_path / "s").exists()


def results(values, tmp_path, **changes):
    """A study of groups with the given table accuracies by seed."""
    rows = [
        RunRow(group, seed, f"{group}/{seed}", 1, True, table=v, rank=int(1000 - 10 * v), skips=k, **changes)
        for group, by_seed in values.items()
        for k, (seed, v) in enumerate(by_seed.items())
    ]
    return StudyResults("s", tmp_path, rows, {})


def test_groups_and_pairs(tmp_path):
    study = results({"a": {1: 90.0, 2: 92.0, 3: 94.0}, "b": {1: 91.0, 2: 94.0, 4: 80.0}}, tmp_path)
    groups = {(row.group, row.measure): row for row in study.groups()}
    assert dataclasses.astuple(groups["a", "table"])[2:] == (3, 92.0, 2.0, 94.0, 80.0)
    assert (groups["b", "skips"].best, groups["b", "skips"].mean) == (0, 1)
    pair = study.pairs()[0]
    assert (pair.first, pair.second, pair.seeds, pair.difference) == ("a", "b", 2, 1.5)
    # Student's t of one degree of freedom at 97.5 % is 12.706; the differences 1 and 2
    half = 12.7062 * np.std([1, 2], ddof=1) / np.sqrt(2)
    assert (pair.low, pair.high) == pytest.approx((1.5 - half, 1.5 + half), rel=1e-4)
    values = json.loads(study.to_json())
    assert values["pairs"][0]["low"] == pair.low and len(values["runs"]) == 6
    text = ShownStudy(study).text()
    assert "b - a" in text and "-4.85 to +7.85" in text and "median rank" in text


def test_only_groups_that_search_the_same_are_paired(tmp_path):
    study = results({name: {1: 90.0, 2: 92.0} for name in "abcd"}, tmp_path)
    for row in study.rows:
        space, dataset = {"c": ("s3", "npz"), "d": ("s2", "digits")}.get(row.group, ("s2", "npz"))
        study.runs[row.folder] = SimpleNamespace(config={"space": space, "dataset": dataset})
    assert {(pair.first, pair.second) for pair in study.pairs()} == {("a", "b")}


def test_what_has_no_interval():
    assert compared("val", "a", "b", {1: 3.0}, {1: 4.0}).low is None
    pair = compared("val", "a", "b", {1: 3.0, 2: 4.0}, {1: 4.0, 2: 5.0})
    assert (pair.difference, pair.low, pair.high) == (1.0, None, None)


def test_runs_that_are_not_finished_do_not_count(tmp_path):
    study = results({"a": {1: 90.0, 2: 10.0}}, tmp_path)
    study.rows[1] = dataclasses.replace(study.rows[1], finished=False)
    assert study.groups()[0].mean == 90.0
    assert "so far" in ShownStudy(study).text() and "1 of 2 runs finished" in ShownStudy(study).text()


def test_figures_and_page(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra `report`")
    shown = ShownStudy(results({"a": {1: 90.0, 2: 92.0}, "b": {1: 91.0}}, tmp_path, error="no <luck>"))
    axis = shown.figures()["groups"].axes[0]
    points = [sorted(c.get_offsets()[:, 0].tolist()) for c in axis.collections]
    assert points == [[90.0, 92.0], [91.0]]
    assert "no &lt;luck&gt;" in shown.page() and shown.page().count("data:image/svg") == 1


def test_no_study(tmp_path):
    with pytest.raises(ValueError, match="study: expected the folder of a study, got"):
        load_study(tmp_path)
    (tmp_path / "study.json").write_text('{"study": "a", "runs": [1]}')
    with pytest.raises(ValueError, match="study: expected the folder of a study, got"):
        load_study(tmp_path)
