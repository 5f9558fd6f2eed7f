"""Every kind of hostile archive is refused with its reason, and what is merely unusual is read."""

from __future__ import annotations

import gzip
import io
import os
import random
import struct
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mms.archive import MANIFEST, ModelArchive
from mms.archive.tar import TarContainer
from mms.errors import ArchiveError
from tests.unit.hostile import (
    BAD_ENTRIES,
    BAD_NAMES,
    BAD_TARS,
    COLLISIONS,
    DOCUMENT,
    EXTRA64,
    FULL,
    GOOD_CRC,
    HONEST,
    HONEST_TGZ,
    STREAMED,
    Entry,
    deflated,
    entry,
    lying_descriptor,
    refused,
    tar_entry,
    tgz_bytes,
    write,
    zip_bytes,
)


@pytest.mark.parametrize(("name", "reason"), BAD_NAMES)
def test_s3_a_zip_with_a_bad_name_is_refused(tmp_path: Path, name: str, reason: str) -> None:
    refused(write(tmp_path, zip_bytes(entry(name))), reason)


@pytest.mark.parametrize(
    ("name", "reason"),
    [pair for pair in BAD_NAMES if len(pair[0].encode()) < 90 and "\0" not in pair[0] and pair[0] not in ("", "./a")],
)
def test_s3_a_tgz_with_a_bad_name_is_refused(tmp_path: Path, name: str, reason: str) -> None:
    refused(write(tmp_path, tgz_bytes(tar_entry(name), top="")), reason)


@pytest.mark.parametrize(("names", "reason"), COLLISIONS)
def test_s3_names_that_collide_are_refused(tmp_path: Path, names: list[str], reason: str) -> None:
    refused(write(tmp_path, zip_bytes(*map(entry, names))), reason)
    refused(write(tmp_path, tgz_bytes(*(tar_entry(f"cat/{name}") for name in names))), reason)


@pytest.mark.parametrize("kind", BAD_ENTRIES)
def test_s3_a_zip_with_a_hostile_entry_is_refused(tmp_path: Path, kind: str) -> None:
    hostile, reason = BAD_ENTRIES[kind]
    refused(write(tmp_path, zip_bytes(entry("before"), hostile, entry("after"))), reason)


@pytest.mark.parametrize(
    "good",
    [
        entry("a", flags=8, local=STREAMED, descriptor=lying_descriptor(GOOD_CRC)),
        entry("a", flags=8, local=STREAMED, descriptor=lying_descriptor(GOOD_CRC)[4:]),
        entry("a", size=FULL, packed=FULL, extra=EXTRA64),
        entry("a/", b"", mode=0o042755),
        entry("caf\u00e9", flags=0x800),
        deflated("a", b""),
    ],
    ids=["descriptor", "bare descriptor", "zip64", "setgid folder", "UTF-8", "empty deflated"],
)
def test_honest_variants_of_zip_are_read(tmp_path: Path, good: Entry) -> None:
    archive = ModelArchive.open(write(tmp_path, zip_bytes(entry("before"), good, entry("after"))))
    archive.verify()
    assert (archive.extract(tmp_path / "out") / good.name.decode()).exists()


def test_a_zip64_archive_is_read_and_its_lies_are_refused(tmp_path: Path) -> None:
    plain = zip_bytes(entry("a"))
    _, _, _, _, count, size, start, _ = struct.unpack("<4s4H2LH", plain[-22:])

    def zip64(*, count64: int = count, size64: int = size, start64: int = start, at: int = start + size) -> bytes:
        record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count64, count64, size64, start64)
        locator = struct.pack("<4sLQL", b"PK\6\7", 0, at, 1)
        end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, FULL, FULL, 0)
        return plain[:-22] + record + locator + end

    ModelArchive.open(write(tmp_path, zip64())).verify()
    refused(write(tmp_path, zip64(start64=1 << 63)), "not where the end record says")
    refused(write(tmp_path, zip64(size64=(1 << 64) - 1)), "not where the end record says")
    refused(write(tmp_path, zip64(count64=1_000_000)), "more than 10000 entries")
    refused(write(tmp_path, zip64(at=0)), "locator")
    refused(write(tmp_path, zip64()[:-22] + plain[-22:-10] + struct.pack("<LLH", size, 7, 0)), "contradicts")


