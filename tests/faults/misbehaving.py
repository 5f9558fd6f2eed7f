"""What tests of workers that run the archive `misbehaves` share."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest

from mms.backend import sandbox
from mms.errors import MMSError as Error
from tests.processes.pools import Served

NOBODY = 65534
MODULES = ("asyncio", "subprocess", "tempfile", "encodings.idna")  # the Python of the tests may be closed to others
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
restricted = pytest.mark.skipif(sandbox.landlock_abi() < sandbox.LANDLOCK_ABI, reason="this kernel has no Landlock 3")


@pytest.fixture
def make_folder_public(tmp_path: Path) -> None:
    """Other users may pass through the folders of this test to what is theirs."""
    for folder in (tmp_path, *tmp_path.parents):
        if not folder.stat().st_mode & 0o001:
            folder.chmod(0o711)


async def tell(served: Served, what: str) -> Any:
    """What a worker of `misbehaves` answers."""
    return json.loads(await asyncio.wait_for(served.submit(what.encode()), 10))


async def dies(served: Served, what: str) -> Error:
    """The error of a request that ends its workers."""
    with pytest.raises(Error) as caught:
        await asyncio.wait_for(served.submit(what.encode()), 10)
    return caught.value


async def serves(served: Served) -> bool:
    return bool((await tell(served, "echo fine"))["result"] == "fine")
