"""Load by wrk, in a process of its own; any answer but 2xx or a broken connection is an error of the run."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

SCRIPT = Path(__file__).with_name("post.lua")
MARGIN = 20.0

_ERRORS = ("status", "connect", "read", "write", "timeout")


class LoadError(Exception):
    """The load could not be put on the server, or the server did not answer all of it as it should."""


@dataclass(frozen=True)
class Load:
    """One run of wrk: latencies in µs."""

    requests: int
    seconds: float
    p50: float
    p99: float


def find_wrk() -> str:
    """The path of wrk. Raises LoadError without it."""
    program = shutil.which("wrk")
    if program is None:
        raise LoadError("wrk is not installed")
    return program


def put_load(url: str, body: Path, *, connections: int, seconds: float, chunk: int = 0) -> Load:
    """POSTs the file for so many seconds, one thread, closed loop; in chunks of so many bytes, if any are given.

    Raises LoadError on the first sign of an error.
    """
    duration = f"-d{max(1, round(seconds))}s"
    command = [
        find_wrk(),
        "-t1",
        f"-c{connections}",
        duration,
        "--timeout",
        "10s",
        "-s",
        str(SCRIPT),
        url,
        "--",
        str(body),
        *([str(chunk)] if chunk else []),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + MARGIN)
    result = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode != 0 or not result:
        raise LoadError(f"wrk failed: {(done.stderr or done.stdout).strip()}")
    return _parse(json.loads(result[-1].removeprefix("RESULT ")))


def _parse(counts: dict[str, float]) -> Load:
    errors = {name: counts[name] for name in _ERRORS if counts[name]}
    if errors or not counts["requests"]:
        raise LoadError(f"errors under load, of {counts['requests']} requests: {errors or 'no answer at all'}")
    return Load(int(counts["requests"]), counts["seconds"], counts["p50"], counts["p99"])
