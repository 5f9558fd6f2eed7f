"""The model-archiver command, as its users call it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from mms_archiver import progress
from mms_archiver.cli import cli
from mms_archiver.entry import find_entry

from mms.archive import FORMATS, MANIFEST, ModelArchive, archive_name

HANDLER = """
from mms.handler import Handler

class Classifier(Handler):
    def inference(self, batch):
        return batch
"""
SERVICE = "def handle(data, context):\n    return data\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a handler, weights and what else a model has."""
    files = {
        "handler.py": HANDLER,
        "model.py": "class Net: ...\n",
        "model.pt2": "weights",
        "labels.json": "{}",
        "requirements.txt": "numpy\n",
        "model-config.yaml": "batchSize: 4\nlabels: 3\n",
        "words/en/a.txt": "a",
        "words/.git/config": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments)


def pack(*arguments: str) -> Result:
    return call("--model-name", "cat", "--export-path", "store", *arguments)


def packed(*arguments: str, path: str = "store/cat.mar") -> ModelArchive:
    result = pack(*arguments)
    assert result.exit_code == 0, result.output
    archive = ModelArchive.open(Path(path))
    archive.verify()
    return archive


def fails(result: Result, status: int, *words: str) -> None:
    assert result.exit_code == status, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("model-archiver: error: ")
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr
    store = Path("store")
    assert not store.exists() or [path.name for path in store.iterdir() if path.name.endswith(".tmp")] == []


def names(archive: ModelArchive) -> list[str]:
    return sorted(file.name for file in archive.files)


def test_the_native_form_takes_named_files_only(folder: Path) -> None:
    archive = packed(
        *("--version", "2.0", "--handler", "handler.py:Classifier", "--serialized-file", "model.pt2"),
        *("--model-file", "model.py", "--extra-files", "labels.json,words", "--requirements-file", "requirements.txt"),
        *("--config-file", "model-config.yaml", "--runtime", "python3"),
    )
    given = ["handler.py", "labels.json", "model-config.yaml", "model.pt2", "model.py", "requirements.txt"]
    assert names(archive) == [*given, "words/en/a.txt"]
    manifest = archive.manifest
    assert (manifest.handler, manifest.version, manifest.runtime) == ("handler:Classifier", "2.0", "python3")
    assert (manifest.serialized_file, manifest.model_file) == ("model.pt2", "model.py")
    assert (manifest.requirements_file, manifest.config_file) == ("requirements.txt", "model-config.yaml")


def test_the_mms_form_bundles_a_folder_without_what_tools_leave(folder: Path) -> None:
    model = folder / "model"
    kept = ["service.py", "weights/w.bin", ".hidden-file"]
    left_out = [
        "__pycache__/s.pyc",
        ".git/config",
        "__MACOSX/x",
        "x.pyc",
        ".DS_Store",
        "old.mar",
        MANIFEST,
        "MANIFEST.json",
    ]
    for name in kept + left_out:
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text(SERVICE)
    archive = packed("--model-path", "model", "--handler", "service:handle")
    assert names(archive) == sorted(kept)
    assert (archive.manifest.handler, archive.manifest.version) == ("service:handle", "1.0")


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_can_be_written_inspected_and_verified(folder: Path, format: str) -> None:
    path = f"store/{archive_name('cat', format)}"
    packed("--handler", "handler.py", "--archive-format", format, path=path)
    assert call("verify", path).output.startswith(f"{path}: sound")
    assert "handler:Classifier" in call("inspect", path).stdout


@pytest.mark.parametrize(
    ("source", "handler", "entry"),
    [
        (HANDLER, "handler.py", "handler:Classifier"),
        (SERVICE, "handler.py", "handler:handle"),
        (HANDLER + SERVICE, "handler.py", "handler:handle"),
        (HANDLER + SERVICE, "handler.py:Classifier", "handler:Classifier"),
        ("class _Hidden: ...\n" + HANDLER, "handler.py", "handler:Classifier"),
        ("try:\n    import torch\nexcept ImportError:\n    class A: ...\n", "handler.py:A", "handler:A"),
        ("from model import Net\nhandle = Net().run\n", "handler.py", "handler:handle"),
        ("from model import Net\n", "handler.py:Net", "handler:Net"),
        ("from model import Net\n_service = Net()\npredict = _service.run\n", "handler.py:predict", "handler:predict"),
        ("from model import *\n", "handler.py:Net", "handler:Net"),
        ("with open('x') as handle:\n    pass\n", "handler.py:handle", "handler:handle"),
    ],
)
def test_the_entry_is_found_in_the_file(folder: Path, source: str, handler: str, entry: str) -> None:
    (folder / "handler.py").write_text(source)
    assert packed("--handler", handler).manifest.handler == entry


