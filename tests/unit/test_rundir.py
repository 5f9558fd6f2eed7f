"""The run directory: one server at a time, its record, what is left behind. The cache directory: several servers."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mms.errors import StartError
from mms.rundir import CacheDirectory, RunDirectory, Running

RUNNING = Running(os.getpid(), "127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3", 45.0)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Callable[[], RunDirectory]]:
    """Makes run directories at one place, and releases them."""
    made: list[RunDirectory] = []

    def make() -> RunDirectory:
        made.append(RunDirectory(tmp_path / "run"))
        return made[-1]

    yield make
    for one in made:
        one.release()


def test_it_is_made_for_this_user_alone(directory: Callable[[], RunDirectory]) -> None:
    run = directory()
    run.acquire(None)
    for folder in (run.path, run.sockets):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_second_server_is_told_who_runs_there(directory: Callable[[], RunDirectory]) -> None:
    first, second = directory(), directory()
    first.acquire(None)
    with pytest.raises(StartError, match=r"a server \(pid unknown\) is running in .*--run-dir"):
        second.acquire(None)
    first.record(RUNNING)
    with pytest.raises(StartError, match=f"pid {os.getpid()}"):
        second.acquire(None)
    assert first.running() == RUNNING, "the loser changes nothing"


def test_who_runs_there_can_be_asked(directory: Callable[[], RunDirectory]) -> None:
    run, asking = directory(), directory()
    assert asking.running() is None
    run.acquire(None)
    with pytest.raises(StartError, match="just starting or ending"):
        asking.running()
    run.record(RUNNING)
    assert asking.running() == RUNNING
    run.release()
    assert asking.running() is None


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"pid": 1}', "null", '{"pid": 1, "other": 2}'])
def test_a_broken_record_is_no_server(directory: Callable[[], RunDirectory], text: str) -> None:
    run = directory()
    run.acquire(None)
    (run.path / "mms.json").write_text(text)
    assert run.recorded() is None


def test_the_record_is_written_whole(directory: Callable[[], RunDirectory]) -> None:
    run = directory()
    run.acquire(None)
    run.record(RUNNING)
    assert json.loads((run.path / "mms.json").read_text())["pid"] == os.getpid()
    assert not (run.path / "mms.new").exists()


def test_what_a_killed_server_left_is_removed(directory: Callable[[], RunDirectory]) -> None:
    run = directory()
    run.acquire(None)
    run.record(RUNNING)
    (run.sockets / "front").touch()
    run.logs.mkdir()
    (run.logs / "cat.log").touch()
    os.close(run._lock)
    assert (run.running(), run.recorded()) == (None, RUNNING)
    run._lock = -1
    run.acquire(None)
    assert not list(run.sockets.iterdir()) and run.recorded() is None
    assert (run.logs / "cat.log").exists()


def test_after_release_another_server_may_start(directory: Callable[[], RunDirectory]) -> None:
    first, second = directory(), directory()
    first.acquire(None)
    first.record(RUNNING)
    first.release()
    first.release()
    assert not first.sockets.exists() and not (first.path / "mms.json").exists()
    second.acquire(None)


def test_releasing_a_lost_race_leaves_the_winner_alone(directory: Callable[[], RunDirectory]) -> None:
    first, second = directory(), directory()
    first.acquire(None)
    first.record(RUNNING)
    with pytest.raises(StartError):
        second.acquire(None)
    second.release()
    assert first.running() == RUNNING and first.sockets.is_dir()


def test_a_file_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(StartError, match="run"):
        RunDirectory(tmp_path / "run").acquire(None)


def test_a_link_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StartError, match="a link or a file, not a folder"):
        RunDirectory(tmp_path / "run").acquire(None)


def test_a_lock_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").symlink_to(tmp_path / "precious")
    with pytest.raises(StartError, match="cannot use the run directory"):
        RunDirectory(tmp_path / "run").acquire(None)
    assert not (tmp_path / "precious").exists()


@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_run_directory_that_others_may_write_in_is_refused_and_not_believed(tmp_path: Path, mode: int) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(mode)
    run = RunDirectory(tmp_path / "run")
    for ask in (run.running, run.prepare, lambda: run.acquire(None)):
        with pytest.raises(StartError, match=f"others may write in the run directory .*mode {mode:o}.*chmod go-w"):
            ask()
    assert not list(run.path.iterdir())


def test_a_link_to_a_run_directory_is_not_believed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StartError, match="a link or a file, not a folder"):
        RunDirectory(tmp_path / "run").running()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_run_directory_of_another_user_is_not_believed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o700)
    os.chown(tmp_path / "run", 1, 1)
    with pytest.raises(StartError, match="not a folder of this user, but of"):
        RunDirectory(tmp_path / "run").running()


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Callable[[], CacheDirectory]]:
    """The cache directory as each of several servers has it."""
    made: list[CacheDirectory] = []

    def make() -> CacheDirectory:
        made.append(CacheDirectory(tmp_path / "cache"))
        made[-1].acquire(None)
        return made[-1]

    yield make
    for one in made:
        one.release()


def test_servers_share_a_cache_but_each_has_a_folder_of_its_own(cache: Callable[[], CacheDirectory]) -> None:
    first, second = cache(), cache()
    assert first.own != second.own and first.venvs == second.venvs
    assert stat.S_IMODE(first.own.stat().st_mode) == 0o700
    (first.models / "cat").mkdir()
    second.release()
    assert (first.models / "cat").is_dir() and not second.own.exists()


def test_the_folder_of_a_killed_server_is_removed_by_the_next_one(cache: Callable[[], CacheDirectory]) -> None:
    killed, alive = cache(), cache()
    (killed.models / "cat").mkdir()
    (killed.venvs / "kept").mkdir()
    os.close(killed._lock)
    killed._lock = -1
    cache()
    assert not killed.own.exists()
    assert alive.models.is_dir() and (alive.venvs / "kept").is_dir()


def test_a_cache_that_others_may_write_in_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    with pytest.raises(StartError, match=r"others may write in the cache directory .*--cache-dir"):
        CacheDirectory(tmp_path / "cache").acquire(None)
