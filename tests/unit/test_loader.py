"""From the name in a manifest to a loaded handler: the entry's forms, the rules of MMS, failures that stay failures."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mms import wire
from mms.backend.loader import find_entry, load_handler
from mms.backend.stages import BatchStages, RequestStages, Stages
from mms.errors import ModelLoadError
from mms.handler import Request, Requests

FUNCTION = """
calls = []
def handle(data, context):
    calls.append(data)
    if data is None:
        return None
    return [row["body"] for row in data]
"""
BATCH_CLASS = """
class Service:
    def initialize(self, context):
        self.name = context.model_name
    def handle(self, data, context):
        return [self.name for row in data]
"""
REQUEST_CLASS = """
from mms.handler import Handler
class Classifier(Handler):
    def initialize(self, context):
        self.device = context.device
    def inference(self, batch):
        return [self.device for item in batch]
"""


@pytest.fixture(autouse=True)
def clean_imports() -> Iterator[None]:
    """What an archive imports does not reach the next test."""
    path, modules = sys.path[:], set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def load(folder: Path, handler: str, *, isolate: str = "auto", gpu: int | None = None) -> Stages:
    return load_handler(wire.Load("cat", "1.0", str(folder), handler, {}, {}, 1, isolate, gpu, 1, 1000, 1000))


def answer(stages: Stages, *bodies: str) -> list[str]:
    requests = [
        Request(wire.RequestFactsView("text/plain", "", b"", False, wire.EMPTY_HEADERS), b"r",
                bytearray(body.encode()), 1000)
        for body in bodies
    ]  # fmt: skip
    return [str(body, "utf-8") for body in stages.run(Requests.made(requests))[1]]


@pytest.mark.parametrize("entry", ["service:handle", "service.py:handle", "service", "service.py"])
def test_a_function_is_found_and_called_once_at_load(tmp_path: Path, entry: str) -> None:
    stages = load(write(tmp_path, service=FUNCTION), entry)
    assert isinstance(stages, BatchStages)
    assert sys.modules["service"].calls == [None]
    assert answer(stages, "a", "b") == ["a", "b"]


def test_a_function_under_another_name(tmp_path: Path) -> None:
    stages = load(write(tmp_path, service=FUNCTION.replace("handle", "predict")), "service:predict")
    assert answer(stages, "a") == ["a"]


@pytest.mark.parametrize("entry", ["service:Service", "service.py:Service", "service"])
def test_a_class_is_made_and_initialized(tmp_path: Path, entry: str) -> None:
    stages = load(write(tmp_path, service=BATCH_CLASS), entry)
    assert stages.style == "batch"
    assert answer(stages, "a") == ["cat"]


def test_a_class_without_initialize_will_do(tmp_path: Path) -> None:
    source = "class Service:\n    def handle(self, data, context):\n        return data\n"
    assert load(write(tmp_path, service=source), "service").style == "batch"


@pytest.mark.parametrize(("gpu", "device"), [(None, "cpu"), (1, "cuda:1")])
def test_a_subclass_of_handler_is_request_style(tmp_path: Path, gpu: int | None, device: str) -> None:
    stages = load(write(tmp_path, service=REQUEST_CLASS), "service:Classifier", gpu=gpu)
    assert isinstance(stages, RequestStages)
    assert answer(stages, "a") == [device]


def test_a_module_function_named_handle_comes_before_any_class(tmp_path: Path) -> None:
    stages = load(write(tmp_path, service=BATCH_CLASS + FUNCTION), "service")
    assert answer(stages, "a") == ["a"]


def test_imported_classes_are_not_taken_for_the_handler(tmp_path: Path) -> None:
    write(tmp_path, other="class Other:\n    pass\n", service="from other import Other\n" + BATCH_CLASS)
    sys.path.insert(0, str(tmp_path))
    assert find_entry("service", tmp_path).__name__ == "Service"


def test_two_classes_without_a_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"service has no function handle and 2 public classes; .*module:Name"):
        load(write(tmp_path, service=BATCH_CLASS + "class Second:\n    pass\n"), "service")


def test_a_private_class_is_not_taken_for_the_handler(tmp_path: Path) -> None:
    assert load(write(tmp_path, service="class _Base:\n    pass\n" + BATCH_CLASS), "service").style == "batch"


def test_a_name_that_is_not_there_lists_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="service defines no class or function Servise; it defines: Service"):
        load(write(tmp_path, service=BATCH_CLASS), "service:Servise")


def test_a_class_that_is_no_handler_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="neither handle"):
        load(write(tmp_path, service="class Service:\n    pass\n"), "service:Service")


def test_a_handler_may_import_its_neighbours_in_the_archive(tmp_path: Path) -> None:
    write(tmp_path, labels="NAMES = ['tabby']\n")
    source = "import labels\ndef handle(data, context):\n    return data and labels.NAMES\n"
    assert answer(load(write(tmp_path, service=source), "service:handle"), "a") == ["tabby"]


def test_the_archives_own_file_comes_before_an_installed_module(tmp_path: Path) -> None:
    import json

    stages = load(write(tmp_path, json=FUNCTION), "json.py:handle")
    assert answer(stages, "a") == ["a"]
    assert sys.modules["json"] is not json
    sys.modules["json"] = json


def test_a_handler_in_a_folder_is_named_with_dots(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    write(tmp_path / "code", service=FUNCTION)
    assert answer(load(tmp_path, "code.service:handle"), "a") == ["a"]


def test_an_installed_module_may_be_the_handler(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="defines no class or function Nothing"):
        load(tmp_path, "mms.handler:Nothing")


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("import nothing_of_that_name\n", ModuleNotFoundError),
        ("def handle(:\n", SyntaxError),
        ("raise SystemExit(3)\n", SystemExit),
        ("def handle(data, context):\n    raise ValueError('no weights')\n", ValueError),
        ("class S:\n    def initialize(self, c):\n        raise OSError\n    def handle(self, d, c): ...\n", OSError),
        ("class S:\n    def __init__(self, needed): ...\n    def handle(self, d, c): ...\n", TypeError),
    ],
)
def test_a_handler_that_fails_to_load_fails_the_load(tmp_path: Path, source: str, error: type[BaseException]) -> None:
    with pytest.raises(error):
        load(write(tmp_path, service=source), "service")


def test_a_function_that_cannot_take_none_is_told_why_it_is_called(tmp_path: Path) -> None:
    source = "def handle(data, context):\n    return [row['body'] for row in data]\n"
    with pytest.raises(TypeError) as caught:
        load(write(tmp_path, service=source), "service")
    assert "data=None" in "".join(caught.value.__notes__)


def test_a_module_that_is_nowhere_fails_the_load(tmp_path: Path) -> None:
    with pytest.raises(ModuleNotFoundError):
        load(tmp_path, "nowhere:handle")


GUILTY = """
def handle(data, context):
    if data is None:
        return
    if any(row["body"] == "bad" for row in data):
        raise ValueError
    return [row["body"] for row in data]
"""


@pytest.mark.parametrize(("isolate", "good"), [("auto", False), ("true", True), ("false", False)])
def test_isolation_is_a_setting_off_for_the_batch_style(tmp_path: Path, isolate: str, good: bool) -> None:
    stages: Any = load(write(tmp_path, service=GUILTY), "service", isolate=isolate)
    assert (answer(stages, "a", "bad")[0] == "a") is good


@pytest.mark.parametrize(("isolate", "calls"), [("auto", 3), ("true", 3), ("false", 1)])
def test_isolation_is_on_for_the_request_style(tmp_path: Path, isolate: str, calls: int) -> None:
    source = REQUEST_CLASS.replace(
        "return [", "self.calls = getattr(self, 'calls', 0) + 1\n        raise ValueError\n        ["
    )
    stages: Any = load(write(tmp_path, service=source), "service:Classifier", isolate=isolate)
    answer(stages, "a", "b")
    assert stages.handler.calls == calls
