"""Mixed traffic while everything that can be killed or changed is: what the clients have seen, and what is left."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from tests.chaos.clients import Account, Clients, Port
from tests.chaos.rig import PASSING, STEADY, Rig, State, explain, rig
from tests.waiting import eventually

BETWEEN_FAULTS = 0.35
CLIENTS = 6
FRONT_ENDS = {"none": 1, "nginx": 2}


@dataclass(frozen=True)
class Finding:
    """What one server has gone through."""

    port: Port
    account: Account
    faults: Counter[str]
    before: State
    after: State
    problems: list[str]


def observe(under: Rig, seconds: float, seed: int) -> Finding:
    """Faults for so long, one about every third of a second, then the balance."""
    clients = Clients(
        [under.port], [*STEADY, PASSING], under.timeline, explain, clients=CLIENTS, naughty=True, pause=0.005, seed=seed
    )
    with Clients([under.port], STEADY, under.timeline, explain, clients=CLIENTS):
        for _ in range(2):  # warm: once round, so that the saved state has a predecessor
            under.register_or_unregister()
    eventually(lambda: not under.state().unanswered)
    before = under.state()
    with clients:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not clients.account.violations:
            under.one_fault()
            threading.Event().wait(BETWEEN_FAULTS)
        under.settle()
    account = clients.account
    after = under.compare(before)
    problems = [*account.violations, *under.problems]
    if account.lost and not account.violations:
        problems.append(f"{account.lost} requests without an outcome")
    return Finding(under.port, account, under.timeline.count, before, after, problems)


def run(seconds: float, seed: int, edges: tuple[str, ...]) -> list[Finding]:
    """All servers at the same time."""
    findings: list[Finding] = []
    errors: list[BaseException] = []
    with contextlib.ExitStack() as stack:
        rigs = [
            stack.enter_context(rig(edge, seed + number, front_ends=FRONT_ENDS[edge], slow=True))
            for number, edge in enumerate(edges)
        ]

        def one(under: Rig, number: int) -> None:
            try:
                findings.append(observe(under, seconds, seed + number))
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=one, args=(under, number)) for number, under in enumerate(rigs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
    return sorted(findings, key=lambda finding: finding.port.name)


def show(findings: list[Finding], console: Console) -> int:
    """Prints the tables; the number of problems."""
    names = [finding.port.name for finding in findings]
    titles = {"direct": "without nginx", "nginx": "nginx, two front ends"}
    table = Table(title="faults injected and survived", title_justify="left")
    table.add_column("fault")
    for name in names:
        table.add_column(titles[name], justify="right")
    for kind in sorted(set().union(*(finding.faults for finding in findings))):
        table.add_row(kind, *(str(finding.faults[kind]) for finding in findings))
    console.print(table)
    table = Table(title="requests, by the clients' own account", title_justify="left")
    table.add_column("outcome")
    for name in names:
        table.add_column(titles[name], justify="right")
    accounts = [finding.account for finding in findings]
    table.add_row("sent", *(f"{account.sent:,}" for account in accounts))
    table.add_row("answered right", *(f"{account.right:,}" for account in accounts))
    table.add_row("bad ones refused as they must be", *(f"{account.refused.total():,}" for account in accounts))
    table.add_row("abandoned by the client", *(f"{account.abandoned:,}" for account in accounts))
    for kind in sorted(set().union(*(account.explained for account in accounts))):
        table.add_row(f"explained by a fault: {kind}", *(f"{account.explained[kind]:,}" for account in accounts))
    table.add_row("lost, doubled or mixed up", *(f"{len(account.violations):,}" for account in accounts))
    table.add_row("slowest right answer, s", *(f"{account.slowest:.2f}" for account in accounts))
    table.add_row("files", *(f"{f.before.files.total()} → {f.after.files.total()}" for f in findings))
    for name in ("descriptors", "threads"):
        table.add_row(
            f"{name} before → after", *(f"{getattr(f.before, name)} → {getattr(f.after, name)}" for f in findings)
        )
    table.add_row("memory, MiB", *(f"{f.before.memory >> 20} → {f.after.memory >> 20}" for f in findings))
    console.print(table)
    problems = [f"{titles[finding.port.name]}: {problem}" for finding in findings for problem in finding.problems]
    for problem in problems:
        console.print(f"VIOLATION {problem}", style="red", markup=False)
    return len(problems)
