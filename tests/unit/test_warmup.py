"""The warm-up through the stages of a handler: which batches run, and what a sample that fails says."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest

from mms import wire
from mms.backend.prepare import prepare
from mms.backend.stages import BatchStages, RequestStages, Stages
from mms.errors import ModelLoadError
from mms.handler import Context, Handler, Request
from mms.samples import WarmupSample


class Model(Handler):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def preprocess(self, request: Request) -> str:
        return f"{request.content_type} {request.text()}"

    def inference(self, batch: Any) -> Any:
        self.seen.append(batch)
        if len(batch) == 3:
            raise ValueError("three is too many")
        return batch


def make(folder: Path, handler: Handler, *samples: WarmupSample, sizes: tuple[int, ...] = (1, 2), **how: Any) -> Any:
    wanted = wire.Preparation(samples, sizes, **how)
    load = wire.Load("cat", "1", str(folder), "h", {}, {}, 8, "auto", None, 1, 1000, 1000, preparation=wanted)
    return RequestStages(handler, Context(load, "cpu"), isolate=True, limit=1000), load


def test_a_file_runs_in_each_batch_size_as_often_as_wanted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    handler = Model()
    stages, load = make(tmp_path, handler, WarmupSample(file="a.txt", content_type="text/plain", count=2))
    prepare(stages, load)
    one = "text/plain hello"
    assert handler.seen == [[one], [one], [one] * 2, [one] * 2]
    assert stages.take_times() == (0.0, 0.0, 0.0)


def test_batches_of_files_and_shapes_are_brought_to_the_device(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    handler = Model()
    shape, file = WarmupSample(shape=(4, 2), dtype="int16"), WarmupSample(file="a.txt", content_type="text/plain")
    stages, load = make(tmp_path, handler, shape, file)
    stages.move = lambda batch: ["moved"] * len(batch)
    prepare(stages, load)
    assert handler.seen == [["moved"], ["moved"] * 2] * 2


def test_nothing_that_the_handler_counts_meanwhile_is_told(tmp_path: Path) -> None:
    class Counts(Model):
        def inference(self, batch: Any) -> Any:
            stages.metrics.add_counter("seen", len(batch))
            return batch

    (tmp_path / "a.txt").write_text("hello")
    stages, load = make(tmp_path, Counts(), WarmupSample(file="a.txt", content_type="text/plain"))
    prepare(stages, load)
    stages.metrics.add_counter("seen", 1)
    assert [series.value for series in stages.metrics.take().series] == [1.0]


def test_a_shape_goes_through_collate_and_inference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    handler = Model()
    prepare(*make(tmp_path, handler, WarmupSample(shape=(4, 2), dtype="int16")))
    assert [(batch.shape, str(batch.dtype), type(batch)) for batch in handler.seen] == [
        ((1, 4, 2), "int16", numpy.ndarray),
        ((2, 4, 2), "int16", numpy.ndarray),
    ]


class Yields(Handler):
    def __init__(self) -> None:
        self.ended = 0

    def preprocess(self, request: Request) -> str:
        return request.text()

    def inference(self, batch: Any) -> Any:
        for _ in range(3):
            yield list(map(str, batch))
            if isinstance(batch, list) and batch[0] == "bad":
                raise ValueError("a bad step")
        self.ended += 1


@pytest.mark.parametrize("sample", [WarmupSample(file="a.txt"), WarmupSample(shape=(2,), dtype="int8")])
def test_streams_run_to_their_end(tmp_path: Path, sample: WarmupSample) -> None:
    (tmp_path / "a.txt").write_text("hello")
    handler = Yields()
    prepare(*make(tmp_path, handler, sample))
    assert handler.ended == 2
    (tmp_path / "a.txt").write_text("bad")
    if sample.file:
        with pytest.raises(ModelLoadError, match=r"a\.txt failed in a batch of 1: it is answered with 500"):
            prepare(*make(tmp_path, handler, sample))


@pytest.mark.parametrize(
    ("sample", "said"),
    [
        (
            WarmupSample(file="gone", content_type="text/plain"),
            "warmup sample gone failed in a batch of 1: the archive's",
        ),
        (
            WarmupSample(shape=(2,), dtype="float32"),
            r"warmup sample float32 \[2\] failed in a batch of 3: the handler raised ValueError: three is too many",
        ),
        (WarmupSample(file="a.bin", content_type="x/y"), "a.bin failed in a batch of 1: it is answered with 400: "),
    ],
)
def test_a_sample_that_fails_is_named(tmp_path: Path, sample: WarmupSample, said: str) -> None:
    (tmp_path / "a.bin").write_bytes(b"\xff")
    with pytest.raises(ModelLoadError, match=said):
        prepare(*make(tmp_path, Model(), sample, sizes=(1, 3)))


def test_batch_style_takes_files_and_no_shapes(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"x")
    _, load = make(tmp_path, Model(), WarmupSample(file="a.bin"))
    seen = []

    def handle(data: Any, context: Context) -> Any:
        seen.append(data)
        return [b""] * len(data)

    stages: Stages = BatchStages(handle, Context(load, "cpu"), isolate=False, limit=1000)
    prepare(stages, load)
    assert [len(batch) for batch in seen] == [1, 2]
    _, load = make(tmp_path, Model(), WarmupSample(shape=(1,), dtype="int8"))
    with pytest.raises(ModelLoadError, match="a shape needs a request-style handler"):
        prepare(stages, load)


def test_what_does_nothing_here_is_said_in_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    prepare(*make(tmp_path, Model(), compile=True, cuda_graphs=(1,)))
    assert capfd.readouterr().err.splitlines() == [
        "warning: compile does nothing: it needs a request-style handler with a torch.nn.Module as attribute",
        "warning: cuda_graphs does nothing on a CPU",
    ]


@pytest.mark.parametrize(("gpu", "lines"), [(None, 1), (0, 0)], ids=["asked for", "the default of GPUs"])
def test_batch_style_prepares_nothing_beside(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], gpu: int | None, lines: int
) -> None:
    _, load = make(tmp_path, Model())
    load.preprocess_threads, load.gpu = 2, gpu
    prepare(BatchStages(lambda data, context: data, Context(load, "cpu"), isolate=False, limit=1000), load)
    said = ["warning: preprocess_threads does nothing: it needs a request-style handler"]
    assert capfd.readouterr().err.splitlines() == said * lines


class Network:
    """Stands for an nn.Module: importing torch takes seconds, and compiling a minute."""

    def __call__(self, batch: Any) -> Any:
        return batch


class Nets(Handler):
    def __init__(self) -> None:
        self.network = Network()

    def inference(self, batch: Any) -> Any:
        return self.network(batch)


def test_without_a_compiler_the_network_is_what_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def compiled(network: Network) -> Any:
        def call(batch: Any) -> Any:
            raise RuntimeError("no C++ compiler")

        return call

    torch = SimpleNamespace(nn=SimpleNamespace(Module=Network), compile=compiled, zeros=numpy.zeros, float32="float32")
    monkeypatch.setitem(sys.modules, "torch", torch)
    handler = Nets()
    prepare(*make(tmp_path, handler, WarmupSample(shape=(2,), dtype="float32"), compile=True))
    assert isinstance(handler.network, Network)
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert said == [
        "warning: compile failed, it is done without: warmup sample float32 [2] failed in a batch of 1: "
        "the handler raised RuntimeError: no C++ compiler"
    ]


def test_a_compiled_network_takes_the_attributes_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Compiled:
        def __init__(self, network: Network) -> None:
            self.calls = 0

        def __call__(self, batch: Any) -> Any:
            self.calls += 1
            return batch

    config = SimpleNamespace(suppress_errors=False)
    torch = SimpleNamespace(
        nn=SimpleNamespace(Module=Network), compile=Compiled, _dynamo=SimpleNamespace(config=config),
        zeros=numpy.zeros, float32="float32",
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "torch", torch)
    handler = Nets()
    prepare(*make(tmp_path, handler, WarmupSample(shape=(2,), dtype="float32", count=3), compile=True))
    assert isinstance(handler.network, Compiled) and handler.network.calls == 6
    assert config.suppress_errors
