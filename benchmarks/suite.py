"""The command line of a suite: scenarios that yield figures, each printed beside its bar."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.figures import Bench, Figure
from benchmarks.load import LoadError, find_wrk
from benchmarks.options import names_of
from benchmarks.servers import ServerError

Scenario = Callable[[Bench], Iterator[Figure]]


def table(title: str, figures: Sequence[Figure]) -> Table:
    result = Table(title=title)
    for column in ("scenario", "figures", "ratio", "bar", ""):
        result.add_column(column, justify="right" if column in ("ratio", "bar") else "left")
    for figure in figures:
        bar = f"{'at least' if figure.least else 'at most'} {figure.bar:g}"
        result.add_row(figure.what, figure.detail, f"{figure.ratio:.2f}", bar, "met" if figure.met else "MISSED")
    return result


def run(options: argparse.Namespace, scenarios: Mapping[str, Scenario]) -> list[Figure]:
    """All figures. Raises ServerError or LoadError."""
    find_wrk()
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        bench = Bench(options.seconds, options.repeat, Path(folder))
        for name in options.only:
            print(f"measuring {name}: {scenarios[name].__doc__}", file=sys.stderr, flush=True)
            for figure in scenarios[name](bench):
                print(f"  {figure.what}: {figure.ratio:.2f} ({figure.detail})", file=sys.stderr, flush=True)
                figures.append(figure)
    return figures


def main(
    name: str,
    title: str,
    text: str | None,
    scenarios: Mapping[str, Scenario],
    arguments: Sequence[str] | None = None,
    *,
    seconds: float = 5.0,
) -> int:
    """`name` is the module's; a measurement takes `seconds` unless the command line says otherwise.

    Exit status: 0; 1 for errors and, with --check, for missed bars; 130 if interrupted.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=text)
    parser.add_argument(
        "--seconds", type=float, default=seconds, help=f"length of one measurement (default {seconds:g})"
    )
    parser.add_argument("--repeat", type=int, default=3, help="rounds; the median counts (default 3)")
    parser.add_argument(
        "--only", type=names_of(scenarios), default=list(scenarios), help=f"some of {','.join(scenarios)}"
    )
    parser.add_argument("--check", action="store_true", help="exit 1 when a bar is missed")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        figures = run(options, scenarios)
    except (ServerError, LoadError) as error:
        print(f"{name} failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    Console(width=None if sys.stdout.isatty() else 120).print(table(title, figures))
    return 1 if options.check and not all(figure.met for figure in figures) else 0
