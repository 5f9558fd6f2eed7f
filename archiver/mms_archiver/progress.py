"""Says on standard error how far packing has come: a bar on a terminal, a line per tenth in a log."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

WORTH_SHOWING = 50_000_000


@contextmanager
def show_progress(name: str, total: int) -> Iterator[Callable[[int], None] | None]:
    """Yields what to call with the bytes done, or None when there is little to do."""
    if total < WORTH_SHOWING:
        yield None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn(name), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(name, total=total)
            yield lambda done: bar.update(task, completed=done)
    else:
        yield _Tenths(name, total)


class _Tenths:
    def __init__(self, name: str, total: int) -> None:
        self._name = name
        self._total = total
        self._tenth = 0

    def __call__(self, done: int) -> None:
        tenth = 10 * done // self._total
        if tenth > self._tenth:
            self._tenth = tenth
            sys.stderr.write(f"{self._name}: {tenth}0 % of {self._total} bytes\n")
