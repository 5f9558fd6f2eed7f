"""What workers print: logged within bounds, and the pipe that brings it."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

import pytest
import uvloop

from mms.workers.output import KEPT_LINES, MAX_LINE, MAX_PER_SECOND, OutputReader
from tests.processes.pools import Serve, serve, subreaper, until

__all__ = ["serve", "subreaper"]


def test_f22_f23_what_workers_print_is_logged_within_bounds(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with serve("prints_a_lot") as served:
            assert await asyncio.wait_for(served.submit(b"0"), 5) == b"printed"
            output = served.pool.workers[0].output
            assert output is not None
            await until(lambda: "last line" in output.last_lines)
            assert "\\xff\\x00\\x1b[31m" in output.last_lines
            assert await asyncio.wait_for(served.submit(b"50"), 10) == b"printed", "a flood does not block the worker"
            assert sum(map(len, output.last_lines)) <= KEPT_LINES * MAX_LINE

    with caplog.at_level(logging.INFO, "mms.model.m"):
        uvloop.run(scenario())
    lines = [record.getMessage() for record in caplog.records if record.name == "mms.model.m"]
    assert all(line.startswith("[m 1 pid ") for line in lines)
    assert max(map(len, lines)) <= MAX_LINE * 4 + 100
    assert sum(map(len, lines)) < 10 * MAX_PER_SECOND


def test_dropped_output_is_counted(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("mms.workers.output.time.monotonic", lambda: now)
    reader = OutputReader(logging.getLogger("mms.model.x"), "x 1 pid 1")
    with caplog.at_level(logging.INFO, "mms.model.x"):
        reader.feed(b"y" * (MAX_PER_SECOND + 1) + b"\n")
        assert not caplog.records
        now = 101.0
        reader.feed(b"again\n")
    assert f"{MAX_PER_SECOND + 2} bytes of output dropped" in caplog.records[0].getMessage()
    assert caplog.records[1].getMessage() == "[x 1 pid 1] again"


def test_a_pipe_is_closed_once(tmp_path: Path) -> None:
    """Its number may be somebody else's as soon as it is closed."""

    async def scenario() -> None:
        reader = OutputReader(logging.getLogger("mms.model.x"), "x 1 pid 1")
        read_end, write_end = os.pipe()
        reader.start(read_end)
        os.write(write_end, b"last words")
        os.close(write_end)
        await until(lambda: list(reader.last_lines) == ["last words"])
        other = os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR)
        assert other == read_end
        reader.finish()
        os.write(other, b"still open")
        os.close(other)

    uvloop.run(scenario())
