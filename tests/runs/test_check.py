"""`rfdarts check`: a folder's state, and what can be resumed, without a change."""

import pytest
from same_run import contents
from test_damage import DAMAGE, MISFITS

from rfdarts_fast.runs.checkpoint import load_checkpoint, save_checkpoint
from rfdarts_fast.runs.lock import FolderLock
from rfdarts_fast.search import search


@pytest.fixture
def check(rfdarts):
    """Exit code and lines of `rfdarts check`, by file; the folder is as it was."""

    def run(folder, *options):
        before = contents(folder)
        code, out, err = rfdarts("check", folder, *options)
        assert contents(folder) == before
        lines = [line.split(None, 1) for line in out.splitlines()]
        return code, dict(lines), err

    return run


def test_a_sound_folder(check, runs, tmp_path):
    steps = {"search": 3, "train": 6}[runs.command]
    folder = runs.copy(tmp_path / "moved")
    code, lines, err = check(folder)
    assert (code, err) == (0, "")
    assert lines["config.json"] == f"ok       {runs.command}, seed 2"
    assert lines["checkpoint.pt"] == f"ok       epoch 1, step 0 of {steps}"
    assert lines["checkpoint.previous.pt"] == f"ok       epoch 0, step 0 of {steps}"
    assert lines["metrics.jsonl"] == "ok       1 epochs"
    assert ("alphas.jsonl" in lines) == (runs.command == "search")
    assert lines["data.json"].startswith("ok ")
    assert lines["resume"] == f"from {folder}/checkpoint.pt, epoch 1, step 0 of {steps}, 2 epochs in all"
    assert check(runs.whole)[1]["resume"] == "nothing is left to do: 2 epochs are done"


@pytest.mark.parametrize("case", ["empty", "first-half", "flip-middle", "payload"])
def test_a_damaged_checkpoint(check, runs, tmp_path, case):
    folder = runs.copy(tmp_path / "run")
    change, part = DAMAGE[case]
    (folder / "checkpoint.pt").write_bytes(change((folder / "checkpoint.pt").read_bytes()))
    code, lines, _ = check(folder)
    assert code == 1
    assert lines["checkpoint.pt"].startswith("DAMAGED  ")
    assert part in lines["checkpoint.pt"]
    assert lines["resume"].startswith(f"from {folder}/checkpoint.previous.pt, epoch 0, step 0")


@pytest.mark.parametrize("case", ["empty", "shape", "nan", "epoch-late", "group-momentum", "config", "newer"])
@pytest.mark.parametrize("name", ["checkpoint.pt", "checkpoint.previous.pt"])
def test_a_checkpoint_of_something_else(check, all_runs, tmp_path, name, case):
    folder = all_runs["search"].copy(tmp_path / "run")
    state = load_checkpoint(folder / name)
    change, part = MISFITS[case]
    change(state)
    save_checkpoint(folder / name, state or {"version": 1})
    code, lines, _ = check(folder)
    assert code == 1
    damage = lines["resume" if name == "checkpoint.pt" else name]
    assert damage.startswith("DAMAGED  ")
    assert part.replace("'network'", "'") in damage.replace("'network'", "'")


def test_damaged_records(check, runs, tmp_path):
    folder = runs.copy(tmp_path / "run")
    (folder / "metrics.jsonl").write_text("{}\n")
    code, lines, _ = check(folder)
    assert code == 1
    assert "metrics.jsonl is damaged: line 1" in lines["resume"]


def test_other_data(check, all_runs, tmp_path):
    runs = all_runs["train"]
    folder = runs.copy(tmp_path / "run")
    text = (folder / "data.json").read_text()
    (folder / "data.json").write_text(text.replace('"images": "', '"images": "0'))
    code, lines, _ = check(folder)
    assert code == 1
    assert "train has other images" in lines["resume"]
    code, lines, _ = check(folder, "--data-root", tmp_path / "absent.npz")
    assert code == 1
    assert "absent.npz" in lines["data"]


@pytest.mark.parametrize("name", ["best.pt", "genotype.json", "result.json"])
def test_a_result_is_missing(check, all_runs, tmp_path, name):
    runs = all_runs["train"]
    folder = runs.copy(tmp_path / "run")
    runs.go_on(folder)
    (folder / name).unlink()
    code, lines, _ = check(folder)
    assert code == 1
    assert "is missing" in lines[name]


@pytest.mark.parametrize("content", [None, "{", "[]", '{"command": "deploy"}', '{"command": ["search"]}'])
def test_something_else(check, tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    code, lines, err = check(tmp_path)
    assert (code, lines, err.count("\n")) == (2, {}, 1)
    assert err.startswith("rfdarts check: run: ")


def test_a_run_on_a_gpu_can_be_checked_without_one(check, all_runs, tmp_path):
    def elsewhere(values):
        values.update(device="cuda:7", backend="cuda", cuda_graph="on")

    folder = all_runs["search"].older(tmp_path / "run", elsewhere)
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        state = load_checkpoint(folder / name)
        elsewhere(state["config"])
        save_checkpoint(folder / name, state)
    code, lines, _ = check(folder)
    assert (code, lines["resume"][:4]) == (0, "from"), lines


def test_a_folder_in_use(check, all_runs, tmp_path):
    folder = all_runs["train"].copy(tmp_path / "run")
    lock = FolderLock(folder)
    code, lines, _ = check(folder)
    lock.release()
    assert code == 0
    assert lines[".lock"].startswith("in use   by process ")


def test_a_table_is_not_needed(check, tiny_search, tmp_path):
    """It may be gone: the folder does not depend on it."""
    table = tmp_path / "table.csv"
    table.write_text("arch,cifar10_test\n|none~0|+|none~0|none~1|+|none~0|none~1|none~2|,10\n")
    config = tiny_search(table=table, epochs=1)
    search(config)
    table.unlink()
    code, _, err = check(config.out)
    assert (code, err) == (0, "")
