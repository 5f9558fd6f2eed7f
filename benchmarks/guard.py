"""The committed figures of the hot path: ratios to the floor, by processor."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path

FILE = Path(__file__).with_name("figures.json")
WORSE = 1.15

Ratios = Mapping[str, float]  # of CPU time per request, by server and number of connections


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """As the kernel names it, with family and model, as clouds rent out several under one name."""
    facts: dict[str, str] = {}
    for line in cpuinfo.read_text().partition("\n\n")[0].splitlines():
        name, _, value = line.partition(":")
        facts[name.strip()] = value.strip()
    if "model name" not in facts:
        return platform.machine()
    return f"{facts['model name']}, family {facts.get('cpu family')}, model {facts.get('model')}"


def load(kind: str, file: Path = FILE) -> tuple[Ratios, str]:
    """The ratios of processors of that kind, and of which they are.

    Where there are none of this kind, the largest of all; empty when nothing is committed.
    """
    committed = _read(file)
    if kind in committed:
        return committed[kind], kind
    largest: dict[str, float] = {}
    for ratios in committed.values():
        largest.update({name: max(ratio, largest.get(name, 0.0)) for name, ratio in ratios.items()})
    return largest, "other processors"


def save(ratios: Ratios, kind: str, file: Path = FILE) -> None:
    """What was not measured this time stays."""
    committed = _read(file)
    committed[kind] = {**committed.get(kind, {}), **{name: round(ratio, 2) for name, ratio in ratios.items()}}
    document = {
        "about": "CPU time per request, as a multiple of nginx's return 200; written by make bench SAVE=1",
        "cpu": {of: dict(sorted(known.items())) for of, known in sorted(committed.items())},
    }
    file.write_text(json.dumps(document, indent=1) + "\n")


def changes_for_the_worse(now: Ratios, before: Ratios) -> list[str]:
    """One line for each ratio that has grown by more than 15 %."""
    return [
        f"{name}: {ratio:.2f} x the floor, committed are {before[name]:.2f} ({ratio / before[name] - 1:+.0%})"
        for name, ratio in now.items()
        if name in before and ratio > WORSE * before[name]
    ]


def _read(file: Path) -> dict[str, dict[str, float]]:
    if not file.exists():
        return {}
    committed: dict[str, dict[str, float]] = json.loads(file.read_text())["cpu"]
    return committed
