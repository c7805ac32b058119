"""Steps that are recorded once and replayed, with a recorder and with devices that need no GPU."""

import contextlib
import warnings

import pytest
import torch

from rfdarts_fast.retrain import run as retrain_run
from rfdarts_fast.retrain import train
from rfdarts_fast.runs.graph import CaptureError, GraphedStep, Recorder
from rfdarts_fast.runs.run import RunFailed, on_device
from rfdarts_fast.search import run as search_run
from rfdarts_fast.search import search


def keep(work):
    """A recorder whose recording is the work itself."""
    return work


def test_recorded_steps_read_their_arguments_anew():
    seen, total = [], torch.zeros(1)

    def step(kind, x):
        seen.append(kind)
        total.add_(x.sum())

    graphed = GraphedStep(step, keep, warmup=2)
    for i in range(6):
        graphed("a", torch.full((2,), float(i)))
    graphed("a", torch.ones(3))
    graphed("b", torch.ones(2))
    assert total.item() == 2 * sum(range(6)) + 3 + 2
    assert seen == ["a"] * 7 + ["b"]


@pytest.mark.parametrize("required", [False, True])
def test_a_step_that_cannot_be_recorded(required):
    def refuse(work):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    total = torch.zeros(1)
    graphed = GraphedStep(lambda kind, x: total.add_(x), refuse, warmup=1, required=required)
    graphed("a", torch.ones(1))
    if required:
        with pytest.raises(RuntimeError, match="not permitted"):
            graphed("a", torch.ones(1))
        return
    with pytest.warns(RuntimeWarning, match="not permitted"):
        graphed("a", torch.ones(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graphed("a", torch.ones(1))
    assert total.item() == 3


def test_a_search_in_recorded_steps_is_the_same_search(tiny_search, tmp_path, monkeypatch):
    alphas = []
    for graphed in (False, True):
        monkeypatch.setattr(search_run, "uses_graph", lambda *_, graphed=graphed: graphed)
        monkeypatch.setattr(search_run, "Recorder", lambda device: keep)
        out = tmp_path / str(graphed)
        search(tiny_search(out=out, arch_warmup_epochs=1, epochs=3))
        alphas.append(torch.load(out / "checkpoint.pt", weights_only=False)["network"]["alphas"])
    torch.testing.assert_close(*alphas, rtol=1e-4, atol=1e-6)


class Devices:
    """Two CUDA devices, as torch.cuda has them.

    Attributes:
        current: the current device's number.
        captures: (device, stream, mode) of every capture.
        refused, broken: errors at the beginning and at the end of a capture.
    """

    def __init__(self):
        self.current, self.stream, self.captures = 0, "default", []
        self.refused = self.broken = None
        self._launched = False

    def install(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"stream of {device}")
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: type("Graph", (), {"replay": lambda _: None}))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.stream)
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(self, "stream", stream))
        monkeypatch.setattr(torch.cuda, "device", self.device)
        monkeypatch.setattr(torch.cuda, "graph", self.graph)

    @contextlib.contextmanager
    def device(self, device):
        before, self.current = self.current, device.index or 0
        yield
        self.current = before

    @contextlib.contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        if self.refused:
            raise self.refused
        self.captures.append((self.current, stream, capture_error_mode))
        before, self.stream, self._launched = self.stream, stream, False
        try:
            yield
        finally:
            if self.broken:
                # as torch, which does not come to the next line
                raise self.broken
            self.stream = before
        if not self._launched:
            warnings.warn("The CUDA Graph is empty. This usually means ...", UserWarning, stacklevel=1)

    def launch(self, device):
        self._launched |= device == self.current


@pytest.fixture
def devices(monkeypatch):
    found = Devices()
    found.install(monkeypatch)
    return found


def test_a_step_is_captured_on_its_own_device(devices):
    """Other threads, such as the one that pins memory, may go on meanwhile."""
    record = Recorder(torch.device("cuda:1"))
    record(lambda: devices.launch(1))
    assert devices.captures == [(1, "stream of cuda:1", "thread_local")]
    assert devices.current == 0


