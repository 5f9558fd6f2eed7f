"""The file that keeps what is registered: what it holds, what is refused, and what a save may and may not do to it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mms.config import Config
from mms.controlplane import ControlPlane
from mms.errors import ConfigError, StartError
from mms.models.registry import ModelRegistry
from mms.models.store import ModelStore
from mms.rundir import CacheDirectory
from mms.state import MAX_FILE, SavedModel, SavedVersion, Saver, State, decode, encode, read, write
from tests.conftest import MakeArchive


def state(*names: str) -> State:
    version = SavedVersion(version="1.0", archive="cat.mar", sha256="0" * 64, settings={"batch_size": "8", "gpus": [0]})
    return State(models=[SavedModel(name=name, default="1.0", versions=[version]) for name in names])


def contents(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_is_encoded_is_decoded() -> None:
    assert decode(encode(state("cat", "dog"))) == state("cat", "dog")
    assert decode(encode(State())) == State()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (encode(state("cat"))[:-20], "it is damaged: Input data was truncated"),
        (bytes(range(256)), "it is damaged: JSON is malformed"),
        (b"[" * 100_000, "it is damaged: "),
        (b'{"schema": 1, "models": ' + b"[" * 100_000, "it is damaged: "),
        (b'{"schema": 2, "models": 3}', "it has schema 2, this version of MMS reads 1"),
        (b'{"schema": 1, "surprise": 3}', "it is damaged: Object contains unknown field"),
        (encode(state("cat", "cat")), "'cat' or one of its versions cannot be, or stands twice"),
        (encode(state("../cat")), "'../cat' or one of its versions cannot be"),
        (b"\0" * (MAX_FILE + 1), "it is larger than"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_f78_what_is_no_state_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError) as caught:
        decode(data)
    assert reason in str(caught.value)


def test_a_save_keeps_the_file_before(tmp_path: Path) -> None:
    file = tmp_path / "new" / "state.json"
    for names in (("cat",), ("cat", "dog"), ("cat", "dog")):
        write(file, encode(state(*names)))
    assert read(file) == state("cat", "dog")
    assert read(file.with_name("state.json.previous")) == state("cat")
    assert contents(file.parent) == {"state.json", "state.json.previous"}


def test_f78_a_damaged_file_offers_the_one_before(tmp_path: Path) -> None:
    file = tmp_path / "state.json"
    write(file, encode(state("cat")))
    file.write_bytes(b"{")
    with pytest.raises(StartError, match=r"Input data was truncated; start with --fresh$"):
        read(file)
    (tmp_path / "state.json.previous").write_bytes(encode(state("cat")))
    with pytest.raises(StartError, match=r"start with --state .*state\.json\.previous \(the copy before\), or with"):
        read(file)


def test_f78_a_damaged_file_does_not_become_the_one_before(tmp_path: Path) -> None:
    file, previous = tmp_path / "state.json", tmp_path / "state.json.previous"
    previous.write_bytes(encode(state("cat")))
    file.write_bytes(b"{")
    write(file, encode(state("dog")))
    assert (read(file), read(previous)) == (state("dog"), state("cat"))


def test_there_need_not_be_a_file(tmp_path: Path) -> None:
    assert read(tmp_path / "state.json") == State()
    with pytest.raises(StartError, match="there is no "):
        read(tmp_path / "state.json.previous")


def test_f72_a_failed_save_is_said_once_and_leaves_the_old_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, names = tmp_path / "state.json", ["cat"]
    caplog.set_level(logging.INFO, logger="mms")

    async def scene() -> None:
        saver = Saver(file, lambda: state(*names))
        await saver.save()
        names.append("dog")
        (tmp_path / "state.json.new").mkdir()  # what a save writes to cannot be opened
        await saver.save()
        await saver.save()
        assert saver.failed and read(file) == state("cat")
        assert len(caplog.records) == 1 and "cannot save what is registered" in caplog.text
        (tmp_path / "state.json.new").rmdir()
        await saver.save()
        assert not saver.failed and read(file) == state("cat", "dog")

    asyncio.run(scene())
    assert "saved again" in caplog.text


def test_saves_asked_for_meanwhile_are_one(tmp_path: Path) -> None:
    snapshots: list[State] = []

    def snapshot() -> State:
        snapshots.append(state(f"cat{len(snapshots)}"))
        return snapshots[-1]

    async def scene() -> None:
        saver = Saver(tmp_path / "state.json", snapshot)
        await asyncio.gather(*(saver.save() for _ in range(20)))

    asyncio.run(scene())
    assert len(snapshots) <= 2


def test_after_a_start_with_the_previous_file_the_file_itself_is_written(tmp_path: Path) -> None:
    async def scene() -> None:
        await Saver(tmp_path / "state.json.previous", lambda: state("cat")).save()

    asyncio.run(scene())
    assert contents(tmp_path) == {"state.json"}


@pytest.mark.timeout(10)
def test_f78_a_pipe_in_the_place_of_the_file_holds_nothing_up(tmp_path: Path) -> None:
    file = tmp_path / "state.json"
    os.mkfifo(file)
    with pytest.raises(StartError, match="it is not a plain file; start with --fresh"):
        read(file)
    with pytest.raises(OSError, match="it is not a plain file"):
        write(file, b"{}")


@contextlib.asynccontextmanager
async def control_plane(store: Path, folder: Path) -> AsyncIterator[ControlPlane]:
    cache = CacheDirectory(folder)
    cache.acquire(None)
    config = Config(model_store=store, run_dir=folder)
    control = ControlPlane(config, ModelRegistry(), ModelStore(store), cache, folder / "state.json")
    yield control
    await control.close(0)
    cache.release()


def test_a_saved_setting_that_is_none_any_more_names_the_file_and_the_model(
    make_archive: MakeArchive, tmp_path: Path
) -> None:
    archive = make_archive("echo")
    saved = SavedVersion(version="1.0", archive=archive.name, sha256="", settings={"batch_size": 0})

    async def scene() -> None:
        async with control_plane(archive.parent, tmp_path) as control:
            control.announce([SavedModel(name="cat", default="1.0", versions=[saved])])
            with pytest.raises(ConfigError) as caught:
                await control.restore("cat", "1.0")
        text = f"cat 1.0 in {tmp_path}/state.json (--fresh ignores it): batch_size = 0: must be at least 1"
        assert str(caught.value) == text

    asyncio.run(scene())


def test_what_is_saved_during_a_stop_is_what_was_registered_before(make_archive: MakeArchive, tmp_path: Path) -> None:
    archive = make_archive("echo")

    async def scene() -> State:
        async with control_plane(archive.parent, tmp_path) as control:
            await control.register(archive.name, changes={"min_workers": 0})
            before = control.snapshot()
        assert control.snapshot() == before
        return before

    (model,) = asyncio.run(scene()).models
    assert [saved.archive for saved in model.versions] == [archive.name]
