"""`make chaos`, `make lost`, `make soak`: the long runs with their figures; exit code 1 when a promise is broken."""

from __future__ import annotations

import argparse
import time

from rich.console import Console

from tests.chaos import chaos, lost, soak

SECONDS = {"chaos": 270.0, "soak": 1200.0}  # chaos: five minutes with its starts and its balance
REQUESTS = 100_000


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("what", choices=["chaos", "soak", "lost"])
    parser.add_argument("trials", nargs="*", metavar="trial", help=f"of lost: {', '.join(lost.TRIALS)} (default: all)")
    parser.add_argument("--seconds", type=float, help="of chaos and soak")
    parser.add_argument("--requests", type=int, default=REQUESTS, help="of lost, per trial")
    parser.add_argument(
        "--seed", type=int, default=int(time.time()), help="of the dice; what the processes do is not fixed"
    )
    words = parser.parse_args()
    console = Console(width=None if Console().is_terminal else 120, soft_wrap=True)
    console.print(f"seed {words.seed}", highlight=False)
    seconds = words.seconds or SECONDS.get(words.what, 0.0)
    if words.what == "chaos":
        return min(1, chaos.show(chaos.run(seconds, words.seed, ("none", "nginx")), console))
    if words.what == "soak":
        return min(1, soak.run(seconds, words.seed, console))
    return min(1, sum(lost.run(name, words.requests, words.seed, console) for name in words.trials or lost.TRIALS))


if __name__ == "__main__":
    raise SystemExit(main())
