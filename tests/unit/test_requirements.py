"""Under what name the environment of an archive's requirements is kept: by all that decides what is in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mms import wire
from mms.workers.environments import Environments
from mms.workers.requirements import Installer


@pytest.fixture
def requirements(tmp_path: Path) -> Path:
    archive = tmp_path / "archive"
    (archive / "deep").mkdir(parents=True)
    (archive / "requirements.txt").write_text(
        "-r more.txt\n--constraint=pins.txt\n./a.whl --hash=sha256:00\n-rflat.txt\n-r ../outside.txt\nnumpy==1.0\n"
    )
    (archive / "more.txt").write_text("-r deep/last.txt\n-r more.txt\n-r requirements.txt\n")
    return archive / "requirements.txt"


def digest(requirements: Path) -> str:
    folder = requirements.parent
    how = Installer(
        environments=Environments(folder, folder, None), scratch=folder, sandbox=wire.Sandbox(), worker_env=(),
        wheelhouse=None, require_hashes=False,
    )  # fmt: skip
    return how._digest(requirements)


@pytest.mark.parametrize("name", ["requirements.txt", "more.txt", "pins.txt", "a.whl", "flat.txt", "deep/last.txt"])
def test_a_changed_file_makes_another_environment(requirements: Path, name: str) -> None:
    before = digest(requirements)
    with (requirements.parent / name).open("a") as file:
        file.write("\ncolours\n")
    assert digest(requirements) != before


def test_files_that_are_not_the_archives_are_not_read(requirements: Path) -> None:
    before = digest(requirements)
    (requirements.parent.parent / "outside.txt").write_text("colours")
    assert digest(requirements) == before