def test_a_handler_may_lie_in_another_folder_or_in_a_package(folder: Path) -> None:
    (folder / "code" / "pkg").mkdir(parents=True)
    (folder / "code" / "pkg" / "service.py").write_text(SERVICE)
    assert packed("--handler", "code/pkg/service.py:handle").manifest.handler == "service:handle"
    archive = packed("--model-path", "code", "--handler", "pkg.service:handle", "--force")
    assert (archive.manifest.handler, names(archive)) == ("pkg.service:handle", ["pkg/service.py"])


def test_a_built_in_handler_is_named_in_full_without_being_imported(folder: Path) -> None:
    before = set(sys.modules)
    archive = packed("--handler", "image_classifier", "--serialized-file", "model.pt2")
    assert archive.manifest.handler == "mms_handlers.image_classifier:ImageClassifier"
    in_full = packed("--handler", "image_classifier:ImageClassifier", "--serialized-file", "model.pt2", "--force")
    assert in_full.manifest.handler == archive.manifest.handler
    assert "torch" in archive.manifest.preload
    assert names(archive) == ["model.pt2"]
    assert not {"torch", "mms_handlers.image_classifier"} & (set(sys.modules) - before)


def test_preload_names_the_frameworks_that_the_handler_imports(tmp_path: Path) -> None:
    (tmp_path / "handler.py").write_text(
        "import json, network\nfrom typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import scipy\n"
        "def handle(data, context):\n    from PIL import Image\n    import numpy.linalg\n"
    )
    (tmp_path / "network.py").write_text("import torch, handler\n")
    (tmp_path / "unused.py").write_text("import sklearn\n")
    files = {path.name: path for path in tmp_path.iterdir()}
    assert find_entry("handler.py", files).preload == ("torch", "numpy", "PIL")


def test_packing_runs_nothing_of_the_model(folder: Path) -> None:
    (folder / "handler.py").write_text("raise SystemExit('imported')\n" + SERVICE)
    assert packed("--handler", "handler.py").manifest.handler == "handler:handle"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--handler", "handler.py:Nope"], ["handler.py has no Nope", "it holds: Classifier"]),
        (["--handler", "model.py:"], ["'model.py:' names no handler"]),
        (["--handler", "import.py:Nope"], ["import.py has no Nope"]),
        (["--handler", "outside.py:handle"], ["outside.py: line 1"]),
        (["--handler", "image_classifier:Nope"], ["image_classifier has no Nope", "image_classifier:ImageClassifier"]),
        (["--handler", "image_classifier"], ["image_classifier needs weights", "--serialized-file"]),
        (["--handler", "tensor"], ["tensor needs weights", "--serialized-file"]),
        (["--handler", "handler.py", "--serialized-file", "gone.pt2"], ["gone.pt2: no such file"]),
        (["--handler", "handler.py", "--serialized-file", "words"], ["words: not a plain file"]),
        (["--handler", "handler.py", "--model-path", "gone"], ["gone: No such file"]),
        (["--handler", "handler.py", "--export-path", "model.pt2"], ["model.pt2: File exists"]),
        (["--handler", "two.py"], ["which handler of two.py", "A, B, f"]),
        (["--handler", "broken.py"], ["broken.py: line 1"]),
        (["--handler", "json.py"], ["would hide the Python module json"]),
        (["--handler", "gone.py"], ["gone.py: no such file"]),
        (["--handler", "gone:handle", "--model-path", "words"], ["no handler gone", "no Python file"]),
        (["--handler", "nothing"], ["no handler nothing", "image_classifier"]),
        (["--handler", "loading"], ["no handler loading"]),
        (["--handler", "; rm"], ["names no handler"]),
        (["--handler", "handler.py", "--extra-files", "gone"], ["gone: no such file"]),
        (["--handler", "handler.py", "--extra-files", "gone*"], ["gone*: matches no file"]),
        (
            ["--handler", "handler.py", "--extra-files", "b/labels.json,labels.json"],
            ["two files would be called labels.json"],
        ),
        (["--handler", "handler.py", "--config-file", "bad.yaml"], ["bad.yaml", "batch_size"]),
        (["--handler", "handler.py", "--config-file", "twice.yaml"], ["twice.yaml: line 2", "stands twice"]),
        (["--handler", "handler.py", "--config-file", "warm.yaml"], ["warm.yaml: ", "sample cat.jpg", "--extra-files"]),
        (["--handler", "handler.py", "--extra-files", "b"], ["fifo: not a plain file"]),
        (["--handler", "handler.py", "--extra-files", "c"], ["a link to a folder"]),
    ],
    ids=str,
)
def test_a_mistake_in_the_model_is_one_clear_line(folder: Path, arguments: list[str], words: list[str]) -> None:
    (folder / "two.py").write_text("class A: ...\nclass B: ...\ndef f(): ...\n")
    (folder / "import.py").write_text("from model import Net\n")
    (folder / "outside.py").write_text("nonlocal handle\n")
    (folder / "broken.py").write_text("def (\n")
    (folder / "json.py").write_text(SERVICE)
    (folder / "bad.yaml").write_text("batch_size: many\n")
    (folder / "twice.yaml").write_text("a: 1\na: 2\n")
    (folder / "warm.yaml").write_text("warmup: [{file: cat.jpg}]\n")
    (folder / "b").mkdir()
    (folder / "b" / "labels.json").write_text("[]")
    os.mkfifo(folder / "b" / "fifo")
    (folder / "c").mkdir()
    (folder / "c" / "link").symlink_to(folder / "words")
    fails(pack(*arguments), 1, *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--archive-format", "rar"], ["--archive-format", "rar"]),
        (["--runtime", "java"], ["--runtime"]),
        (["--model-name", "../cat"], ["'../cat'"]),
        (["--model-name", ".cat"], ["'.cat'"]),
        (["--version", "1/2"], ["--version '1/2'", "'+'"]),
        (["--nonsense"], ["--nonsense"]),
        (["inspect"], ["does not go with inspect"]),
    ],
    ids=str,
)
def test_a_wrong_command_line_is_status_2(folder: Path, arguments: list[str], words: list[str]) -> None:
    fails(pack("--handler", "handler.py", *arguments), 2, *words)
    assert not Path("store").exists()