@pytest.mark.parametrize("change", [{4: 1}, {6: 1}, {8: 1}])
def test_a_part_of_a_zip_in_several_files_is_refused(tmp_path: Path, change: dict[int, int]) -> None:
    data = bytearray(zip_bytes(entry("a")))
    for at, value in change.items():
        data[len(data) - 22 + at] = value
    refused(write(tmp_path, bytes(data)), "several files")


def test_s3_overlapping_entries_are_refused(tmp_path: Path) -> None:
    inner = entry("inner")
    outer = entry("outer", inner.local_bytes())
    manifest = entry(MANIFEST, DOCUMENT)
    data = manifest.local_bytes() + outer.local_bytes()
    at = len(manifest.local_bytes())
    central = manifest.central_bytes(0) + outer.central_bytes(at) + inner.central_bytes(at + 30 + len(b"outer"))
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 3, 3, len(central), len(data), 0)
    refused(write(tmp_path, data + central + end), "overlaps")
    with zipfile.ZipFile(tmp_path / "cat.mar") as archive:
        assert archive.namelist() == [MANIFEST, "outer", "inner"]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "neither a zip nor"),
        (b"hello, world", "neither a zip nor"),
        (zip_bytes(entry("a"))[:-1], "no end of a zip|truncated"),
        (zip_bytes(entry("a"))[:100], "truncated"),
        (b"junk" + zip_bytes(entry("a")), "not where the end record says"),
        (zip_bytes(entry("a")) + b"junk", "after the end of the zip"),
        (zip_bytes(entry("a")) + zip_bytes(entry("b")), "not where the end record says"),
        (zip_bytes(entry("a"), count=3), "malformed"),
        (zip_bytes(entry("a"), count=1), "more, or less"),
        (struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0, 0, 0, 0, 0), "the zip is empty"),
        (zip_bytes(entry("a")).replace(MANIFEST.encode(), b"MAR-INF/MANIFEST.jso0"), "no MAR-INF"),
        (zip_bytes(*(entry(f"f{i}", b"") for i in range(10_000))), "more than 10000"),
    ],
    ids=[
        *("empty", "not zip", "truncated", "cut in half", "prefix junk", "suffix junk", "two zips", "count too high"),
        *("count too low", "empty zip", "no manifest", "too many entries"),
    ],
)
def test_s3_a_broken_zip_is_refused(tmp_path: Path, data: bytes, reason: str) -> None:
    refused(write(tmp_path, data), reason)


def test_a_zip_with_prefix_and_moved_offsets_is_refused(tmp_path: Path) -> None:
    manifest = entry(MANIFEST, DOCUMENT)
    data = b"#!/bin/sh\n" + manifest.local_bytes()
    central = manifest.central_bytes(10)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, len(central), len(data), 0)
    refused(write(tmp_path, data + central + end), "before the first entry")


def test_s3_more_than_8_gib_in_all_are_refused(tmp_path: Path) -> None:
    big = [entry(f"f{i}", size=3 << 30, packed=3 << 30) for i in range(3)]
    refused(write(tmp_path, zip_bytes(*big)), "more than 8 GiB")


@pytest.mark.parametrize("kind", BAD_TARS)
def test_s3_a_tgz_with_a_hostile_entry_is_refused(tmp_path: Path, kind: str) -> None:
    hostile, reason = BAD_TARS[kind]
    refused(write(tmp_path, tgz_bytes(hostile)), reason)


