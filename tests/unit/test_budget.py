"""How many deaths within what time are put up with."""

from __future__ import annotations

from mms.workers.budget import Budget
from tests.waiting import eventually


def test_more_deaths_than_the_limit_spend_it_until_the_oldest_is_long_ago() -> None:
    budget = Budget(2, 0.2)
    assert (budget.recent, budget.spent, budget.spent_for) == (0, False, 0.0)
    for _ in range(2):
        budget.count("signal 9 (SIGKILL)")
    assert (budget.recent, budget.spent, budget.spent_for) == (2, False, 0.0)
    budget.count("exit code 1")
    assert (budget.recent, budget.spent) == (3, True)
    assert 0 < budget.spent_for <= 0.2
    facts = budget.facts("forkserver", "running", "numpy")
    assert (facts.recent, facts.limit, facts.spent, facts.last_cause) == (3, 2, True, "exit code 1")
    eventually(lambda: budget.recent == 0)
    assert (budget.spent, budget.spent_for) == (False, 0.0)
    assert budget.causes == {"signal 9 (SIGKILL)": 2, "exit code 1": 1}, "counters only rise"