def test_name_and_handler_are_needed(folder: Path) -> None:
    fails(call("--handler", "handler.py"), 2, "--model-name is needed")
    fails(call("--model-name", "cat"), 2, "--handler is needed")


@pytest.mark.parametrize("command", [["inspect"], ["verify"], ["sign", "--key", "gone.key"]])
def test_an_archive_that_is_not_there_is_a_mistake_as_any_missing_file(folder: Path, command: list[str]) -> None:
    fails(call(*command, "gone.mar"), 1, "gone.", "o such file")


def test_a_version_may_have_all_that_a_manifest_allows(folder: Path) -> None:
    assert packed("--handler", "handler.py", "--version", "1.0+cu121").manifest.version == "1.0+cu121"


def test_an_existing_archive_is_kept_without_force(folder: Path) -> None:
    packed("--handler", "handler.py")
    before = Path("store/cat.mar").read_bytes()
    fails(pack("--handler", "handler.py", "--version", "2"), 1, "store/cat.mar exists", "--force")
    assert Path("store/cat.mar").read_bytes() == before
    assert packed("--handler", "handler.py", "--version", "2", "-f").manifest.version == "2"


def test_help_names_options_and_subcommands(folder: Path) -> None:
    result = call("--help")
    assert result.exit_code == 0
    for word in ("--model-path", "--extra-files", "flattens", "inspect", "verify", "zip-store"):
        assert word in result.stdout
    assert call().exit_code == 2


def test_inspect_prints_one_json_document(folder: Path) -> None:
    packed("--handler", "handler.py", "--serialized-file", "model.pt2")
    document = json.loads(call("inspect", "--json", "store/cat.mar").stdout)
    assert document["manifest"]["model"]["serializedFile"] == "model.pt2"
    assert {file["name"]: file["size"] for file in document["files"]} == {"handler.py": len(HANDLER), "model.pt2": 7}
    assert document["size"] == len(HANDLER) + 7


def test_inspect_shows_names_as_text_not_as_markup(folder: Path) -> None:
    (folder / "[red]x[").write_text("")
    packed("--handler", "handler.py", "--extra-files", "[[]red[]]x[[]")
    assert "[red]x[" in call("inspect", "store/cat.mar").stdout


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import no_such_module\n", ["cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"]),
        ("raise ValueError('two\\nlines')\n", ["ValueError: two lines"]),
        ("del handle\n", ["defines no class or function handle"]),
        ("class handle: ...\n", ["the class handle has neither handle(data, context) nor mms.handler.Handler as base"]),
        ("import os\nprint('last words', flush=True)\nos._exit(0)\n", ["status 0", "last words"]),
        ("raise SystemExit(0)\n", ["status 0"]),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n", ["status -9"]),
    ],
)
def test_verify_names_what_keeps_the_handler_from_being_imported(folder: Path, source: str, words: list[str]) -> None:
    (folder / "handler.py").write_text(SERVICE + source)
    packed("--handler", "handler.py")
    fails(call("verify", "store/cat.mar"), 1, "cat.mar: ", *words)


def test_verify_names_a_changed_file(folder: Path) -> None:
    packed("--handler", "handler.py", "--archive-format", "no-archive", path="store/cat")
    Path("store/cat/handler.py").write_text(SERVICE)
    fails(call("verify", "store/cat"), 1, "cat: 'handler.py'")


