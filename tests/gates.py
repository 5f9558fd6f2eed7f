"""How a test holds back what the handler of the archive `gate` does."""

from __future__ import annotations

from pathlib import Path


class Gate:
    """The file that the archive `gate` waits for: what has begun, and the permission to answer."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def body(self) -> bytes:
        return str(self._path).encode()

    def begun(self) -> list[int]:
        """The pid of the worker of each execution so far."""
        return [int(line.split()[0]) for line in self._lines()]

    def batches(self) -> list[int]:
        """The batch size that each execution so far was in."""
        return [int(line.split()[1]) for line in self._lines()]

    def open(self) -> None:
        self._path.touch()

    def _lines(self) -> list[str]:
        try:
            return Path(f"{self._path}.begun").read_text().splitlines()
        except FileNotFoundError:
            return []
