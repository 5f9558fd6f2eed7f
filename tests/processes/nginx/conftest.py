"""A running nginx, and what it needs."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes.nginx.edges import Edge, Upstream


@pytest.fixture
def directory() -> Iterator[Path]:
    """A run directory that nginx's unprivileged workers can enter, with a path short enough for sockets."""
    path = Path(tempfile.mkdtemp(prefix="mms-nginx-"))
    path.chmod(0o711)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def upstream(directory: Path) -> Iterator[Upstream]:
    with Upstream(directory / "front.sock") as running:
        yield running


@pytest.fixture
def edge(directory: Path, upstream: Upstream) -> Iterator[Edge]:
    with Edge(directory) as running:
        yield running
