"""The .mar format: round trips, archives of other servers, the manifest, what the writer and the reader refuse."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from mms.archive import FORMATS, MANIFEST, Manifest, ModelArchive, archive_name, write_archive
from mms.errors import ArchiveError
from tests.unit.hostile import DOCUMENT, PLAIN, Entry, deflated, entry, refused, write, zip_bytes

SOURCES = {"handler.py": b"def handle(data, context): return data\n", "data/weights.bin": bytes(range(256)) * 64}


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Path]:
    folder = tmp_path / "sources"
    for name, data in SOURCES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return {name: folder / name for name in SOURCES}


def make(path: Path, sources: dict[str, Path], format: str = "default", **options: Any) -> Path:
    manifest = Manifest(model_name="cat", version="2.1", handler="handler:handle", preload=("torch",))
    return write_archive(path / archive_name("cat", format), manifest, sources, format=format, **options)


@pytest.mark.parametrize("format", FORMATS)
def test_each_format_gives_back_what_was_put_in(tmp_path: Path, sources: dict[str, Path], format: str) -> None:
    archive = ModelArchive.open(make(tmp_path, sources, format))
    archive.verify()
    folder = archive.extract(tmp_path / "out")
    assert {name: (folder / name).read_bytes() for name in SOURCES} == SOURCES
    assert json.loads((folder / MANIFEST).read_bytes()) == archive.manifest.raw
    assert sorted(file.name for file in archive.files) == sorted(SOURCES)
    assert all(len(file.sha256) == 64 for file in archive.files)
    assert (archive.manifest.model_name, archive.manifest.version) == ("cat", "2.1")
    assert (folder == archive.path) == (format == "no-archive")


@pytest.mark.parametrize("format", FORMATS)
def test_one_small_file_can_be_read_before_the_others(tmp_path: Path, sources: dict[str, Path], format: str) -> None:
    archive = ModelArchive.open(make(tmp_path, sources, format))
    for name, data in SOURCES.items():
        assert archive.peek(name, len(data)) == (None if format == "tgz" else data)
        assert archive.peek(name, len(data) - 1) is None
    assert archive.peek("missing", 1) is None


def test_a_file_that_is_read_before_the_others_has_the_hash_of_the_manifest(
    tmp_path: Path, sources: dict[str, Path]
) -> None:
    archive = ModelArchive.open(make(tmp_path, sources, "no-archive"))
    name = next(iter(SOURCES))
    (archive.path / name).write_bytes(b"other")
    with pytest.raises(ArchiveError, match=name):
        archive.peek(name, 100)


@pytest.mark.parametrize("format", ["default", "zip-store", "tgz"])
def test_the_same_input_gives_the_same_bytes(tmp_path: Path, sources: dict[str, Path], format: str) -> None:
    first = make(tmp_path, sources, format).read_bytes()
    for path in sources.values():
        os.utime(path, (1, 1))
        path.chmod(0o600)
    backwards = dict(reversed(sources.items()))
    assert make(tmp_path, backwards, format, force=True).read_bytes() == first


def test_zip_archives_are_readable_by_python(tmp_path: Path, sources: dict[str, Path]) -> None:
    with zipfile.ZipFile(make(tmp_path, sources)) as archive:
        assert archive.testzip() is None
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_tgz_archives_are_readable_by_python(tmp_path: Path, sources: dict[str, Path]) -> None:
    with tarfile.open(make(tmp_path, sources, "tgz")) as archive:
        assert archive.getnames() == ["cat/data/weights.bin", "cat/handler.py", f"cat/{MANIFEST}"]
        assert {(info.uid, info.mtime, info.mode) for info in archive} == {(0, 0, 0o644)}


@pytest.mark.parametrize("format", FORMATS)
def test_an_existing_archive_is_replaced_only_by_force(tmp_path: Path, sources: dict[str, Path], format: str) -> None:
    make(tmp_path, sources, format)
    with pytest.raises(ArchiveError, match="exists"):
        make(tmp_path, sources, format)
    sources["handler.py"].write_text("new = 1\n")
    archive = ModelArchive.open(make(tmp_path, sources, format, force=True))
    assert (archive.extract(tmp_path / "out") / "handler.py").read_text() == "new = 1\n"
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith((".tmp", ".old"))] == []


def test_force_does_not_replace_a_folder_that_is_no_archive(tmp_path: Path, sources: dict[str, Path]) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "thesis.txt").write_text("years of work")
    with pytest.raises(ArchiveError, match="not replaced"):
        make(tmp_path, sources, "no-archive", force=True)
    assert (tmp_path / "cat" / "thesis.txt").exists()


@pytest.mark.parametrize("format", FORMATS)
def test_an_interrupted_write_leaves_nothing_behind(tmp_path: Path, sources: dict[str, Path], format: str) -> None:
    def interrupt(done: int) -> None:
        raise KeyboardInterrupt

    before = sorted(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, sources, format, progress=interrupt)
    assert sorted(tmp_path.iterdir()) == before


def test_progress_counts_up_to_all_bytes(tmp_path: Path, sources: dict[str, Path]) -> None:
    seen: list[int] = []
    make(tmp_path, sources, progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == sum(map(len, SOURCES.values()))


@pytest.mark.parametrize("format", ["default", "tgz"])
def test_weights_of_zeros_are_packed_so_that_they_can_be_read(tmp_path: Path, format: str) -> None:
    (tmp_path / "zeros").write_bytes(bytes(8 << 20))
    path = make(tmp_path, {"zeros": tmp_path / "zeros", "more": tmp_path / "zeros"}, format)
    ModelArchive.open(path).verify()


def test_a_large_file_is_deflated_if_it_shrinks_by_an_eighth(tmp_path: Path) -> None:
    noise, text = os.urandom(2 << 20), b"def handle(data, context): return data\n" * (1 << 16)
    contents = {"noise": noise, "mostly": noise + text[: 64 << 10], "half": noise + text, "small": noise[:100]}
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    path = make(tmp_path, {name: tmp_path / name for name in contents})
    with zipfile.ZipFile(path) as archive:
        stored = {info.filename for info in archive.infolist() if info.compress_type == zipfile.ZIP_STORED}
    assert stored == {"noise", "mostly"}
    ModelArchive.open(path).verify()


def test_a_compressible_file_below_the_ratio_passes(tmp_path: Path) -> None:
    data = b"".join(bytes(1000) + os.urandom(8) for _ in range(4000))
    path = write(tmp_path, zip_bytes(deflated("weights", data)))
    assert len(data) > 50 * path.stat().st_size
    ModelArchive.open(path).verify()


def test_extracted_files_are_private_and_not_executable(tmp_path: Path) -> None:
    path = write(tmp_path, zip_bytes(entry("run.sh", mode=0o100777)))
    out = ModelArchive.open(path).extract(tmp_path / "out")
    assert stat.S_IMODE((out / "run.sh").stat().st_mode) == 0o600
    assert stat.S_IMODE(out.stat().st_mode) == 0o700


def test_extraction_never_writes_into_an_existing_folder(tmp_path: Path) -> None:
    path = write(tmp_path, zip_bytes())
    (tmp_path / "out").mkdir()
    with pytest.raises(ArchiveError, match="exists"):
        ModelArchive.open(path).extract(tmp_path / "out")


def test_an_archive_replaced_after_it_was_opened_is_refused(tmp_path: Path) -> None:
    archive = ModelArchive.open(write(tmp_path, zip_bytes()))
    write(tmp_path, zip_bytes(entry("other")))
    with pytest.raises(ArchiveError, match="changed since"):
        archive.extract(tmp_path / "out")


def test_s2_a_file_that_is_rewritten_with_its_old_times_is_not_the_pinned_one_any_more(tmp_path: Path) -> None:
    path = write(tmp_path, zip_bytes())
    archive = ModelArchive.open(path, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    facts = path.stat()
    with path.open("r+b") as file:  # the same file, the same size
        file.write(file.read())
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    with pytest.raises(ArchiveError, match="changed since it was opened"):
        archive.extract(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_s2_another_file_than_the_pinned_one_is_not_opened(tmp_path: Path) -> None:
    path = write(tmp_path, zip_bytes())
    with pytest.raises(ArchiveError, match=f"its SHA-256 is {hashlib.sha256(path.read_bytes()).hexdigest()}, and"):
        ModelArchive.open(path, sha256="0" * 64)
    with pytest.raises(ArchiveError, match="a folder has no SHA-256"):
        ModelArchive.open(tmp_path, sha256="0" * 64)


def test_a_missing_archive_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="no such file") as caught:
        ModelArchive.open(tmp_path / "gone.mar")
    assert caught.value.status == 404


def test_an_archive_of_multi_model_server_is_read(tmp_path: Path) -> None:
    document = {
        "specificationVersion": "1.0",
        "implementationVersion": "1.0",
        "description": "Resnet-18",
        "modelServerVersion": "1.0",
        "license": "Apache 2.0",
        "runtime": "python",
        "model": {
            "modelName": "resnet-18",
            "description": "Resnet-18",
            "modelVersion": "1.0",
            "extensions": {"parametersFile": "resnet-18-0000.params"},
            "handler": "mxnet_vision_service:handle",
        },
        "engine": {"engineName": "MXNet", "engineVersion": "1.2.0"},
        "publisher": {"author": "MXNet SDK team", "email": "noreply@example.com"},
    }
    path = tmp_path / "resnet-18.mar"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.mkdir("MAR-INF")
        archive.writestr(MANIFEST, json.dumps(document))
        archive.writestr("mxnet_vision_service.py", "def handle(data, context): ...\n")
    opened = ModelArchive.open(path)
    opened.verify()
    manifest = opened.manifest
    assert (manifest.handler, manifest.version, manifest.files) == ("mxnet_vision_service:handle", "1.0", {})
    assert manifest.raw["engine"]["engineName"] == "MXNet"
    assert opened.files[0].sha256 == ""


@pytest.mark.parametrize("format", ["zip", "tgz", "tgz with a dot", "directory"])
def test_an_archive_of_torchserve_is_read(tmp_path: Path, format: str) -> None:
    folder = tmp_path / "files" / "densenet161"
    (folder / "MAR-INF").mkdir(parents=True)
    document = {
        "createdOn": "28/07/2020 06:32:08",
        "runtime": "python3",
        "model": {
            "modelName": "densenet161",
            "serializedFile": "densenet161.pth",
            "handler": "image_classifier",
            "modelFile": "model.py",
            "modelVersion": 1.0,
        },
        "archiverVersion": "0.12.0",
    }
    (folder / MANIFEST).write_text(json.dumps(document))
    (folder / "model.py").write_text("class DenseNet: ...\n")
    (folder / "densenet161.pth").write_bytes(b"weights")
    path = tmp_path / "densenet161"
    if format == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name in ("model.py", "densenet161.pth", MANIFEST):
                archive.write(folder / name, name)
    elif format == "directory":
        folder.rename(path)
    else:
        with tarfile.open(path, "w:gz") as archive_:
            archive_.add(folder, "." if "dot" in format else "densenet161")
    opened = ModelArchive.open(path)
    out = opened.extract(tmp_path / "out")
    manifest = opened.manifest
    assert (manifest.handler, manifest.version, manifest.runtime) == ("image_classifier", "1.0", "python3")
    assert (manifest.serialized_file, manifest.model_file) == ("densenet161.pth", "model.py")
    assert (out / manifest.serialized_file).read_bytes() == b"weights"


@pytest.mark.parametrize(
    "handler", ["service:handle", "service.py:handle", "service", "service.py", "a.b:C", "a/b.py:C"]
)
def test_every_spelling_of_a_handler_is_understood(handler: str) -> None:
    document = {"model": {"modelName": "m", "handler": handler}}
    manifest = Manifest.parse(json.dumps(document).encode())
    assert (manifest.handler, manifest.runtime, manifest.version) == (handler, "python", "1.0")


def test_a_manifest_with_half_a_character_is_refused() -> None:
    with pytest.raises(ArchiveError, match="surrogates not allowed"):
        Manifest.parse(b'{"model": {"modelName": "cat", "handler": "cat:Cat", "more": "\\udddd"}}')


def test_a_manifest_survives_its_own_json() -> None:
    first = Manifest.parse(json.dumps({**PLAIN, "license": "MIT", "preload": ["torch"]}).encode())
    again = Manifest.parse(first.to_json())
    assert again.to_json() == first.to_json()
    assert (again.preload, again.raw["license"]) == (("torch",), "MIT")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (b"", "not JSON"),
        (b"[]", "an object"),
        (b"\xff{}", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"model": {}, "model": {}}', "stands twice"),
        (b" " * (3 << 20), "larger than"),
        ({"model": None}, "model: an object"),
        ({"model": {"handler": "a:b"}}, "model.modelName: missing"),
        ({"model": {"modelName": "m"}}, "model.handler: missing"),
        ({"model": {"modelName": "../m", "handler": "a:b"}}, "model.modelName"),
        ({"model": {"modelName": ["m"], "handler": "a:b"}}, "model.modelName"),
        ({"model": {"modelName": "m", "handler": 7}}, "model.handler"),
        ({"model": {"modelName": "m", "handler": "../a.py:b"}}, "model.handler"),
        ({"model": {"modelName": "m", "handler": "/a.py:b"}}, "model.handler"),
        ({"model": {"modelName": "m", "handler": "a:b:c"}}, "model.handler"),
        ({"model": {"modelName": "m", "handler": "a:b", "modelVersion": []}}, "model.modelVersion"),
        ({"model": {"modelName": "m", "handler": "a:b", "modelVersion": "1/2"}}, "model.modelVersion"),
        ({"model": {"modelName": "m", "handler": "a:b", "modelVersion": True}}, "model.modelVersion"),
        ({"model": {"modelName": "m", "handler": "a:b", "serializedFile": "../w"}}, "model.serializedFile"),
        ({"model": {"modelName": "m", "handler": "a:b", "configFile": {}}}, "model.configFile"),
        ({"runtime": "java"}, "runtime"),
        ({"runtime": ["python"]}, "runtime"),
        ({"preload": "torch"}, "preload"),
        ({"preload": ["os; x"]}, "preload"),
        ({"files": []}, "files"),
        ({"files": {"a": {"size": 1}}}, "sha256"),
        ({"files": {"a": {"size": True, "sha256": "0" * 64}}}, "files"),
        ({"files": {"a": {"size": -1, "sha256": "0" * 64}}}, "files"),
        ({"files": {"a": {"size": 1, "sha256": "0" * 63}}}, "sha256"),
        ({"files": {"../a": {"size": 1, "sha256": "0" * 64}}}, "files"),
        ({"files": {"a": {"size": 1, "sha256": "0" * 64}}, "model": {**PLAIN["model"], "modelFile": "b"}}, "modelFile"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_bad_manifest_is_refused_with_the_field(tmp_path: Path, change: Any, named: str) -> None:
    document = change if isinstance(change, bytes) else json.dumps({**PLAIN, **change}).encode()
    refused(write(tmp_path, zip_bytes(document=document)), named)


HASHED: dict[str, Any] = {
    "a": {"sha256": "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881", "size": 1}
}


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ([entry("a", b"y")], "'a': its SHA-256"),
        ([entry("a", b"xx")], "'a': 2 bytes, the manifest says 1"),
        ([], "'a': in the manifest, but not"),
        ([entry("a"), entry("b")], "'b': in the archive, but not"),
    ],
    ids=["other content", "other size", "missing", "extra"],
)
def test_files_that_differ_from_the_manifest_are_refused(tmp_path: Path, files: list[Entry], reason: str) -> None:
    path = write(tmp_path, zip_bytes(*files, document=json.dumps({**PLAIN, "files": HASHED}).encode()))
    refused(path, reason)
    assert ModelArchive.open(path).extract(tmp_path / "unverified", verify=False).is_dir()


def test_an_archive_that_matches_its_manifest_passes(tmp_path: Path) -> None:
    document = json.dumps({**PLAIN, "files": HASHED}).encode()
    ModelArchive.open(write(tmp_path, zip_bytes(entry("a"), document=document))).verify()


def test_an_empty_list_of_files_is_a_list(tmp_path: Path) -> None:
    """Only archives of other makers, which have no list, are taken with whatever is in them."""
    document = json.dumps({**PLAIN, "files": {}}).encode()
    archive = ModelArchive.open(write(tmp_path, zip_bytes(document=document)))
    archive.verify()
    assert archive.manifest.hashed and not Manifest.parse(DOCUMENT).hashed
    refused(write(tmp_path, zip_bytes(entry("b"), document=document)), "'b': in the archive, but not")


def test_a_folder_is_verified_even_after_its_workers_left_bytecode(tmp_path: Path, sources: dict[str, Path]) -> None:
    path = make(tmp_path, sources, "no-archive")
    (path / "__pycache__").mkdir()
    (path / "__pycache__" / "handler.pyc").write_bytes(b"")
    ModelArchive.open(path).verify()
    (path / "handler.py").write_text("changed\n")
    refused(path, "'handler.py': 8 bytes")


def test_the_writer_refuses_what_a_reader_would(tmp_path: Path, sources: dict[str, Path]) -> None:
    for name in ("../a", "HANDLER.PY", MANIFEST, "mar-inf/x"):
        with pytest.raises(ArchiveError):
            make(tmp_path, {**sources, name: sources["handler.py"]})
    with pytest.raises(ArchiveError, match="unknown format rar"):
        make(tmp_path, sources, "rar")
    with pytest.raises(ArchiveError, match="gone"):
        make(tmp_path, {"a": tmp_path / "gone"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sources"]