@pytest.mark.parametrize("command", ["search", "train"])
def test_a_run_has_its_device_for_the_current_one(command, devices, tiny_search, tiny_train, monkeypatch):
    """On the CPU here, but for what says which device is current."""
    module = {"search": search_run, "train": retrain_run}[command]
    steps, second = [], lambda _: devices.device(torch.device("cuda:1"))
    monkeypatch.setattr(module, "on_device", second)
    run_class = getattr(module, f"{command.capitalize()}Run")
    step = run_class.train_step

    def train_step(*arguments):
        steps.append(devices.current)
        step(*arguments)

    monkeypatch.setattr(run_class, "train_step", train_step)
    if command == "search":
        search(tiny_search(epochs=1))
    else:
        train(tiny_train(epochs=1, genotype="DARTS_V2"))
    assert set(steps) == {1}
    assert devices.current == 0


def test_which_device_is_current(devices):
    with on_device(torch.device("cuda:1")):
        assert devices.current == 1
    with on_device(torch.device("cpu")):
        assert devices.current == 0


def test_a_graph_without_work_is_refused(devices):
    """It would train nothing, silently."""
    steps = []

    def step(kind, x):
        # of a model that has gone elsewhere
        devices.launch(0)
        steps.append(kind)

    required = GraphedStep(step, Recorder(torch.device("cuda:1")), warmup=0, required=True)
    with pytest.raises(RuntimeError, match="holds no work for cuda:1"):
        required("a", torch.ones(1))
    steps.clear()
    graphed = GraphedStep(step, Recorder(torch.device("cuda:1")), warmup=0)
    with pytest.warns(RuntimeWarning, match="holds no work for cuda:1"):
        graphed("a", torch.ones(1))
    # captured, then run as it is
    assert steps == ["a", "a"]
    graphed("a", torch.ones(1))
    assert len(steps) == 3


def test_other_warnings_of_a_capture_are_passed_on(devices):
    def work():
        devices.launch(0)
        warnings.warn("something else", UserWarning, stacklevel=1)

    with pytest.warns(UserWarning, match="something else"):
        Recorder(torch.device("cuda"))(work)


def test_a_capture_that_cannot_begin_is_done_without(devices):
    devices.refused = RuntimeError("captures are not supported")
    total = torch.zeros(1)
    graphed = GraphedStep(lambda kind, x: total.add_(x), Recorder(torch.device("cuda")), warmup=0)
    with pytest.warns(RuntimeWarning, match="captures are not supported"):
        graphed("a", torch.ones(1))
    assert total.item() == 1


@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError, ValueError])
def test_a_capture_that_fails_ends_the_run(devices, error):
    """Ending a capture that failed raises another error, and leaves its stream current."""
    devices.broken = RuntimeError("operation failed due to a previous error during capture")

    def step(kind, x):
        raise error("the cause\nmore")

    graphed = GraphedStep(step, Recorder(torch.device("cuda")), warmup=0)
    with pytest.raises(CaptureError, match=r"^the step cannot be captured: the cause$"):
        graphed("a", torch.ones(1))
    assert devices.stream == "default"


def test_a_search_whose_capture_fails_is_saved_and_goes_on_without(tiny_search, tmp_path, monkeypatch):
    def fail(work):
        raise CaptureError("the step cannot be captured: operation not permitted")

    graphs = [True]
    monkeypatch.setattr(search_run, "uses_graph", lambda *_: graphs[-1])
    monkeypatch.setattr(search_run, "Recorder", lambda device: fail)
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    options = {"arch_warmup_epochs": 1, "epochs": 3}
    with pytest.raises(RunFailed) as failed:
        search(tiny_search(out=broken, **options))
    # three steps are an epoch; the first of the next one is of another kind, and so on
    saved = f"the last good state is {broken}/checkpoint.pt, epoch 2, step 0"
    text = (
        f"cuda-graph: the step cannot be captured: operation not permitted; {saved}: the same command resumes"
    )
    assert str(failed.value) == f"{text}, with --cuda-graph off"
    graphs.append(False)
    search(tiny_search(out=broken, cuda_graph="off", **options))
    search(tiny_search(out=whole, cuda_graph="off", **options))
    found, expected = (
        torch.load(out / "checkpoint.pt", weights_only=False)["network"]["alphas"] for out in (broken, whole)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
