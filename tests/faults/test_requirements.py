"""S15: the requirements of archives are installed as their workers run, and from where the settings say."""

from __future__ import annotations

import hashlib
import os
import pwd
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mms.backend.sandbox import LANDLOCK_ABI, landlock_abi
from tests.conftest import MakeArchive
from tests.servers import Server, scratch, server
from tests.waiting import eventually

PIN = "colours==1.0 --hash=sha256:{}"

# a user of their own as well, if there can be one and Python is not in a folder of root
AS_NOBODY = os.geteuid() == 0 and all(folder.stat().st_mode & 0o005 == 0o005 for folder in Path(os.__file__).parents)
USER = pwd.getpwnam("nobody").pw_uid if AS_NOBODY else os.geteuid()
AT_START = r"""import os, sys; exec("try: open('x', 'w'); sys.begun_by = 'anybody'\nexcept OSError: sys.begun_by = os.getuid()")
"""  # noqa: E501  # a .pth file has code in lines of its own only

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(landlock_abi() < LANDLOCK_ABI, reason="needs a kernel with Landlock"),
]


def make_wheel(folder: Path) -> str:
    """A package that tells who started the Python that it is imported in; its SHA-256."""
    wheel = folder / "colours-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("colours.py", "import sys\nNAMES = [str(sys.begun_by), sys.prefix]")
        file.writestr("colours.pth", AT_START)
        file.writestr("colours-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: colours\nVersion: 1.0\n")
        file.writestr("colours-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr("colours-1.0.dist-info/RECORD", "")
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def installing(make_archive: MakeArchive) -> Iterator[Server]:
    """A server with a wheelhouse, whose workers run in all sandboxes that there are."""
    with scratch() as folder:
        wheels = folder / "wheels"
        wheels.mkdir(0o755)
        digest = make_wheel(wheels)
        wrong = PIN.format("0" * 64)
        with server(
            make_archive("needs_colours", requirements=PIN.format(digest)),
            spare=(
                make_archive("needs_colours", model_name="unpinned", requirements="colours==1.0"),
                make_archive("needs_colours", model_name="wrong", requirements=wrong),
                make_archive(
                    "needs_colours", model_name="index", requirements=f"--index-url http://x/\nno-such\n{wrong}"
                ),
            ),
            folder=folder,
            install_requirements="true",
            require_hashes="true",
            wheelhouse=wheels,
            worker_user="nobody" if AS_NOBODY else "",
            worker_fs="restricted",
            worker_network="none",
        ) as running:
            yield running


def test_s15_what_is_installed_is_the_workers_and_runs_only_as_they_do(installing: Server) -> None:
    user, prefix = installing.predict("needs_colours").body.decode().split()
    assert user == str(USER), "what a package leaves for the start of Python ran outside of the sandbox"
    assert Path(prefix).parent == installing.cache_dir / "venvs"
    assert {path.lstat().st_uid for path in Path(prefix).rglob("*")} == {USER}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("unpinned", "Hashes are required in --require-hashes mode"),
        ("wrong", "THESE PACKAGES DO NOT MATCH THE HASHES"),
        ("index", "no-such"),
    ],
)
def test_s15_what_is_not_pinned_or_not_in_the_wheelhouse_is_refused(installing: Server, name: str, words: str) -> None:
    assert installing.manage("POST", f"/models?url={name}-1.0.mar&synchronous=false").status == 202
    assert words in eventually(lambda: installing.describe(name).get("failure"), 40)["traceback"]


def test_s15_an_environment_goes_with_the_last_version_that_needs_it(installing: Server) -> None:
    _, prefix = installing.predict("needs_colours").body.decode().split()
    assert installing.manage("DELETE", "/models/needs_colours").status == 200
    eventually(lambda: not Path(prefix).exists())
