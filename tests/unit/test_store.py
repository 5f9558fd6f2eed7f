"""The model store: what it lists, what it opens, and that nothing outside it can be named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mms.errors import ArchiveError, BadRequestError, ConfigError, ModelNotFoundError
from mms.models.store import ModelStore


def make_store(folder: Path) -> ModelStore:
    (folder / "b.mar").write_bytes(b"")
    (folder / "a.tar.gz").write_bytes(b"")
    (folder / "notes.txt").write_bytes(b"")
    (folder / "unpacked" / "MAR-INF").mkdir(parents=True)
    (folder / "unpacked" / "MAR-INF" / "MANIFEST.json").write_bytes(b"{}")
    (folder / "empty").mkdir()
    return ModelStore(folder)


def test_a_store_lists_its_archives(tmp_path: Path) -> None:
    assert make_store(tmp_path).names() == ["a.tar.gz", "b.mar", "unpacked"]


def test_a_store_that_is_gone_is_named(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    store = ModelStore(tmp_path / "store")
    (tmp_path / "store").rmdir()
    with pytest.raises(ModelNotFoundError, match="cannot read the model store: No such file"):
        store.path("b.mar")


def test_a_name_that_is_not_utf8_is_neither_listed_nor_found(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    (tmp_path / os.fsdecode(b"a\xffb.mar")).write_bytes(b"")
    assert store.names() == ["a.tar.gz", "b.mar", "unpacked"]
    with pytest.raises(BadRequestError, match=r"cannot load 'a\\udcffb.mar'"):
        store.path(os.fsdecode(b"a\xffb.mar"))


def test_an_archive_is_found_by_its_name(tmp_path: Path) -> None:
    assert make_store(tmp_path).path("b.mar") == tmp_path / "b.mar"


def test_an_archive_is_opened_and_checked(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    with pytest.raises(ArchiveError):
        store.open("b.mar")


@pytest.mark.parametrize(
    "url", ["../b.mar", "/etc/passwd", "a/b.mar", "a\\b.mar", "..", ".", "", "a\0.mar", "a\n.mar", "x" * 256]
)
def test_anything_but_a_plain_name_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(BadRequestError, match="without a path"):
        make_store(tmp_path).path(url)


@pytest.mark.parametrize("url", ["http://x/b.mar", "file:///b.mar", "s3://b/b.mar"])
def test_addresses_are_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(BadRequestError, match="from the model store only"):
        make_store(tmp_path).path(url)


def test_an_archive_that_is_not_there_lists_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"c\.mar is not in the model store; it holds a\.tar\.gz, b\.mar"):
        make_store(tmp_path).path("c.mar")


def test_an_empty_store_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="it holds no archives"):
        ModelStore(tmp_path).path("c.mar")


def test_without_a_store_nothing_is_found() -> None:
    store = ModelStore(None)
    assert store.names() == []
    with pytest.raises(ModelNotFoundError, match="without --model-store"):
        store.path("a.mar")


@pytest.mark.parametrize("name", ["missing", "file"])
def test_a_store_that_is_no_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is not a folder"):
        ModelStore(tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_store_and_folders_in_it_that_cannot_be_read(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    (tmp_path / "empty").chmod(0)  # such as lost+found
    assert store.names() == ["a.tar.gz", "b.mar", "unpacked"]
    tmp_path.chmod(0o300)
    with pytest.raises(ConfigError, match="this user cannot read the model store"):
        ModelStore(tmp_path)
    tmp_path.chmod(0o700)
