"""Which environments of requirements are deleted: those that no version needs, of no server, running or not."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from mms.workers.environments import Environments

FIRST, SECOND, THIRD = (f"{number:016x}" for number in range(3))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    for name in (f"venvs/{FIRST}/bin", f"venvs/{SECOND}/bin", f"venvs/{THIRD}/bin", "venvs/other", "servers"):
        (tmp_path / name).mkdir(parents=True)
    return tmp_path


class Server(Environments):
    """One that runs until it is stopped."""

    def __init__(self, cache: Path, name: str, state: str) -> None:
        self.own = cache / "servers" / name
        self.own.mkdir()
        self.file = cache / state
        self.file.touch()
        super().__init__(cache / "venvs", self.own, self.file)

    def needs(self, label: str, digest: str) -> None:
        asyncio.run(self.need(label, digest))

    def stop(self) -> None:
        self.own.rmdir()

    def left(self, *labels: str) -> set[str]:
        """The environments that are there after it has looked, as these are its versions."""
        asyncio.run(self.tidy(labels))
        return {path.name for path in self.folder.iterdir()} - {"lock", "needed", "other"}


def test_what_no_version_needs_is_deleted(cache: Path) -> None:
    server = Server(cache, "1", "a.json")
    server.needs("cat 1.0", FIRST)
    server.needs("dog 1.0", FIRST)
    server.needs("dog 1.0", SECOND)  # it was registered again, with other requirements
    assert server.left("cat 1.0", "dog 1.0") == {FIRST, SECOND}
    assert server.left("dog 1.0") == {SECOND}
    assert server.left() == set()
    assert (cache / "venvs" / "other").is_dir() and not list((cache / "venvs" / "needed").iterdir())


def test_what_another_server_needs_stays_also_when_it_has_ended_and_its_state_is_saved(cache: Path) -> None:
    other, server = Server(cache, "1", "a.json"), Server(cache, "2", "b.json")
    other.needs("cat 1.0", FIRST)
    other.file.unlink()  # it could not be saved
    assert server.left() == {FIRST}
    other.file.touch()
    other.stop()
    assert server.left() == {FIRST}
    other.file.unlink()
    assert server.left() == set()


def test_the_next_server_with_the_same_state_needs_what_its_versions_need(cache: Path) -> None:
    before = Server(cache, "1", "a.json")
    before.needs("cat 1.0", FIRST)
    before.needs("dog 1.0", SECOND)
    before.needs("cow 1.0", THIRD)
    before.stop()
    server = Server(cache, "2", "a.json")
    server.needs("dog 1.0", SECOND)
    assert server.left("cat 1.0", "dog 1.0") == {FIRST, SECOND}, "the cat could not be restored"
    assert server.left("dog 1.0") == {SECOND}


def test_in_an_upgrade_both_servers_keep_theirs(cache: Path) -> None:
    old = Server(cache, "1", "a.json")
    old.needs("cat 1.0", FIRST)
    new = Server(cache, "2", "a.json")
    new.needs("cat 1.0", SECOND)  # another Python
    assert new.left("cat 1.0") == {FIRST, SECOND}
    new.stop()  # not upgraded
    assert old.left("cat 1.0") == {FIRST}


def test_while_a_record_is_damaged_all_stays(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = Server(cache, "1", "a.json")
    server.needs("cat 1.0", FIRST)
    (cache / "venvs" / "needed" / "2.json").write_text("{")
    assert server.left() == {FIRST, SECOND, THIRD}
    assert f"stay: {cache}/venvs/needed/2.json is damaged; delete it" in caplog.text
