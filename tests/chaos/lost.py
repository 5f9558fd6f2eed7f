"""How many of 100,000 requests are lost in swaps, reloads and upgrades, or while workers are killed: none."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console

from tests.chaos.clients import Clients, Outcome
from tests.chaos.rig import STEADY, Rig, rig

CLIENTS = 8
KILL_EVERY = 2.0


@dataclass(frozen=True)
class Trial:
    """A disturbance: with which edge, what the requests ask meanwhile, how often, and the least time between two."""

    edge: str
    targets: tuple[str, ...]
    times: int
    act: Callable[[Rig], None]
    every: float = 0.0


def _kill(under: Rig) -> None:
    under.kill_worker()


TRIALS = {
    "swaps": Trial("none", ("swapped",), 50, Rig.swap),
    "reloads": Trial("nginx", ("steady",), 20, Rig.reload_nginx),
    "upgrades": Trial("none", ("steady",), 20, Rig.upgrade),
    "edge-upgrades": Trial("nginx", ("steady",), 20, Rig.upgrade),
    "kills": Trial("none", STEADY, 0, _kill, KILL_EVERY),  # as long as it takes
}


def run(name: str, requests: int, seed: int, console: Console) -> int:
    """The number of requests that were lost, which is printed."""
    trial = TRIALS[name]
    begun = time.monotonic()
    with rig(trial.edge, seed) as under:
        clients = Clients([under.port], trial.targets, under.timeline, _crossed, clients=CLIENTS, seed=seed)
        account = clients.account
        done = 0
        with clients:
            while not account.violations and (done < trial.times or account.sent < requests):
                # spread over all requests, however fast they are
                due = account.sent >= requests * done / trial.times if trial.times else True
                if due and (not trial.times or done < trial.times):
                    trial.act(under)
                    done += 1
                    threading.Event().wait(trial.every)
                threading.Event().wait(0.01)
                assert time.monotonic() - begun < 600, "too slow"
        under.settle()
        accepted = round(under.running.metric("mms_requests_total"))
    again = account.explained.total()
    # what the front end has taken must have been answered; versions and servers that are gone took their counts along
    unanswered = max(0, accepted - account.right) if trial.act not in (Rig.swap, Rig.upgrade) else 0
    lost = account.lost + unanswered + len(under.problems)
    console.print(
        f"{name}: {account.sent:,} requests, {done} {name}, lost {lost}"
        + (f"; {again} crossed nginx's end of an idle connection, unread, and would be sent again" if again else "")
        + f"; slowest {account.slowest:.2f} s; {time.monotonic() - begun:.0f} s",
        highlight=False,
    )
    for problem in (*account.violations, *under.problems):
        console.print(problem, markup=False)
    return lost


def _crossed(outcome: Outcome, faults: Counter[str]) -> bool:
    """No fault explains a loss, but a client must be ready for the end of an idle connection (RFC 9112, 9.3.1)."""
    return outcome.status == 0 and outcome.reused and faults["nginx reloaded"] + faults["server upgraded"] > 0