LARGE_HEADER = tar_entry("x", b"60000 comment=" + random.Random(1).randbytes(600) + b"a" * 59_385 + b"\n", b"x")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (tgz_bytes()[:-9], "truncated"),
        (tgz_bytes()[:-8] + bytes(8), "damaged gzip"),
        (tgz_bytes(end=b""), "truncated"),
        (tgz_bytes(end=bytes(512) + b"junk"), "after the end of the tar"),
        (tgz_bytes() + tgz_bytes(), "after the end of the gzip"),
        (tgz_bytes() + b"junk", "after the end of the gzip"),
        (tgz_bytes(end=bytes(40 << 20)), "a bomb"),
        (tgz_bytes(tar_entry("x", b"6 a=b\n" * 101, b"x")), "more than 100 records"),
        (tgz_bytes(LARGE_HEADER * 280), "more than 16 MiB of extended"),
        (tgz_bytes(tar_entry("dog/a")), "no MAR-INF"),
        (gzip.compress(b"not a tar" * 100, mtime=0), "checksum|malformed"),
        (gzip.compress(bytes(1024), mtime=0), "no MAR-INF"),
    ],
    ids=[
        "cut",
        "bad checksum",
        "no end",
        "junk in it",
        "two streams",
        "junk behind",
        "bomb",
        "records",
        "headers",
        "two tops",
        "no tar",
        "empty",
    ],
)
def test_s3_a_broken_tgz_is_refused(tmp_path: Path, data: bytes, reason: str) -> None:
    refused(write(tmp_path, data), reason)


def test_a_tgz_rewritten_between_check_and_use_is_refused() -> None:
    file = io.BytesIO(tgz_bytes(tar_entry("cat/a", b"x")))
    container = TarContainer(file)
    file.seek(0)
    file.write(tgz_bytes(tar_entry("cat/b", b"x")))
    with pytest.raises(ArchiveError, match="changed while it was read"):
        for _ in container.contents():
            pass


def folder_archive(tmp_path: Path) -> Path:
    path = tmp_path / "cat.mar"
    (path / "MAR-INF").mkdir(parents=True)
    (path / MANIFEST).write_bytes(DOCUMENT)
    (path / "a").write_text("x")
    return path


def test_a_folder_may_link_to_its_own_files_only(tmp_path: Path) -> None:
    path = folder_archive(tmp_path)
    (path / "link").symlink_to("a")
    ModelArchive.open(path).verify()
    (path / "link").unlink()
    (tmp_path / "cat.mar-secret").write_text("secret")
    for target in ("../cat.mar-secret", "/etc/passwd", "MAR-INF", "nowhere", "link"):
        (path / "link").symlink_to(target)
        refused(path, "symbolic link that leads outside")
        (path / "link").unlink()


def test_a_folder_with_a_fifo_is_refused(tmp_path: Path) -> None:
    path = folder_archive(tmp_path)
    os.mkfifo(path / "fifo")
    refused(path, "a FIFO")


def test_a_folder_deeper_than_the_limit_is_refused(tmp_path: Path) -> None:
    path = folder_archive(tmp_path)
    (path / ("d/" * 33)).mkdir(parents=True)
    refused(path, "levels")


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    path = folder_archive(tmp_path)
    (path / MANIFEST).unlink()
    refused(path, "no MAR-INF")


def test_a_fifo_is_no_archive(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "cat.mar")
    refused(tmp_path / "cat.mar", "neither a file nor a folder")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_s3_a_mutated_archive_is_read_or_refused_and_nothing_else(tmp_path: Path, data: st.DataObject) -> None:
    honest = data.draw(st.sampled_from([HONEST, HONEST_TGZ, gzip.decompress(HONEST_TGZ)]))
    mutated = bytearray(honest)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(mutated) - 1))
        match data.draw(st.sampled_from(["set", "insert", "delete"])):
            case "set":
                mutated[at] = data.draw(st.integers(0, 255))
            case "insert":
                mutated[at:at] = data.draw(st.binary(max_size=8))
            case _:
                del mutated[at : at + data.draw(st.integers(1, 8))]
    changed = bytes(mutated) if honest[:1] != b"c" else gzip.compress(mutated)
    try:
        ModelArchive.open(write(tmp_path, changed)).verify()
    except ArchiveError as error:
        assert error.status == 400
