"""The committed figures of the hot path: ratios to the floor, which travel from machine to machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

FILE = Path(__file__).with_name("figures.json")
WORSE = 1.15

Ratios = Mapping[str, float]  # of CPU time per request, by server and number of connections


def load(file: Path = FILE) -> Ratios:
    """Empty when nothing is committed."""
    if not file.exists():
        return {}
    ratios: dict[str, float] = json.loads(file.read_text())["cpu"]
    return ratios


def save(ratios: Ratios, file: Path = FILE) -> None:
    """What was not measured this time stays."""
    merged = {**load(file), **{name: round(ratio, 2) for name, ratio in ratios.items()}}
    text = {"about": "CPU time per request, as a multiple of nginx's return 200; written by make bench SAVE=1"}
    file.write_text(json.dumps({**text, "cpu": dict(sorted(merged.items()))}, indent=1) + "\n")


def changes_for_the_worse(now: Ratios, before: Ratios) -> list[str]:
    """One line for each ratio that has grown by more than 15 %."""
    return [
        f"{name}: {ratio:.2f} x the floor, committed are {before[name]:.2f} ({ratio / before[name] - 1:+.0%})"
        for name, ratio in now.items()
        if name in before and ratio > WORSE * before[name]
    ]