def test_verify_names_a_warmup_sample_that_is_not_there(folder: Path) -> None:
    (folder / "model-config.yaml").write_text("warmup: [{file: labels.json}]\n")
    how = ("--handler", "handler.py", "--config-file", "model-config.yaml", "--extra-files", "labels.json")
    packed(*how, "--archive-format", "no-archive", path="store/cat")
    Path("store/cat/labels.json").unlink()
    file = Path("store/cat", MANIFEST)
    manifest = json.loads(file.read_text())
    del manifest["files"]["labels.json"]
    file.write_text(json.dumps(manifest))
    said = "cat: model-config.yaml: the warmup sample labels.json is not in the archive"
    fails(call("verify", "store/cat"), 1, said)


def test_verify_takes_warmup_samples_of_the_archive(folder: Path) -> None:
    (folder / "model-config.yaml").write_text("warmup: [{file: labels.json}]\n")
    packed("--handler", "handler.py", "--config-file", "model-config.yaml", "--extra-files", "labels.json")
    assert call("verify", "store/cat.mar").exit_code == 0


def test_verify_ends_a_handler_that_does_not_end_and_what_it_has_started(folder: Path) -> None:
    """The handler's child holds the write end of a FIFO; reading it ends when the child has gone."""
    os.mkfifo(folder / "fifo")
    start = (
        f"import subprocess\nsubprocess.Popen(['sleep', '1000'], stdout=open({str(folder / 'fifo')!r}, 'w')).wait()\n"
    )
    (folder / "handler.py").write_text(SERVICE + start)
    packed("--handler", "handler.py")
    reader = threading.Thread(target=(folder / "fifo").read_bytes, daemon=True)
    reader.start()
    fails(call("verify", "store/cat.mar", "--timeout", "2"), 1, "cat.mar: ", "more than 2 s")
    reader.join(10)
    assert not reader.is_alive()


def test_verify_leaves_a_folder_archive_as_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    packed("--handler", "handler.py", "--archive-format", "no-archive", path="store/cat")
    assert call("verify", "store/cat").exit_code == 0
    assert sorted(path.name for path in Path("store/cat").iterdir()) == ["MAR-INF", "handler.py"]


@pytest.mark.parametrize(
    ("handler", "status"),
    [
        ("service", 0),
        ("service.py:handle", 0),
        ("service.py:nope", 1),
        ("gone", 1),
        ("loading", 1),
        ("private", 0),
        ("image_classifier", 1),
    ],
)
def test_verify_understands_archives_of_other_makers(folder: Path, handler: str, status: int) -> None:
    """As the server does, which names built-in handlers in full."""
    (folder / "old" / "MAR-INF").mkdir(parents=True)
    (folder / "old" / MANIFEST).write_text(json.dumps({"model": {"modelName": "old", "handler": handler}}))
    (folder / "old" / "service.py").write_text(SERVICE)
    (folder / "old" / "private.py").write_text(
        "class _Base:\n    def handle(self, d, c): ...\nclass Service(_Base): ...\n"
    )
    assert call("verify", "old").exit_code == status


def test_progress_is_a_line_per_tenth_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.show_progress("cat.mar", 10**9) as show:
        assert show is not None
        for done in range(0, 10**9 + 1, 10**7):
            show(done)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == [f"{tenth}0" for tenth in range(1, 11)]
    with progress.show_progress("cat.mar", 1000) as show:
        assert show is None


def run(*arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, map(os.path.abspath, sys.path)))}
    command = [sys.executable, "-m", "mms_archiver.cli", *arguments]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=_hear_interrupts
    )


def _hear_interrupts() -> None:
    """A test run in a shell's background ignores SIGINT, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_the_command_works_in_a_process_of_its_own(folder: Path) -> None:
    with run("--model-name", "cat", "--handler", "handler.py") as process:
        output, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
    assert output == "cat.mar: cat 1.0, handler handler:Classifier, files: 1\n"


@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_packing_leaves_nothing_behind(folder: Path, signal_: signal.Signals) -> None:
    (folder / "big").write_bytes(os.urandom(1 << 20) * 60)
    with run(
        "--model-name", "cat", "--handler", "handler.py", "--extra-files", "big", "--export-path", "store"
    ) as process:
        assert process.stderr is not None
        first = process.stderr.readline()
        process.send_signal(signal_)
        _, errors = process.communicate()
    assert first.startswith("cat.mar: 10 %")
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "model-archiver: error: interrupted"
    assert list((folder / "store").iterdir()) == []


def test_help_does_not_load_what_it_does_not_need() -> None:
    code = "import sys, mms_archiver.cli; print({'rich', 'yaml', 'mms.archive'} & set(sys.modules))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, map(os.path.abspath, sys.path)))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
